"""Prompts in, sampled and scored groups out: each process does its share, and has what all of them did."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.parallel.world import World, world
from trimtab.rewards.base import Mixture
from trimtab.rollouts.sampling import Sampler, SamplingConfig, check_context
from trimtab.spread.share import memory_in_one_line, shared_out


@dataclass
class Rollout:
    """What one call of :func:`sample_and_score` gives, the same in every process."""

    groups: list[Group]
    counts: dict[str, float]
    """What it adds to the numbers that the checkpoint keeps (see ``online.count``)."""
    reward_wait_s: float
    """Seconds between the end of sampling and the last reward, in the process that waited longest."""
    drawn: int = 0
    """Prompts of the stream that it took."""


def sample_and_score(
    lm: LanguageModel,
    sampler: Sampler,
    mixture: Mixture,
    prompts: list[Group],
    n: int,
    config: SamplingConfig,
    *,
    ends: list[int],
    seed: int,
    step: int,
    on_group: Callable[[int, Group], None],
    times: dict[str, int] | None = None,
    here: World | None = None,
) -> Rollout:
    """n scored responses to each prompt. Groups that the reward could not score are dropped and counted.

    ``step`` is that of the noise; ``on_group`` gets each group that this process samples as soon as it is
    finished, with its place in this process's share. ``times``, how often the step had each prompt before,
    goes on from call to call where a rollout is sampled by several. ``here``: the processes that share the
    prompts, with messages of their own where a thread samples. Raises InputError, in every process alike,
    for what one of them met, and when no group is left of a first call. Changes no state, so that it can run
    beside what does.
    """
    here = world() if here is None else here
    more = bool(times)
    tell_apart(prompts, times)
    if not here.alone:  # alone the sampler does, before it begins; in one process of several it may be late
        check_context(lm, prompts, config)
    together = not here.alone and (lm.spread or bool(mixture.spread))
    how: dict[str, Any] = {"ends": ends, "seed": seed, "step": step}
    own = _drawing(lm, sampler, n, config, **how, on_group=on_group, told=not together)

    def work(share: list[Group]) -> tuple[list[Group], dict[str, Any]]:
        before = mixture.facts()
        groups = own(share)
        sampled = time.perf_counter()
        report = mixture.score(groups)
        counts = {
            "generated_tokens": _tokens(groups),
            "skipped_groups": len(report.skipped_groups),
            # The scorer counts since it was made, the run since its first sitting.
            **{f"reward_fact/{name}": value - before.get(name, 0.0) for name, value in report.facts.items()},
        }
        waited_s = time.perf_counter() - sampled
        return groups, {"counts": counts, "waited_s": waited_s, "error": report.first_error}

    with _in_one_line(step, when=together):
        groups, told = shared_out(prompts, work, here, together=together)
    groups = [group for group in groups if all(r.reward is not None for r in group.responses)]
    if not groups and not more:
        first = next((said["error"] for said in told if said["error"]), None)
        raise InputError(f"step {step}: every group of the rollout was skipped: {first}")
    counts = _all_counts([said["counts"] for said in told])
    return Rollout(groups, counts, max(said["waited_s"] for said in told), len(prompts))


def draw(
    lm: LanguageModel,
    sampler: Sampler,
    prompts: list[Group],
    n: int,
    config: SamplingConfig,
    *,
    ends: list[int],
    seed: int,
    step: int,
) -> list[Group]:
    """n responses to each prompt, as :func:`sample_and_score` draws them."""
    tell_apart(prompts, None)
    how: dict[str, Any] = {"ends": ends, "seed": seed, "step": step}
    own = _drawing(lm, sampler, n, config, **how, on_group=None, told=not lm.spread)
    with _in_one_line(step, when=lm.spread):
        return shared_out(prompts, lambda share: (own(share), {}), world(), together=lm.spread)[0]


def tell_apart(prompts: list[Group], times: dict[str, int] | None) -> None:
    """A prompt that comes up twice in one rollout must not be answered twice with the same noise."""
    times = {} if times is None else times
    for group in prompts:
        times[group.id] = again = times.get(group.id, -1) + 1
        if again:
            group.id = f"{group.id}#{again}"


def _drawing(
    lm: LanguageModel,
    sampler: Sampler,
    n: int,
    config: SamplingConfig,
    *,
    ends: list[int],
    seed: int,
    step: int,
    on_group: Callable[[int, Group], None] | None,
    told: bool,
) -> Callable[[list[Group]], list[Group]]:
    """What samples this process's share. ``told``: the others are told where memory runs out."""

    def own(share: list[Group]) -> list[Group]:
        with _in_one_line(step, when=told):
            return sampler.sample(
                lm, share, n, config, seed=seed, step=step, end_tokens=ends, on_group=on_group
            )

    return own


def _in_one_line(step: int, *, when: bool) -> AbstractContextManager[None]:
    doing = f"step {step + 1}: out of memory while sampling"
    return memory_in_one_line(doing, "sampling.cache_mb or sampling.max_rows", when=when)


def _all_counts(of_each: list[dict[str, float]]) -> dict[str, float]:
    """What the processes counted in all; of wall time, which passes for all at once, the longest."""
    counts: dict[str, float] = {}
    for own in of_each:
        for name, value in own.items():
            before = counts.get(name, 0)
            counts[name] = max(before, value) if name.endswith("_seconds") else before + value
    return counts


def _tokens(groups: list[Group]) -> int:
    return sum(len(r.tokens or ()) for g in groups for r in g.responses)
