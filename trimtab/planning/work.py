"""What a run computes: the passes of each part of a step, a rollout, the optimiser, what devices send.

With several devices, counts are of one of them. Every formula is in the style of ``numbers.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.planning import activations
from trimtab.planning.counts import Amount, Runner, Tokens
from trimtab.planning.job import BYTES, Compute, Job, Model
from trimtab.planning.numbers import Number, choose, floor, largest, smallest


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
        kind=adapter.kind,
        quantise=adapter.quantise,
        frozen=with_adapter,
        head=job.head,
        entropy=job.entropy,
    )


def pieces(job: Job) -> Iterator[Piece]:
    """What one device does for one optimiser step; a rollout's work shared out over its steps."""
    policy = policy_of(job)
    share = 1 / job.devices
    yield Piece("training", job.compute, _trained(job, policy, share))
    learned = policy.learned + (job.model.width if job.value_head else 0)
    yield Piece("update", job.compute, updated(job, policy, learned))
    for role in job.roles:
        if role.learns:
            critic = _runner(job, role.name)
            yield Piece("training", job.compute, _trained(job, critic, share))
            yield Piece("update", job.compute, updated(job, critic, critic.learned))
    if job.sampling is None:
        given = _of_step(job, share, job.batch.forward_times)
        if job.reference_pass and not job.reference_once:
            yield Piece("scoring", job.compute, _scored(job, _runner(job, "reference"), given))
        if job.old_pass:
            yield Piece("scoring", job.compute, _scored(job, policy, given))
        return
    rollout = _of_rollout(job, share)
    a_step = 1 / job.steps_per_rollout
    yield Piece("sampling", job.compute, drawn(job, policy).times(a_step))
    gathered = _gathered(job, job.model.parameters * policy.size)
    yield Piece("sampling", job.compute, Amount(link=gathered * a_step))
    if job.reference_pass and not job.reference_once:
        yield Piece("scoring", job.compute, _scored(job, _runner(job, "reference"), rollout).times(a_step))
    if job.old_pass:
        # Of a rollout that is learned from in several steps, the first needs none, unless the method's
        # advantages do.
        mini_batches = job.sampling.prompts / job.batch.groups
        later = choose(mini_batches - 1, 1 - 1 / mini_batches, 1) if job.method != "ppo" else 1
        yield Piece("scoring", job.compute, _scored(job, policy, rollout).times(a_step * later))
    for role in job.roles:
        if role.name in ("critic", "reward model"):
            runner = _runner(job, role.name)
            amount = _scored(job, runner, rollout).times(a_step)
            if role.name == "reward model":
                amount = amount.times(job.sampling.candidates)
            yield Piece("scoring", runner.compute, amount)


def once(job: Job) -> Iterator[Piece]:
    """What is done before the first step: models are read, an offline method's reference computes."""
    read = job.model.parameters * job.file_bytes
    for role in job.roles:
        # A reference that is the policy as it starts, and a snapshot, are copies.
        copied = role.name == "snapshot" or (role.name == "reference" and role.model is job.model)
        if not role.shares_base and not copied:
            read = read + role.model.parameters * job.file_bytes
    yield Piece("loading", job.compute, Amount(read=read))
    if job.reference_pass and job.reference_once:
        runs = job.steps / job.data_passes
        amount = _runner(job, "reference").forward(_of_step(job, 1 / job.devices, job.batch.forward_times))
        yield Piece("reference once", job.compute, amount.times(runs))


