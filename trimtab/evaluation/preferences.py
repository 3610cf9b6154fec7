"""Held-out preference accuracy: does a model put the chosen answer above the rejected one?

Three readings of "above", all reported, since each has its own chance level and bias:

    likelihood       log π(y_w|x) > log π(y_l|x)                     favours short answers
    per token        the same, divided by the number of tokens that count
    implicit reward  log π − log π_ref of the two (DPO's r̂)          needs a reference

Chance is 50 % for each. With β the implicit reward is one that Bradley and Terry's model reads as a
probability, p = σ(β·Δ): then it can be asked whether p means what it says (:func:`implicit_calibration`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.data.collate import collate, microbatches
from trimtab.evaluation.intervals import wilson
from trimtab.evaluation.reward_model import PairScores, reward_model_report
from trimtab.groups import Group, Response, prompt_text
from trimtab.models.language_model import LanguageModel


@torch.no_grad()
def pair_logps(lm: LanguageModel, pairs: Sequence[Group], max_tokens: int = 16384) -> torch.Tensor:
    """Summed log-probability of (chosen, rejected), ``[P, 2]`` in the order of ``pairs``."""
    place = {id(pair): p for p, pair in enumerate(pairs)}
    out = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for part in microbatches(pairs, max_tokens, layout=lm.layout):
        batch = collate(part, layout=lm.layout, device=lm.device)
        logps_NT, _ = lm.token_logprobs(batch)
        # Added up as stored log-probabilities are, so that equal models differ by 0 and not by rounding.
        sums = torch.tensor([sum(row) for row in batch.ragged(logps_NT)], dtype=torch.float64).view(-1, 2)
        out[[place[id(pair)] for pair in part]] = sums
    return out


def counted_tokens(response: Response) -> int:
    """Tokens that the sums are over: those under the mask, not what users and tools say in between."""
    return len(response.tokens or ()) if response.mask is None else sum(response.mask)


def preference_accuracy(
    lm: LanguageModel,
    pairs: Sequence[Group],
    *,
    ref_P2: torch.Tensor | None = None,
    beta: float | None = None,
    max_tokens: int = 16384,
) -> dict[str, Any]:
    """Accuracies with 95 % Wilson intervals. ``pairs`` are tokenised, chosen first.

    ``beta``: also calibrates the implicit reward, under "calibration"; without a reference it has no effect.
    """
    policy_P2 = pair_logps(lm, pairs, max_tokens)
    lengths_P2 = torch.tensor([[counted_tokens(r) for r in p.responses] for p in pairs]).double()
    readings = {"likelihood": policy_P2, "per_token": policy_P2 / lengths_P2}
    if ref_P2 is not None:
        readings["implicit_reward"] = policy_P2 - ref_P2
    out: dict[str, Any] = {"pairs": len(pairs)}
    for name, values in readings.items():
        wins = float((values[:, 0] > values[:, 1]).sum() + 0.5 * (values[:, 0] == values[:, 1]).sum())
        out[name] = wins / len(pairs)
        out[f"{name}_ci95"] = list(wilson(wins, len(pairs)))
    if ref_P2 is not None and beta is not None:
        out["calibration"] = implicit_calibration(policy_P2 - ref_P2, pairs, beta)
    return out


def implicit_calibration(ratios_P2: torch.Tensor, pairs: Sequence[Group], beta: float) -> dict[str, Any]:
    """How far p = σ(β·(Δ_w − Δ_l)), Δ = log π − log π_ref, can be taken at its word.

    ``ratios_P2`` holds Δ of (chosen, rejected), summed over tokens. The keys are those of
    :func:`~trimtab.evaluation.reward_model.reward_model_report`: ``ece``, ``brier``, ``nll``, ``temperature``
    (β divided by its value would be calibrated best), ``reliability`` and the rest. β is the one that the
    policy was trained with: any policy that solves "maximise E[r] − β·KL(π‖π_ref)" has r = β·Δ + a term of
    the prompt alone (Rafailov et al., 2023), whether it learned from pairs or from r itself.
    """
    rewards_P2 = (beta * ratios_P2).tolist()
    lengths_P2 = [[len(r.tokens or ()) for r in pair.responses] for pair in pairs]
    scores = PairScores(
        chosen=[row[0] for row in rewards_P2],
        rejected=[row[1] for row in rewards_P2],
        chosen_tokens=[row[0] for row in lengths_P2],
        rejected_tokens=[row[1] for row in lengths_P2],
        prompts=[prompt_text(pair.prompt) or pair.id for pair in pairs],
    )
    return reward_model_report(scores)
