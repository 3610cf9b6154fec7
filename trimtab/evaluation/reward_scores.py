"""Held-out comparisons → the scores of a reward model, for :mod:`trimtab.evaluation.reward_model` to judge.

Two ways in: a :class:`ScalarModel` on tokenised groups, as it stands while it is trained; and a
:class:`RewardModel`, the form in which rewards and judges are used, on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.data.collate import collate, group_tokens, microbatches
from trimtab.errors import InputError
from trimtab.evaluation.reward_model import PairScores, reward_model_report
from trimtab.groups import Group, prompt_text
from trimtab.models.scalar_model import ScalarModel
from trimtab.rewards.base import response_text
from trimtab.rewards.models import RewardModel


@torch.no_grad()
def held_out_scores(rm: ScalarModel, comparisons: Sequence[Group], max_tokens: int = 16384) -> PairScores:
    """Scores of tokenised, ranked groups (:func:`~trimtab.data.convert.as_comparisons`), as ordered pairs.

    ``max_tokens`` are computed at once; a single group that is longer is computed alone. The unit of the
    intervals is the prompt, so rows that share one count as one.
    """
    budget = max([max_tokens, *(group_tokens(group, rm.layout) for group in comparisons)])
    place = {id(group): g for g, group in enumerate(comparisons)}
    scores: list[list[float]] = [[] for _ in comparisons]
    for part in microbatches(comparisons, budget, layout=rm.layout):
        rows = iter(rm.scores(collate(part, layout=rm.layout, device=rm.device))[:, 0].double().tolist())
        for group in part:
            scores[place[id(group)]] = [next(rows) for _ in group.responses]
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
