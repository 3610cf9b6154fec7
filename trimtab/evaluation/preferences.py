"""Held-out preference accuracy: does a model put the chosen answer above the rejected one?

Three readings of "above", all reported, since each has its own chance level and bias:

    likelihood       log π(y_w|x) > log π(y_l|x)                     favours short answers
    per token        the same, divided by the number of tokens that count
    implicit reward  log π − log π_ref of the two (DPO's r̂)          needs a reference

Chance is 50 % for each. With β the implicit reward is one that Bradley and Terry's model reads as a
probability, p = σ(β·Δ): then it can be asked whether p means what it says (:func:`implicit_calibration`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trimtab.errors import InputError
from trimtab.evaluation.figures import share_with_interval
from trimtab.evaluation.reward_model import PairScores, reward_model_report
from trimtab.evaluation.stats.intervals import paired_win_rate, wilson
from trimtab.evaluation.stats.reliability import calibration_split
from trimtab.groups import Group, Response, prompt_text
from trimtab.models.language_model import LanguageModel
from trimtab.rewards.calibration import calibration_line, halves
from trimtab.spread.deal import Part, numbers


def pair_logps(lm: LanguageModel, pairs: Sequence[Group], max_tokens: int = 16384) -> torch.Tensor:
    """Summed log-probability of (chosen, rejected), ``[P, 2]`` in the order of ``pairs``."""
    return torch.tensor(summed_logps(lm, pairs, max_tokens), dtype=torch.float64).view(-1, 2)


def summed_logps(lm: LanguageModel, groups: Sequence[Group], max_tokens: int) -> list[float]:
    """log π(y|x) of every response, in the order of groups and responses; groups are computed whole.

    Added up as stored log-probabilities are, so that equal models differ by 0 and not by rounding.
    """

    def found(part: Part) -> list[list[float]]:
        logps_NT, _ = lm.token_logprobs(part.batch)
        return [[sum(row)] for row in part.batch.ragged(logps_NT)]

    return [total for (total,) in numbers(lm, groups, max_tokens, found)]


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
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracies with 95 % intervals by prompt. ``pairs`` are tokenised, chosen first.

    Where each pair has a prompt of its own an interval is Wilson's, else the bootstrap over prompts of
    :func:`~trimtab.evaluation.stats.intervals.paired_win_rate`. ``unscored`` counts the pairs of which a
    log-probability is no number; they are in no figure. ``beta``: also calibrates the implicit reward, under
    "calibration"; without a reference it has no effect. Raises InputError where no pair can be scored.
    """
    policy_P2 = pair_logps(lm, pairs, max_tokens)
    keep_P = policy_P2.isfinite().all(1)
    if ref_P2 is not None:
        keep_P &= ref_P2.isfinite().all(1)
        ref_P2 = ref_P2[keep_P]
    if not keep_P.any():
        raise InputError(f"preference: the log-probabilities of all {len(pairs)} pairs are no numbers")
    unscored = len(pairs) - int(keep_P.sum())
    pairs = [pair for pair, kept in zip(pairs, keep_P.tolist(), strict=True) if kept]
    policy_P2 = policy_P2[keep_P]
    lengths_P2 = torch.tensor([[counted_tokens(r) for r in p.responses] for p in pairs]).double()
    readings = {"likelihood": policy_P2, "per_token": policy_P2 / lengths_P2}
    if ref_P2 is not None:
        readings["implicit_reward"] = policy_P2 - ref_P2
    out: dict[str, Any] = {"pairs": len(pairs), "unscored": unscored}
    for name, values_P2 in readings.items():
        out[name], out[f"{name}_ci95"] = _accuracy(values_P2, pairs, seed)
    if ref_P2 is not None and beta is not None:
        out["calibration"] = implicit_calibration(policy_P2 - ref_P2, pairs, beta, seed=seed)
    return out


