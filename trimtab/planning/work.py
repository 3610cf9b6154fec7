"""What a run computes: the passes of each part of a step, a rollout, the optimiser, what devices send.

With several devices, counts are of one of them. Every formula is in the style of ``numbers.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.planning import activations, shards
from trimtab.planning.counts import Amount, Runner, Tokens
from trimtab.planning.job import Compute, Job, Model, Role
from trimtab.planning.numbers import Number, ceil, choose, largest, smallest
from trimtab.planning.rollout import answers_of, prompts_of, rows_at_once, share_of
from trimtab.planning.states import wide

MESSAGE = 64 * 2**20
"""Bytes of gradients that are added up in one message (``parallel/world.py``)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a phase that one model computes in one dtype."""

    phase: str
    compute: Compute
    amount: Amount


def policy_of(job: Job) -> Runner:
    """The policy, or the reward model that learns."""
    adapter = job.adapter
    with_adapter = adapter.kind != "none"
    return Runner(
        job.model,
        job.engine,
        job.compute,
        scalar=job.scalar,
        adapter=adapter.ends if with_adapter else 0,
        rank=adapter.rank if with_adapter else 0,
        adapted=adapter.layers if with_adapter else 0,
        lengths=adapter.outputs if adapter.kind == "dora" else 0,
        kind=adapter.kind,
        quantise=adapter.quantise,
        frozen=with_adapter,
        head=job.head,
        entropy=job.entropy,
    )


def pieces(job: Job) -> Iterator[Piece]:
    """What one device does for one optimiser step; a rollout's work shared out over its steps."""
    policy = policy_of(job)
    share = share_of(job, job.batch.groups)
    yield Piece("training", job.compute, _trained(job, policy, share))
    learned = policy.learned + (job.model.width if job.value_head else 0)
    yield Piece("update", job.compute, updated(job, policy, learned))
    yield Piece("update", job.compute, _added_up(job, policy))
    for role in job.roles:
        if role.learns:
            critic = _runner(job, role)
            yield Piece("training", job.compute, _trained(job, critic, share))
            yield Piece("update", job.compute, updated(job, critic, critic.learned))
            yield Piece("update", job.compute, _added_up(job, critic))
    given = _of_step(job, share, job.batch.forward_times)
    compared = job.reference_pass and (job.reference_each or not job.reference_once)
    if job.sampling is None:
        if compared:
            yield Piece("scoring", job.compute, _scored(job, _reference(job), given))
        if job.old_pass:
            yield Piece("scoring", job.compute, _scored(job, policy, given))
        return
    rollout = _of_rollout(job)
    a_step = 1 / job.steps_per_rollout
    sampled = drawn(job, policy)
    gathered = _gathered(job, policy)
    if job.gather == "layers":
        # Each layer, for each pass: of prompts and of every token.
        sampled, gathered = sampled + gathered.times(sampled.steps + _prompt_passes(job)), Amount()
    yield Piece("sampling", job.compute, sampled.times(a_step))
    yield Piece("sampling", job.compute, gathered.times(a_step))
    if compared:
        # What is learned from, of all that was drawn: of several samples a pair, of self-play both sides.
        amount = _scored(job, _reference(job), given).times(job.steps_of_rollout * a_step)
        yield Piece("scoring", job.compute, amount)
    if job.old_pass:
        # Of a rollout that is learned from in several steps, the first needs none, unless the method's
        # advantages do.
        mini_batches = job.sampling.prompts / job.batch.groups
        later = 1 if job.old_pass_whole else choose(mini_batches - 1, 1 - 1 / mini_batches, 1)
        yield Piece("scoring", job.compute, _scored(job, policy, rollout).times(a_step * later))
    for role in job.roles:
        if role.name in ("critic", "reward model") and not role.watched:
            runner = _runner(job, role)
            yield Piece("scoring", runner.compute, _scored(job, runner, rollout).times(a_step))


def once(job: Job) -> Iterator[Piece]:
    """What is done before the first step: models are read, an offline method's reference computes."""
    read = job.model.parameters * job.file_bytes
    for role in job.roles:
        # A reference that is the policy as it starts, and a snapshot, are copies.
        copied = role.name == "snapshot" or (role.name == "reference" and role.model is job.model)
        if not role.shares_base and not copied:
            bytes_ = job.file_bytes if role.file_bytes is None else role.file_bytes
            read = read + role.model.parameters * bytes_
    yield Piece("loading", job.compute, Amount(read=read))
    if job.reference_pass and job.reference_once:
        runs = job.steps / job.data_passes
        share = share_of(job, job.batch.groups)
        amount = _scored(job, _reference(job), _of_step(job, share, job.batch.forward_times))
        yield Piece("reference once", job.compute, amount.times(runs))


