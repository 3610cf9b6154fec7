"""Rankings of K responses: their options, their rectangle of scores, and what is shown of them.

``_K``: responses of a group, the longest group's number. A reward model's scores are rewards; a policy's
are β times log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.objectives.ranking import LARGEST_TIE, Ties, pairwise_ranking_loss, plackett_luce_loss


class RankingOptions(Section):
    """What is made of a ranking."""

    ties: Ties = Field(
        "exact", description="equal ranks: the exact marginal over their orders (no pair in pairs), or refuse"
    )
    top: int = Field(
        0, ge=0, description="only the first so many places count, the rest is tied below them; 0 all"
    )


@dataclass(slots=True)
class Rankings:
    """Groups of unequal size as one rectangle."""

    scores_PK: torch.Tensor
    """0 where there is no response."""
    ranks_PK: torch.Tensor
    mask_PK: torch.Tensor


def lay_out(groups: Sequence[Group], scores_N: torch.Tensor, top: int = 0) -> Rankings:
    """The scores of the groups' responses, in their order, beside their ranks.

    ``top``: ranks beyond it become one. Ranks are those of ``as_comparisons``, 1 + how many are better.
    """
    mask_PK = torch.zeros(len(groups), max(len(g.responses) for g in groups), dtype=torch.bool)
    ranks_PK = torch.zeros(mask_PK.shape, dtype=scores_N.dtype)
    for p, group in enumerate(groups):
        mask_PK[p, : len(group.responses)] = True
        ranks_PK[p, : len(group.responses)] = torch.tensor([float(r.rank or 0) for r in group.responses])
    if top:
        ranks_PK = ranks_PK.clamp(max=top + 1)
    mask_PK, ranks_PK = mask_PK.to(scores_N.device), ranks_PK.to(scores_N.device)
    return Rankings(scores_N.new_zeros(mask_PK.shape).masked_scatter(mask_PK, scores_N), ranks_PK, mask_PK)


def ranking_loss(
    found: Rankings,
    loss: str,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    margin_PKK: torch.Tensor | None = None,
    target_PKK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each group's loss ``[P]``: "pairs", their mean or their sum, or "listwise"."""
    if loss == "listwise":
        return plackett_luce_loss(found.scores_PK, found.ranks_PK, found.mask_PK)
    sum_P, pairs_P = pairwise_ranking_loss(
        found.scores_PK, found.ranks_PK, found.mask_PK, margin_PKK=margin_PKK, target_PKK=target_PKK
    )
    return sum_P / pairs_P if reduction == "mean" else sum_P


def pair_metrics(
    scores_PK: torch.Tensor, ranks_PK: torch.Tensor, mask_PK: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over each group's ordered pairs, ``[P]``: accuracy (equal scores ½), rewards, margin."""
    ordered_PKK = (ranks_PK[:, :, None] < ranks_PK[:, None, :]) & mask_PK[:, :, None] & mask_PK[:, None, :]
    margin_PKK = scores_PK[:, :, None] - scores_PK[:, None, :]
    pairs_P = ordered_PKK.sum((1, 2))
    right_PKK = (margin_PKK > 0).to(margin_PKK.dtype) + 0.5 * (margin_PKK == 0)

    def mean(values_PKK: torch.Tensor) -> torch.Tensor:
        return (values_PKK * ordered_PKK).sum((1, 2)) / pairs_P

    chosen_P = mean(scores_PK[:, :, None].expand_as(margin_PKK))
    rejected_P = mean(scores_PK[:, None, :].expand_as(margin_PKK))
    return {
        "accuracy": mean(right_PKK),
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "reward_margin": chosen_P - rejected_P,
        "reward_mean": scores_PK.sum(-1) / mask_PK.sum(-1),
    }


def group_weights(groups: Sequence[Group]) -> torch.Tensor:
    """The groups' weights ``[P]``."""
    return torch.tensor([group.weight for group in groups])


def check_ties(groups: Sequence[Group], options: RankingOptions, loss: str, section: str) -> None:
    """Refuse what the options do not allow, and a tie above the last place that is too large to sum over."""
    for group in groups:
        ranks = [float(r.rank or 0) for r in group.responses]
        if options.ties == "refuse" and len(set(ranks)) < len(ranks):
            raise InputError(
                f'{group.id}: two responses have one rank, which {section}.ties = "refuse" does not allow; '
                'use "exact", or order them'
            )
        if options.top:
            ranks = [min(rank, options.top + 1.0) for rank in ranks]
        above = [ranks.count(rank) for rank in set(ranks) - {max(ranks)}]
        if loss == "listwise" and max(above, default=1) > LARGEST_TIE:
            raise InputError(
                f"{group.id}: {max(above)} responses share one place above the last, and "
                f'{section}.loss = "listwise" takes at most {LARGEST_TIE}; use "pairs"'
            )