def preference_lines(section: Mapping[str, Any]) -> list[str]:
    """What the terminal says of the accuracies and their calibration, warnings first."""
    lines = []
    if section.get("unscored"):
        lines.append(
            f"warning: preference: {section['unscored']:,} pairs with a log-probability that is no number "
            "are left out"
        )
    names = {"likelihood": "likelihood", "per_token": "per token", "implicit_reward": "implicit reward"}
    said = [f"{say} {share_with_interval(section, key)}" for key, say in names.items() if key in section]
    lines.append(f"preference accuracy on {section['pairs']:,} pairs (chance 50 %): {', '.join(said)}")
    calibration = section.get("calibration")
    if calibration:
        lines.append(
            f"implicit reward: calibration error {calibration['ece']:.3f}, Brier score "
            f"{calibration['brier']:.3f}, log loss {calibration['nll']:.3f} nats (a coin: 0.25 and 0.693)"
        )
        if calibration["split"] is not None:
            lines.append(calibration_line(calibration["split"]))
    return lines


def _accuracy(values_P2: torch.Tensor, pairs: Sequence[Group], seed: int) -> tuple[float, list[float]]:
    """The share of pairs with the first value above the second, ties one half, and its interval."""
    wins = float((values_P2[:, 0] > values_P2[:, 1]).sum() + 0.5 * (values_P2[:, 0] == values_P2[:, 1]).sum())
    prompts = [_prompt(pair) for pair in pairs]
    if len(set(prompts)) == len(pairs):
        return wins / len(pairs), list(wilson(wins, len(pairs)))
    chosen, rejected = values_P2.T.tolist()
    rate = paired_win_rate(chosen, rejected, clusters=prompts, seed=seed)
    return rate.rate, list(rate.ci95)


def implicit_calibration(
    ratios_P2: torch.Tensor, pairs: Sequence[Group], beta: float, *, seed: int = 0
) -> dict[str, Any]:
    """How far p = σ(β·(Δ_w − Δ_l)), Δ = log π − log π_ref, can be taken at its word.

    ``ratios_P2`` holds Δ of (chosen, rejected), summed over tokens. The keys are those of
    :func:`~trimtab.evaluation.reward_model.reward_model_report`: ``ece``, ``brier``, ``nll``, ``temperature``
    (β divided by its value would be calibrated best), ``reliability`` and the rest. β is the one that the
    policy was trained with: any policy that solves "maximise E[r] − β·KL(π‖π_ref)" has r = β·Δ + a term of
    the prompt alone (Rafailov et al., 2023), whether it learned from pairs or from r itself.

    ``split``: a temperature fitted on half of the prompts, drawn by ``seed``, and what it does on the others
    (:func:`~trimtab.evaluation.stats.reliability.calibration_split`); None for fewer than two prompts.
    """
    rewards_P2 = (beta * ratios_P2).tolist()
    lengths_P2 = [[len(r.tokens or ()) for r in pair.responses] for pair in pairs]
    prompts = [_prompt(pair) for pair in pairs]
    scores = PairScores(
        chosen=[row[0] for row in rewards_P2],
        rejected=[row[1] for row in rewards_P2],
        chosen_tokens=[row[0] for row in lengths_P2],
        rejected_tokens=[row[1] for row in lengths_P2],
        prompts=prompts,
    )
    split = None
    if len(set(prompts)) > 1:
        margin = {id(pair): row[0] - row[1] for pair, row in zip(pairs, rewards_P2, strict=True)}
        fit, test = halves(pairs, seed)
        fit_P, test_P = (np.array([margin[id(pair)] for pair in side]) for side in (fit, test))
        split = calibration_split(fit_P, test_P, [_prompt(pair) for pair in test], seed=seed)
    return reward_model_report(scores, seed=seed) | {"split": split}


def _prompt(pair: Group) -> str:
    """What the pair is counted under: rows of one prompt's text are one prompt."""
    return prompt_text(pair.prompt) or pair.id
