"""Held-out comparisons → the scores of a reward model, for :mod:`trimtab.evaluation.reward_model` to judge.

Two ways in: a :class:`ScalarModel` on tokenised groups, as it stands while it is trained; and a
:class:`RewardModel`, the form in which rewards and judges are used, on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trimtab.data.collate import group_tokens
from trimtab.errors import InputError
from trimtab.evaluation.reward_model import PairScores, reward_model_report
from trimtab.evaluation.stats.correlation import correlation
from trimtab.evaluation.stats.intervals import Floats
from trimtab.evaluation.stats.reliability import calibration_split
from trimtab.groups import Group, prompt_text
from trimtab.models.scalar_model import ScalarModel
from trimtab.objectives.scores import step_loss
from trimtab.rewards.base import response_text
from trimtab.rewards.calibration import calibration_figures, halves
from trimtab.rewards.models import RewardModel
from trimtab.rewards.scores import group_scores, step_figures, step_labels
from trimtab.spread.deal import Part, numbers


def held_out_scores(rm: ScalarModel, comparisons: Sequence[Group], max_tokens: int = 16384) -> PairScores:
    """Scores of tokenised, ranked groups (:func:`~trimtab.data.convert.as_comparisons`), as ordered pairs.

    ``max_tokens`` are computed at once; a single group that is longer is computed alone. The unit of the
    intervals is the prompt, so rows that share one count as one.
    """
    scores = [found[:, 0].tolist() for found in group_scores(rm, comparisons, max_tokens)]
    lengths = [[len(response.tokens or ()) for response in group.responses] for group in comparisons]
    return _pairs(comparisons, lengths, scores)


def scorer_scores(scorer: RewardModel, comparisons: Sequence[Group]) -> PairScores:
    """The same for a reward model as it is used: text in, the weighted sum of its outputs out.

    Lengths are in the reward model's own tokens. Raises InputError for a response without a score.
    """
    bare = [group_without_tokens(group) for group in comparisons]
    scores: list[list[float]] = []
    for group, row in zip(comparisons, scorer.score(bare), strict=True):
        scores.append([])
        for outputs in row:
            if isinstance(outputs, str):
                raise InputError(f"{group.id}: the reward model gave no score: {outputs}")
            scores[-1].append(sum(weight * outputs[name] for name, weight in scorer.outputs.items()))
    lengths = [
        [
            len(scorer.tokenizer(response_text(r.text), add_special_tokens=False)["input_ids"])
            for r in g.responses
        ]
        for g in comparisons
    ]
    return _pairs(comparisons, lengths, scores)


def held_out_report(
    rm: ScalarModel, comparisons: Sequence[Group], max_tokens: int = 16384, *, seed: int = 0
) -> dict[str, Any]:
    """:func:`~trimtab.evaluation.reward_model.reward_model_report` of a model in training."""
    return reward_model_report(held_out_scores(rm, comparisons, max_tokens), seed=seed)


def scorer_report(scorer: RewardModel, comparisons: Sequence[Group], *, seed: int = 0) -> dict[str, Any]:
    """The report of a reward model as it is used, and how many responses were cut to its context."""
    before = scorer.facts()
    report = reward_model_report(scorer_scores(scorer, comparisons), seed=seed)
    cut = "reward_model_truncated"
    return report | {"truncated": int(scorer.facts().get(cut, 0) - before.get(cut, 0))}


def held_out_calibration(
    scorer: RewardModel, comparisons: Sequence[Group], *, seed: int = 0
) -> dict[str, Any]:
    """A temperature for the scores, fitted on half of the prompts and measured on the others.

    ``before`` and ``after`` each hold the bins of the reliability diagram, under ``reliability``.
    """
    fit, test = (scorer_scores(scorer, side) for side in halves(comparisons, seed))
    return calibration_split(_margins(fit), _margins(test), test.prompts, seed=seed)


def saved_calibration(scorer: RewardModel, comparisons: Sequence[Group]) -> dict[str, Any] | None:
    """What the temperature that a model was saved with makes of these pairs; None where it has none."""
    if scorer.calibration is None or scorer.temperature != 1.0:
        return None
    found = calibration_figures(_margins(scorer_scores(scorer, comparisons)), temperature=scorer.calibration)
    return {"temperature": scorer.calibration, **found}


def _margins(pairs: PairScores) -> Floats:
    return np.asarray(pairs.chosen, np.float64) - np.asarray(pairs.rejected, np.float64)


def rating_report(
    rm: ScalarModel,
    groups: Sequence[Group],
    names: Sequence[str],
    origin: float,
    unit: float,
    max_tokens: int = 16384,
) -> dict[str, float]:
    """Of each attribute's known ratings, in their own unit: mean absolute and squared error, correlation.

    ``mean_squared_error`` is over all attributes. A correlation without spread is left out.
    """
    rows = torch.cat(group_scores(rm, groups, max_tokens)) * unit + origin
    responses = [response for group in groups for response in group.responses]
    found, squares = dict[str, float](), list[float]()
    for a, name in enumerate(names):
        known = [
            (float(row[a]), r.ratings[name])
            for row, r in zip(rows, responses, strict=True)
            if r.ratings and name in r.ratings
        ]
        if not known:
            continue
        said, given = (np.asarray(side, np.float64) for side in zip(*known, strict=True))
        squares += np.square(said - given).tolist()
        found[f"error_{name}"] = float(np.abs(said - given).mean())
        if (value := correlation(said, given)) is not None:
            found[f"correlation_{name}"] = value
    return {"mean_squared_error": sum(squares) / len(squares), **found}


def step_report(rm: ScalarModel, groups: Sequence[Group], max_tokens: int = 16384) -> dict[str, float]:
    """Of responses in labelled steps: log loss a step, step accuracy, and where the first error is found.

    ``first_error_accuracy`` is over responses, ``…_wrong`` over those with an error, ``…_right`` over those
    without, and ``first_error_f1`` is the harmonic mean of the two (ProcessBench; Zheng et al., 2024). What
    has no response is left out.
    """
    budget = max([max_tokens, *(group_tokens(group, rm.layout) for group in groups)])

    def judged(part: Part) -> list[list[float]]:
        responses = [response for group in part.groups for response in group.responses]
        logits_NS, mask_NS = rm.step_logits(part.batch, responses)
        labels_NS = step_labels(responses, logits_NS)
        right_NS, found_N, wrong_N = step_figures(logits_NS, labels_NS, mask_NS)
        loss_N = step_loss(logits_NS, labels_NS, mask_NS).double().sum(-1)
        columns = (loss_N, right_NS.double().sum(-1), mask_NS.sum(-1), found_N > 0, wrong_N)
        return torch.stack([column.double() for column in columns], -1).tolist()

    loss, right, steps, found, wrong = zip(*numbers(rm, groups, budget, judged), strict=True)
    report = {
        "loss": sum(loss) / sum(steps),
        "step_accuracy": sum(right) / sum(steps),
        "first_error_accuracy": sum(found) / len(found),
    }
    for name, side in (("wrong", 1.0), ("right", 0.0)):
        if own := [f for f, w in zip(found, wrong, strict=True) if w == side]:
            report[f"first_error_accuracy_{name}"] = sum(own) / len(own)
    both = [v for k, v in report.items() if k.startswith("first_error_accuracy_")]
    if len(both) == 2:
        report["first_error_f1"] = 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0
    return report


def group_without_tokens(group: Group) -> Group:
    """The text of a group alone: token ids of one tokenizer mean nothing to another."""
    plain = group.to_dict() | {"prompt_tokens": None}
    plain["responses"] = [r | {"tokens": None, "mask": None} for r in plain["responses"]]
    return Group.from_dict(plain)


def _texts(group: Group) -> list[str]:
    return [response_text(response.text) for response in group.responses]


def _pairs(
    comparisons: Sequence[Group], lengths: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]
) -> PairScores:
    return PairScores.from_groups(
        [prompt_text(group.prompt) or group.id for group in comparisons],
        scores,
        [[response.rank for response in group.responses] for group in comparisons],
        lengths,
    )
