"""Held-out preference accuracy: does a model put the chosen answer above the rejected one?

Three readings of "above", all reported, since each has its own chance level and bias:

    likelihood       log π(y_w|x) > log π(y_l|x)                     favours short answers
    per token        the same, divided by the number of tokens
    implicit reward  log π − log π_ref of the two (DPO's r̂)          needs a reference

Chance is 50 % for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.data.collate import collate, microbatches
from trimtab.evaluation.intervals import wilson
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.objectives.reduce import response_sums


@torch.no_grad()
def pair_logps(lm: LanguageModel, pairs: Sequence[Group], max_tokens: int = 16384) -> torch.Tensor:
    """Summed log-probability of (chosen, rejected), ``[P, 2]`` in the order of ``pairs``."""
    place = {id(pair): p for p, pair in enumerate(pairs)}
    out = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for part in microbatches(pairs, max_tokens, layout=lm.layout):
        batch = collate(part, layout=lm.layout, device=lm.device)
        logps_NT, _ = lm.token_logprobs(batch)
        sums = response_sums(logps_NT, batch.mask_NT).double().cpu().view(-1, 2)
        out[[place[id(pair)] for pair in part]] = sums
    return out


def preference_accuracy(
    lm: LanguageModel, pairs: Sequence[Group], *, ref_P2: torch.Tensor | None = None, max_tokens: int = 16384
) -> dict[str, Any]:
    """Accuracies with 95 % Wilson intervals. ``pairs`` are tokenised, chosen first."""
    policy_P2 = pair_logps(lm, pairs, max_tokens)
    lengths_P2 = torch.tensor([[len(r.tokens or ()) for r in p.responses] for p in pairs]).double()
    readings = {"likelihood": policy_P2, "per_token": policy_P2 / lengths_P2}
    if ref_P2 is not None:
        readings["implicit_reward"] = policy_P2 - ref_P2
    out: dict[str, Any] = {"pairs": len(pairs)}
    for name, values in readings.items():
        wins = float((values[:, 0] > values[:, 1]).sum() + 0.5 * (values[:, 0] == values[:, 1]).sum())
        out[name] = wins / len(pairs)
        out[f"{name}_ci95"] = list(wilson(wins, len(pairs)))
    return out
