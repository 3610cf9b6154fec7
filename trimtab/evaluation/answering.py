"""A policy's answers to an evaluation's prompts: each process samples its share, every process has all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.parallel.world import world
from trimtab.rewards.base import Mixture
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.spread.share import shared_out


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

    def work(share: list[Group]) -> tuple[list[Group], dict[str, Any]]:
        groups: list[Group] = []
        if share or lm.spread:  # there may be fewer prompts than processes
            groups = sampler.sample(lm, share, samples, config, seed=seed, step=0, end_tokens=end_tokens)
        if mixture is not None:
            mixture.score(groups)
        return groups, {}

    # A sampler gathers a spread model itself, for its own call alone: nobody waits for messages meanwhile.
    return shared_out(plain, work, world())[0]
