"""Held-out labels: does a model's implicit reward put good responses above bad ones?

    h(y) = log π(y|x) − log π_ref(y|x),     AUC = P(h(good) > h(bad)) + ½·P(h(good) = h(bad))

over every good and every bad held-out response, whatever their prompts: labels are not paired. Chance is
50 %, and no threshold has to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.data.collate import collate, microbatches
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel


@torch.no_grad()
def label_auc(lm: LanguageModel, groups: Sequence[Group], max_tokens: int = 16384) -> float | None:
    """The AUC; None where all labels are of one kind. ``groups`` are of one response, with ``ref_logps``."""
    good, bad = list[float](), list[float]()
    for part in microbatches(groups, max_tokens, layout=lm.layout):
        batch = collate(part, layout=lm.layout, device=lm.device)
        # Added up as the reference's are, so that an untrained policy's gaps are 0 and not rounding.
        for group, logps in zip(part, batch.ragged(lm.token_logprobs(batch)[0]), strict=True):
            response = group.responses[0]
            (good if response.label else bad).append(sum(logps) - sum(response.ref_logps or []))
    if not (good and bad):
        return None
    gap_GB = torch.tensor(good)[:, None] - torch.tensor(bad)[None, :]
    return float((gap_GB > 0).double().mean() + 0.5 * (gap_GB == 0).double().mean())
