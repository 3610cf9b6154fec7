"""What a reward model in memory gives tokenised groups, and how well it judges steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.data.collate import group_tokens
from trimtab.groups import Group, Response
from trimtab.models.scalar_model import ScalarModel
from trimtab.spread.deal import numbers


def group_scores(rm: ScalarModel, groups: Sequence[Group], max_tokens: int) -> list[torch.Tensor]:
    """Every group's outputs ``[K, outputs]``, float64 on the CPU, in the order of the groups.

    ``max_tokens`` are computed at once; a single group that is longer is computed alone.
    """
    budget = max([max_tokens, *(group_tokens(group, rm.layout) for group in groups)])
    rows = numbers(rm, groups, budget, lambda part: rm.scores(part.batch).double().tolist())
    found = torch.tensor(rows, dtype=torch.float64)
    return list(found.split([len(group.responses) for group in groups]))


def step_figures(
    logits_NS: torch.Tensor, labels_NS: torch.Tensor, mask_NS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which steps are judged right, ``[N, S]``, which responses' first error is found, and which have one.

    A step is said to be right where σ(logit) > ½, and is right where its label is; a logit of 0 or a label of
    ½ says nothing and counts ½. The first error is found where the first step with a logit below 0 is the
    first with a label below ½, or there is neither (as ProcessBench counts it; Zheng et al., 2024).
    """
    said_NS, true_NS = logits_NS.sign(), (labels_NS - 0.5).sign()
    right_NS = ((1 + said_NS * true_NS) / 2).masked_fill(~mask_NS, 0.0)

    def first(sign_NS: torch.Tensor) -> torch.Tensor:
        wrong_NS = (sign_NS < 0) & mask_NS
        # The first of the largest: with a True column behind all steps that is the first error, or none.
        return torch.cat([wrong_NS, torch.ones_like(wrong_NS[:, :1])], 1).int().argmax(1)

    return right_NS, (first(said_NS) == first(true_NS)).to(right_NS), ((true_NS < 0) & mask_NS).any(1)


def step_labels(responses: Sequence[Response], like_NS: torch.Tensor) -> torch.Tensor:
    """The labels of the responses' steps, ``[N, S]``, 0 where there is no step."""
    labels_NS = torch.zeros_like(like_NS)
    for n, response in enumerate(responses):
        labels = response.step_labels or []
        labels_NS[n, : len(labels)] = like_NS.new_tensor(labels)
    return labels_NS
