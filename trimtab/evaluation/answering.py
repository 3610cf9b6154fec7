"""A policy's answers to an evaluation's prompts: each process samples its share, every process has all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.parallel.world import world
from trimtab.rewards.base import Mixture
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.spread.share import memory_in_one_line, shared_out


def answered(
    lm: LanguageModel,
    sampler: Sampler,
    prompts: Sequence[Group],
    samples: int,
    config: SamplingConfig,
    *,
    seed: int,
    end_tokens: list[int],
    mixture: Mixture | None = None,
) -> list[Group]:
    """``samples`` answers to each prompt, scored where there is a reward; in the order of the prompts.

    The noise depends on the seed, the prompt and the sample alone: it is that of every policy, and of any
    number of processes. Raises InputError, in every process alike, for what one of them met.
    """
    plain = [dataclasses.replace(group, responses=[]) for group in prompts]
    here = world()
    together = not here.alone and (lm.spread or bool(mixture is not None and mixture.spread))

    def short_of_memory(when: bool) -> AbstractContextManager[None]:
        doing = "out of memory while an evaluation samples"
        return memory_in_one_line(doing, "cache_mb or max_rows of its sampling", when=when)

    def work(share: list[Group]) -> tuple[list[Group], dict[str, Any]]:
        groups: list[Group] = []
        if share or lm.spread:  # there may be fewer prompts than processes
            # One process alone halves its micro-batches and evaluates again.
            with short_of_memory(not (here.alone or together)):
                groups = sampler.sample(lm, share, samples, config, seed=seed, step=0, end_tokens=end_tokens)
        if mixture is not None:
            mixture.score(groups)
        return groups, {}

    with short_of_memory(together):
        return shared_out(plain, work, here, together=together)[0]