def drawn(job: Job, policy: Runner) -> Amount:
    """One rollout: prompts are read once for all their samples, then a step draws a token for every row.

    Rows that finish make room for others, until none wait; the last ones then run to the longest response.
    """
    s, model, size = job.sampling, job.model, policy.size
    assert s is not None
    prompts, answers = prompts_of(job), answers_of(job)
    plain = s.engine == "plain"
    read = answers if plain else prompts
    tokens, passes = read * s.prompt, _prompt_passes(job)
    # The plain sampler's first pass makes logits of every token of the prompts.
    first = Tokens(tokens, tokens if plain else read, tokens * s.prompt / 2, passes)
    rows = rows_at_once(job)
    # Its rows run on until the last one has ended.
    length = s.longest_response if plain else s.response
    tokens = answers * length
    steps = tokens / rows + s.longest_response - length
    mean = tokens / steps
    weights = smallest(model.linear, model.active_linear * mean) + model.vocabulary * model.width
    factors = policy.rank * policy.adapter
    of_token = (model.attended_key + model.attended_value) * size
    shared = 1 if plain else s.samples
    seen, own = _seen(model, s.prompt), _seen(model, length / 2)
    # A prompt's keys and values are read once a step for all its rows.
    cache = tokens * of_token * (seen / shared + own)
    return policy.forward(first) + Amount(
        draws=2 * size * tokens * model.vocabulary,
        decode_flops=tokens
        * (
            2 * (model.active_linear + model.vocabulary * model.width + factors)
            + 4 * model.query * (seen + own)
        ),
        decode_bytes=steps * size * (weights + factors) + cache,
        decode_calls=steps * (model.layers + 0.2 * policy.adapted),
        steps=steps,
        rows=tokens,
    )


def _prompt_passes(job: Job) -> Number:
    """In which a device reads the prompts of a rollout."""
    s = job.sampling
    assert s is not None
    return 1 if s.engine == "plain" else largest(1, prompts_of(job) * s.prompt / 4096)


def _seen(model: Model, keys: Number) -> Number:
    """Keys, summed over layers, that a token sees of so many."""
    return keys * (model.layers - model.windowed) + smallest(keys, model.window) * model.windowed


BARE: dict[str, Any] = {"adapter": 0, "rank": 0, "adapted": 0, "lengths": 0, "kind": "none"}
"""Of a runner without an adapter."""


def _reference(job: Job) -> Runner:
    """The reference as it computes; where none is in memory the policy before it learned."""
    for role in job.roles:
        if role.name == "reference" and not role.watched:
            return _runner(job, role)
    return dataclasses.replace(policy_of(job), entropy=False, frozen=True, **BARE)


def _runner(job: Job, role: Role) -> Runner:
    """The role as it computes."""
    made = dataclasses.replace(
        policy_of(job),
        model=role.model,
        scalar=role.name in ("critic", "reward model"),
        compute="float32" if role.bytes == 4 and role.name == "reward model" else job.compute,
        entropy=False,
    )
    return made if role.adapter else dataclasses.replace(made, frozen=not role.learns, **BARE)


def _of_step(job: Job, share: Number, times: Number = 1) -> Tokens:
    b = job.batch
    passes = b.micro_batches * share / times
    # Of many devices each cuts its own groups.
    passes = largest(1, choose(job.devices - 1, ceil(passes), passes))
    return Tokens(b.tokens * share, b.targets * share, b.scores * share, passes)


def _of_rollout(job: Job) -> Tokens:
    """A whole rollout, a device's part of it, as a pass without gradient reads it."""
    s, b = job.sampling, job.batch
    assert s is not None
    prompts, answers = prompts_of(job), answers_of(job)
    if job.layout == "plain":
        tokens = answers * (s.prompt + s.response)
        scores = tokens * (s.prompt + s.response) / 2
    else:
        tokens = prompts * s.prompt + answers * s.response
        scores = prompts * s.prompt * s.prompt / 2 + answers * s.response * (s.prompt + s.response / 2)
    widest = choose(b.forward_widest, b.forward_widest, b.widest * b.forward_times)
    passes = largest(1, tokens / widest)
    return Tokens(tokens, answers * s.response, scores, passes)


def _scored(job: Job, runner: Runner, given: Tokens) -> Amount:
    return runner.forward(given) + _gathered(job, runner).times(given.passes)


def _trained(job: Job, runner: Runner, share: Number) -> Amount:
    given = _of_step(job, share)
    again = 0 if job.recompute == "none" else activations.again(job, runner.model) / runner.model.layers
    amount = runner.forward(given) + runner.backward(given, job.batch.widest_targets, again)
    if not job.shard:
        return amount
    a_pass = Amount(
        link=shards.sent_by_training(job, runner.model, runner.weights, runner.learned),
        across=_summed(job, runner.learned / job.sharers),
        hops=shards.hops_of_pass(job, runner.model, backward=True),
    )
    return amount + a_pass.times(given.passes)


def _gathered(job: Job, runner: Runner) -> Amount:
    """What a device sends in a pass without gradient, for which a sharded model is gathered."""
    if not job.shard:
        return Amount()
    return Amount(
        link=shards.sent(job, runner.weights * runner.size),
        hops=shards.hops_of_pass(job, runner.model, backward=False),
    )


def _summed(job: Job, numbers: Number) -> Number:
    """Bytes that a device sends while gradients of so many numbers are added up over copies."""
    return 2 * wide(job) * numbers * (job.copies - 1) / job.copies


def _added_up(job: Job, runner: Runner) -> Amount:
    """Of whole weights: gradients over all processes, once a step, when the last pass has ended."""
    if job.shard:
        return Amount()
    messages = ceil(wide(job) * runner.learned / MESSAGE)
    return Amount(across=_summed(job, runner.learned), hops=2 * messages * (job.devices - 1))


def updated(job: Job, runner: Runner, learned: Number) -> Amount:
    """The optimiser's step over so many numbers."""
    # The norm reads gradients, clipping reads and writes them, AdamW reads four numbers and writes three;
    # rounding reads the master and writes the weight.
    own = job.compute == "bfloat16" and not runner.frozen and not job.shard
    rounded = 4 + runner.size if own else 0
    return Amount(updates=learned * (40 + rounded) / job.sharers, calls=runner.model.layers)
