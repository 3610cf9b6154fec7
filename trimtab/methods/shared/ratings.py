"""Regression on ratings, and the margins and soft labels of pairs: what is read besides ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.ratings import merit, pair_number
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.scalar_model import ScalarModel, read_about
from trimtab.objectives.scores import rating_loss


class FeedbackOptions(Section):
    """What pairs and ratings say beyond an order."""

    margin: float = Field(0.0, ge=0, description="gap between better and worse that every pair asks for")
    margin_column: str = Field("", description="column with the margin of a pair, a number or a word")
    margin_words: dict[str, float] = Field(
        {}, description="numbers of the words in margin_column: { slightly = 0.33, significantly = 1.0 }"
    )
    margin_per_rating: float = Field(
        0.0,
        ge=0,
        description="margin for each unit by which the ratings (or rewards) of two responses differ",
    )
    agreement_column: str = Field(
        "", description="column with the probability that the better of a pair is better: a soft label"
    )
    attributes: list[str] = Field(
        [], description="ratings that regression learns, an output each; empty: plain ratings, overall"
    )
    rating_origin: float = Field(0.0, description="the rating that a score of 0 stands for, in regression")
    rating_unit: float = Field(1.0, gt=0, description="difference in rating that a score of 1 stands for")

    def check_feedback(self, loss: str) -> None:
        """Raises ValueError for options that have no effect together."""
        margins = ["margin", "margin_column", "margin_per_rating", "agreement_column"]
        given = [name for name in margins if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[1]} has no effect beside {given[0]}; a pair has one of them")
        if given and loss != "pairs":
            raise ValueError(f'{given[0]} has no effect with loss = "{loss}"; use "pairs"')
        if self.margin_words and not self.margin_column:
            raise ValueError("margin_words has no effect without margin_column")
        of_ratings = ["attributes", "rating_origin"] + ["rating_unit"] * (self.rating_unit != 1.0)
        if loss != "regression" and (odd := [name for name in of_ratings if getattr(self, name)]):
            raise ValueError(f'{odd[0]} has no effect with loss = "{loss}"; use "regression"')
        if len(set(self.attributes)) < len(self.attributes) or "" in self.attributes:
            raise ValueError("attributes names one twice, or one without a name")


def margins_of(
    groups: Sequence[Group], options: FeedbackOptions, like_PK: torch.Tensor
) -> torch.Tensor | None:
    """What broadcasts to the margins ``[P, K, K]``, the better one first; None where none are asked for.

    Raises InputError, naming the row, for a row without what a margin is made of.
    """
    if options.margin:
        return like_PK.new_full((1, 1, 1), options.margin)
    if options.margin_column:
        words = options.margin_words
        column = [pair_number(group, options.margin_column, words=words) for group in groups]
        return like_PK.new_tensor(column)[:, None, None]
    if not options.margin_per_rating:
        return None
    merit_PK = torch.zeros_like(like_PK)
    for p, group in enumerate(groups):
        for k, response in enumerate(group.responses):
            value = merit(response)
            if value is None:
                raise InputError(
                    f"{group.id}: a response has no rating, which reward_model.margin_per_rating reads"
                )
            merit_PK[p, k] = value
    # Where ranks and ratings disagree no margin is asked for.
    return options.margin_per_rating * (merit_PK[:, :, None] - merit_PK[:, None, :]).clamp(min=0)


def targets_of(
    groups: Sequence[Group], options: FeedbackOptions, like_PK: torch.Tensor
) -> torch.Tensor | None:
    """The probability that the better one of a pair is better, ``[P, 1, 1]``; None for 1. As margins_of."""
    if not options.agreement_column:
        return None
    column = [pair_number(group, options.agreement_column, largest=1.0) for group in groups]
    return like_PK.new_tensor(column)[:, None, None]


def settle_outputs(rm: ScalarModel, names: Sequence[str], path: str) -> None:
    """Name the outputs. Raises InputError for a model whose head has others already."""
    labels = [str(rm.config.id2label.get(i, i)) for i in range(rm.outputs)]
    # An adapter's folder, and what is exported from it, names them in reward.json alone.
    named = read_about(path).get("outputs")
    if isinstance(named, list) and len(named) == len(labels):
        labels = [str(name) for name in named]
    if rm.outputs != len(names):
        raise InputError(
            f"model.path: {path} gives {rm.outputs} scores ({', '.join(labels)}), and "
            f"reward_model.attributes names {len(names)} ({', '.join(names)})"
        )
    unnamed = [f"LABEL_{i}" for i in range(len(names))]
    if len(names) > 1 and labels not in (unnamed, list(names)):
        raise InputError(
            f"model.path: the scores of {path} are {', '.join(labels)}: give reward_model.attributes in that "
            "order"
        )
    rm.config.id2label = dict(enumerate(names))
    rm.config.label2id = {name: i for i, name in enumerate(names)}


def ratings_of(
    groups: Sequence[Group], names: Sequence[str], options: FeedbackOptions, like_NA: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratings in the unit of the scores, and which are known, ``[N, A]``."""
    given: list[Mapping[str, float]] = [r.ratings or {} for group in groups for r in group.responses]
    rows = [[ratings.get(name, options.rating_origin) for name in names] for ratings in given]
    known = torch.tensor([[name in ratings for name in names] for ratings in given], device=like_NA.device)
    return (like_NA.new_tensor(rows) - options.rating_origin) / options.rating_unit, known


def known_ratings(groups: Sequence[Group]) -> int:
    """How many ratings there are."""
    return sum(len(r.ratings or {}) for group in groups for r in group.responses)


def rating_losses(
    rm: ScalarModel,
    groups: list[Group],
    batch: TreeBatch,
    names: Sequence[str],
    options: FeedbackOptions,
    *,
    share: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the groups' metrics ``[P]``.

    ``share`` is groups over known ratings of the whole optimiser batch: what is then divided by the number
    of groups is a mean over ratings, however the batch is cut.
    """
    scores_NA = rm.scores(batch)
    targets_NA, known_NA = ratings_of(groups, names, options, scores_NA)
    loss_NA = rating_loss(scores_NA, targets_NA, known_NA)
    gap_NA = (scores_NA.detach() - targets_NA).abs().masked_fill(~known_NA, 0.0) * options.rating_unit
    sizes = [len(group.responses) for group in groups]

    def by_group(values_NA: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in values_NA.split(sizes)])

    means_P = torch.stack([part.mean() for part in scores_NA.detach().split(sizes)])
    return share * by_group(loss_NA), {"rating_error": share * by_group(gap_NA), "reward_mean": means_P}
