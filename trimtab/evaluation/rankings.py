"""Held-out rankings: does a policy put the better answer above the worse?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.evaluation.preferences import counted_tokens, summed_logps
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.rewards.calibration import ordered_margins


def ranking_accuracy(lm: LanguageModel, groups: Sequence[Group], max_tokens: int) -> dict[str, float]:
    """Share of the strictly ordered pairs in the right order, ties one half, by each reading.

    The readings are those of :mod:`trimtab.evaluation.preferences`; the implicit reward needs the
    reference's log-probabilities on the responses. Groups are computed whole and cut as those were: the sums
    of an untrained policy are then the reference's to the last bit.
    """
    sums = torch.tensor(summed_logps(lm, groups, max_tokens), dtype=torch.float64)
    policy = sums.split([len(group.responses) for group in groups])
    readings = {
        "likelihood": list(policy),
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