def drawn(job: Job, policy: Runner) -> Amount:
    """One rollout: prompts are read once for all their samples, then a step draws a token for every row.

    Rows that finish make room for others, until none wait; the last ones then run to the longest response.
    """
    s, model, size = job.sampling, job.model, policy.size
    assert s is not None
    prompts = s.prompts / job.devices
    answers = prompts * s.samples * s.candidates
    read = answers if job.layout == "plain" else prompts
    first = Tokens(read * s.prompt, read, read * s.prompt * s.prompt / 2, largest(1, read * s.prompt / 4096))
    rows = rows_at_once(job)
    tokens = answers * s.response
    steps = tokens / rows + s.longest_response - s.response
    mean = tokens / steps
    weights = smallest(model.linear, model.active_linear * mean) + model.vocabulary * model.width
    factors = policy.rank * policy.adapter
    of_token = (model.key + model.value) * size
    shared = s.samples * s.candidates if job.layout != "plain" else 1
    seen, own = _seen(model, s.prompt), _seen(model, s.response / 2)
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


def rows_at_once(job: Job) -> Number:
    """Responses that run together: as many as asked for, as there are, as the cache has room for."""
    s, model = job.sampling, job.model
    assert s is not None
    answers = s.prompts * s.samples * s.candidates / job.devices
    of_token = model.layers * (model.key + model.value) * BYTES[job.compute]
    shared = 1 if job.layout == "plain" else s.samples * s.candidates
    room = floor(s.cache_mb * 2**20 / (of_token * (s.longest_response + s.longest_prompt / shared)))
    return smallest(s.max_rows, answers, largest(1, room))


def _seen(model: Model, keys: Number) -> Number:
    """Keys, summed over layers, that a token sees of so many."""
    return keys * (model.layers - model.windowed) + smallest(keys, model.window) * model.windowed


def _runner(job: Job, name: str) -> Runner:
    """The role as it computes; without one of that name the policy before it learned."""
    policy = policy_of(job)
    bare: dict[str, Any] = {"adapter": 0, "rank": 0, "adapted": 0, "kind": "none", "frozen": True}
    for role in job.roles:
        if role.name == name:
            plain = not role.adapter
            made = dataclasses.replace(
                policy,
                model=role.model,
                scalar=name in ("critic", "reward model"),
                compute="float32" if role.bytes == 4 and name == "reward model" else job.compute,
                entropy=False,
                **(bare if plain else {}),
            )
            return dataclasses.replace(made, frozen=not role.learns) if plain else made
    return dataclasses.replace(policy, entropy=False, **bare)


def _of_step(job: Job, share: Number, times: Number = 1) -> Tokens:
    b = job.batch
    passes = largest(1, b.micro_batches * share / times)
    return Tokens(b.tokens * share, b.targets * share, b.scores * share, passes)


def _of_rollout(job: Job, share: Number) -> Tokens:
    """A whole rollout as a pass without gradient reads it."""
    s, b = job.sampling, job.batch
    assert s is not None
    prompts = s.prompts * share
    answers = prompts * s.samples
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
    return runner.forward(given) + Amount(link=given.passes * _gathered(job, runner.weights * runner.size))


def _trained(job: Job, runner: Runner, share: Number) -> Amount:
    given = _of_step(job, share)
    again = 0 if job.recompute == "none" else activations.again(job, runner.model) / runner.model.layers
    amount = runner.forward(given) + runner.backward(given, job.batch.widest_targets, again)
    sent = 4 * runner.learned * (job.devices - 1) / job.devices
    if not job.shard:
        return amount + Amount(link=2 * sent)
    # Gathered for the forward and again for the backward pass; gradients reduced in fp32.
    return amount + Amount(link=given.passes * (2 * _gathered(job, runner.weights * runner.size) + sent))


def _gathered(job: Job, weights: Number) -> Number:
    """Bytes that a device sends while all of them gather a sharded model."""
    return weights * (job.devices - 1) / job.devices if job.shard else 0


def updated(job: Job, runner: Runner, learned: Number) -> Amount:
    """The optimiser's step over so many numbers."""
    # The norm reads gradients, clipping reads and writes them, AdamW reads four numbers and writes three;
    # rounding reads the master and writes the weight.
    rounded = 4 + runner.size if job.compute == "bfloat16" and not runner.frozen else 0
    share = 1 / job.devices if job.shard else 1
    return Amount(updates=learned * (40 + rounded) * share, calls=runner.model.layers)
