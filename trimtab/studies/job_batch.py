"""The batches and the rollout of a run, from a sample of its data or from the limits of its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.mixed import sort
from trimtab.methods.shared.setup import MethodConfig, total_steps
from trimtab.methods.spin import iteration_lengths, pairs_of_step, place
from trimtab.planning.batch import batch_of, batch_over, check_fits, smallest_budget
from trimtab.planning.cutting import MOST_STEPS, Lengths, forward_times
from trimtab.planning.job import Batch, Layout, Model, Sampling
from trimtab.planning.methods import MOST_ROWS, Card
from trimtab.planning.rollout import engine_of
from trimtab.studies.job_data import Sample
from trimtab.training.run import UNBOUNDED

ROLLOUTS = 16
"""Of a run, so many are cut to find the largest pass over one."""


def kinds_of(card: Card, sample: Sample | None) -> list[str]:
    """Of feedback in the data of a mixed run; all of them where nothing was read."""
    if card.name != "mixed":
        return []
    if sample is None:
        return ["pairs", "labels", "demonstrations"]
    return [kind for kind, groups in sort(sample.groups).items() if groups]


def rollout_of(card: Card, config: Any, sample: Sample | None) -> int:
    """Prompts sampled at once."""
    if card.name == "spin":
        return int(config.spin.iteration_groups or (sample.rows if sample else config.train.batch_groups))
    return int(config.rollout)


def steps_of(card: Card, config: Any, sample: Sample | None) -> int:
    """Optimiser steps of the run; UNBOUNDED under a token budget, one where nobody can say."""
    train = config.train
    if card.name == "spin" and (sample or train.steps or config.spin.steps_per_iteration):
        return sum(iteration_lengths(config, sample.rows if sample else train.batch_groups))
    if sample is None and not (train.steps or train.token_budget):
        return 1
    passes = config.options.epochs_per_rollout if hasattr(config, "rollout") else 1
    return total_steps(train, (sample.rows if sample else 1) * passes)


def until_spent(config: MethodConfig, tree_tokens: float) -> int:
    """Steps until ``train.token_budget`` is spent, a prompt counting once for all its responses."""
    return max(1, math.ceil(config.train.token_budget / max(tree_tokens, 1.0)))


def trained_responses(card: Card, config: Any) -> int:
    """Responses of a prompt that are learned from, of methods whose samples or options say so."""
    options = getattr(config, card.section)
    if card.name == "online-dpo":
        return 2 if options.pairing == "best_worst" else int(options.samples)
    if card.responses_option:
        return int(getattr(options, card.responses_option.rpartition(".")[2]))
    return card.responses


def batch_for(
    card: Card,
    config: Any,
    model: Model,
    layout: Layout,
    sample: Sample | None,
    steps: int,
    *,
    passes: bool,
) -> Batch:
    """Means over the run's first steps, with the fullest micro-batch among them.

    ``passes``: log-probabilities or values are computed without gradient too.
    """
    train = config.train
    how: dict[str, Any] = {
        "micro_batch_tokens": train.micro_batch_tokens,
        "layout": layout,
        "divisible": card.divisible,
        "layers": int(model.layers),
        "recompute": "some" if train.activation_mb else "none",
    }
    if sample is None:
        prompt, response = limits_of(card, config, model, layout)
        read = rollout_of(card, config, None) if card.rollouts else train.batch_groups
        return batch_of(
            *(prompt, response),
            groups=train.batch_groups,
            responses=trained_responses(card, config),
            forward_groups=read if passes else None,
            **how,
        )
    drawn = _drawn(card, config, sample, min(max(steps, 1), MOST_STEPS))
    return batch_over(drawn, forward=_read_at_once(card, config, sample, steps, how) if passes else (), **how)


def limits_of(card: Card, config: Any, model: Model, layout: Layout) -> tuple[int, int]:
    """The longest prompt and response that the options let through, a group within one micro-batch.

    Raises InputError where no group fits into one, so that the run would refuse them all.
    """
    data, train = config.data, config.train
    context = int(model.context) or train.micro_batch_tokens
    longest = min(data.max_tokens or context, context)
    count = trained_responses(card, config)
    if card.rollouts:
        response = min(int(config.sampling.max_new_tokens), longest - 1)
    else:
        response = max(1, longest - min(data.max_prompt_tokens or longest // 2, longest - 1))
    prompt = min(data.max_prompt_tokens or longest, longest - response)
    size = smallest_budget(prompt, response, responses=count, layout=layout, divisible=card.divisible)
    if size <= train.micro_batch_tokens:
        return prompt, response
    # A run refuses what is larger, so that its groups are no larger than this.
    copies = count if layout == "plain" and not card.divisible else 1
    answers = 1 if card.divisible else count
    room = train.micro_batch_tokens // copies
    if not card.rollouts:
        response = max(1, min(response, room // 2 // (1 if copies > 1 else answers)))
    taken = response if copies > 1 else response * answers
    if taken >= room:  # not even a prompt of one token is left room for
        least = prompt if data.max_prompt_tokens else 1
        try:
            check_fits(
                *(least, response),
                responses=count,
                micro_batch_tokens=train.micro_batch_tokens,
                layout=layout,
                divisible=card.divisible,
            )
        except InputError as error:
            raise InputError(f"train.micro_batch_tokens: {error}") from None
    return max(1, min(prompt, room - taken)), response


def _lengths(card: Card, config: Any, groups: Sequence[Group]) -> list[tuple[int, list[int]]]:
    """Of groups that were read; what is still to be sampled is as long as it may be."""
    room = config.sampling.max_new_tokens if card.rollouts else 0
    found = []
    for group in groups:
        given = [len(r.tokens or ()) for r in group.responses]
        if card.name == "spin":
            given = [*given, room]
        elif card.rollouts:
            given = [room] * trained_responses(card, config)
        found.append((len(group.prompt_tokens or ()), given))
    return found


def _parts(card: Card, config: Any, groups: Sequence[Group]) -> list[Lengths]:
    """What of these groups is cut apart."""
    if card.name != "mixed":
        return [_lengths(card, config, groups)]
    return [_lengths(card, config, part) for part in sort(groups).values()]


def _drawn(card: Card, config: Any, sample: Sample, steps: int) -> list[list[Lengths]]:
    """The groups of the run's first steps, as its stream draws them."""
    size = config.train.batch_groups
    if card.name == "spin":
        return [[part] for part in _of_iterations(card, config, sample, steps)]
    if card.rollouts:
        # A rollout's groups come up in order, and again in another order in each further pass.
        per_rollout = max(1, rollout_of(card, config, sample) // size)
        epochs = getattr(getattr(config, card.section), "epochs_per_rollout", 1)
        turns = [k // (per_rollout * epochs) * per_rollout + k % per_rollout for k in range(steps)]
    else:
        turns = list(range(steps))
    return [_parts(card, config, sample.data.stream.batch(turn * size, size)) for turn in turns]


def _of_iterations(card: Card, config: Any, sample: Sample, steps: int) -> Iterator[Lengths]:
    """A step of SPIN's is drawn from the pairs of its iteration, and of the one before."""
    drawn = rollout_of(card, config, sample) if sample.whole else len(sample.groups)
    lengths = iteration_lengths(config, sample.rows)

    def fresh(t: int) -> list[Group]:
        return sample.data.stream.batch(t * drawn, drawn)

    for step in range(steps):
        t, at = place(lengths, step)
        if at == 0:
            pairs = fresh(t) + (fresh(t - 1) if t and config.spin.keep_previous else [])
        seed = config.train.seed
        yield _lengths(card, config, pairs_of_step(pairs, t, at, config.train.batch_groups, seed))


def _read_at_once(card: Card, config: Any, sample: Sample, steps: int, how: dict[str, Any]) -> list[Lengths]:
    """What passes without gradient read, each at once: rollouts, or all of the data."""
    if card.rollouts and card.name != "spin":
        size, most = rollout_of(card, config, sample), math.ceil(steps / config.steps_per_rollout)
        rollouts = (sample.data.stream.batch(k * size, size) for k in range(min(most, ROLLOUTS)))
        return [_lengths(card, config, groups) for groups in rollouts]
    groups = sample.data.stream.worded(sample.groups)
    lengths = _lengths(card, config, groups)
    if sample.whole:
        return [lengths]
    # The sample stands for all of it: as often as fills the largest pass twice.
    tokens = sum(p + sum(r) for p, r in lengths)
    most = 2 * how["micro_batch_tokens"] * int(forward_times(how["layers"], how["recompute"]))
    return [lengths * max(1, min(math.ceil(sample.rows / len(groups)), math.ceil(most / max(tokens, 1))))]


def sampling_for(card: Card, config: Any, model: Model, layout: Layout, sample: Sample | None) -> Sampling:
    """One rollout. What is drawn is taken to be as long as it may be."""
    options, drawing = getattr(config, card.section), config.sampling
    if sample is None:
        prompt, _ = limits_of(card, config, model, layout)
        mean, longest = float(prompt), prompt
    else:
        prompts = [len(group.prompt_tokens or ()) for group in sample.groups]
        mean, longest = sum(prompts) / len(prompts), max(prompts)
    samples = 1
    if card.responses_option:
        samples = int(getattr(options, card.responses_option.rpartition(".")[2]))
    return Sampling(
        prompts=rollout_of(card, config, sample),
        samples=samples,
        prompt=mean,
        response=drawing.max_new_tokens,
        longest_response=drawing.max_new_tokens,
        longest_prompt=longest,
        cache_mb=drawing.cache_mb,
        max_rows=drawing.max_rows or MOST_ROWS,
        engine=engine_of(model, drawing.engine),
        filtered=drawing.filtered,
    )


def tree_tokens(card: Card, config: Any, model: Model, layout: Layout, sample: Sample | None) -> float:
    """Mean tokens of a step in the tree layout, which a token budget counts."""
    size = config.train.batch_groups
    if sample is None:
        prompt, response = limits_of(card, config, model, layout)
        return float(size * (prompt + response * trained_responses(card, config)))
    lengths = _lengths(card, config, sample.groups)
    return size * sum(p + sum(r) for p, r in lengths) / len(lengths)


def unbounded(steps: int) -> bool:
    """A token budget alone ends the run."""
    return steps >= UNBOUNDED
