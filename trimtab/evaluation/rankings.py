"""Held-out rankings: does a policy put the better answer above the worse?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.data.collate import collate, microbatches
from trimtab.evaluation.preferences import counted_tokens
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.objectives.reduce import response_sums
from trimtab.rewards.calibration import ordered_margins


@torch.no_grad()
def ranking_accuracy(lm: LanguageModel, groups: Sequence[Group], max_tokens: int) -> dict[str, float]:
    """Share of the strictly ordered pairs in the right order, ties one half, by each reading.

    The readings are those of :mod:`trimtab.evaluation.preferences`; the implicit reward needs the
    reference's log-probabilities on the responses. Groups are computed whole and cut as those were: the sums
    of an untrained policy are then the reference's to the last bit.
    """
    found: dict[int, torch.Tensor] = {}
    for part in microbatches(groups, max_tokens, layout=lm.layout):
        batch = collate(part, layout=lm.layout, device=lm.device)
        logps_NT, _ = lm.token_logprobs(batch)
        sums_N = response_sums(logps_NT.double(), batch.mask_NT).cpu()
        for group, own in zip(part, sums_N.split([len(g.responses) for g in part]), strict=True):
            found[id(group)] = own
    policy = [found[id(group)] for group in groups]
    readings = {
        "likelihood": policy,
        "per_token": [own / _lengths(group) for own, group in zip(policy, groups, strict=True)],
    }
    if all(r.ref_logps is not None for group in groups for r in group.responses):
        readings["implicit_reward"] = [
            own - torch.tensor([sum(r.ref_logps or []) for r in group.responses], dtype=torch.float64)
            for own, group in zip(policy, groups, strict=True)
        ]
    return {
        name: float((1 + np.sign(ordered_margins(groups, values))).mean() / 2)
        for name, values in readings.items()
    }


def _lengths(group: Group) -> torch.Tensor:
    return torch.tensor([float(counted_tokens(r)) for r in group.responses], dtype=torch.float64)
