"""Held-out labels: does a model's implicit reward put good responses above bad ones?

    h(y) = log π(y|x) − log π_ref(y|x),     AUC = P(h(good) > h(bad)) + ½·P(h(good) = h(bad))

over every good and every bad held-out response, whatever their prompts: labels are not paired. Chance is
50 %, and no threshold has to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.evaluation.preferences import summed_logps
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel


def label_auc(lm: LanguageModel, groups: Sequence[Group], max_tokens: int = 16384) -> float | None:
    """The AUC; None where all labels are of one kind. ``groups`` are of one response, with ``ref_logps``."""
    good, bad = list[float](), list[float]()
    for group, logp in zip(groups, summed_logps(lm, groups, max_tokens), strict=True):
        response = group.responses[0]
        (good if response.label else bad).append(logp - sum(response.ref_logps or []))
    return auc(good, bad)


def auc(good: Sequence[float], bad: Sequence[float]) -> float | None:
    """P(a good one is above a bad one), ties half; None without one of the two kinds.

    >>> auc([3.0, 1.0], [1.0, 0.0])  # above, above, tied, above: 3.5 of 4
    0.875
    """
    if not (good and bad):
        return None
    good_G = torch.tensor(good, dtype=torch.float64)
    bad_B = torch.tensor(bad, dtype=torch.float64).sort().values
    # How many bad ones lie below each good one, and how many not above: a table of all pairs may be huge.
    below_G, up_to_G = (torch.searchsorted(bad_B, good_G, right=right) for right in (False, True))
    return float((below_G + up_to_G).double().mean()) / (2 * len(bad))
