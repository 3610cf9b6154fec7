"""The only place that reduces: a SUM over a micro-batch, divided by a stated GLOBAL count.

The count is that of the whole optimiser batch (every micro-batch, accumulation step and rank), so
that how a batch is split never changes its gradient: partial results add up. A mean of means would not.

    token_mean      Σ over all tokens of all responses / number of tokens        (DAPO; SFT)
    response_mean   each response's mean over its tokens, / number of responses  (GRPO as published)
    response_sum    each response's sum over its tokens, / number of responses   (exact policy gradients)
    constant        Σ over all tokens / (number of responses · a constant length)  (Dr. GRPO)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

Reduction = Literal["token_mean", "response_mean", "response_sum", "constant"]


def global_count(masks_NT: Iterable[torch.Tensor], reduction: Reduction, *, constant: int = 1) -> float:
    """What the sums of one optimiser batch are divided by, from the masks of all its micro-batches.

    Responses without a single counted token count for nothing. With several ranks, add the ranks' counts.
    """
    tokens = responses = 0
    for mask in masks_NT:
        tokens += int(mask.sum())
        responses += int(mask.any(-1).sum())
    return count_of(tokens, responses, reduction, constant)


def count_of(tokens: int, responses: int, reduction: Reduction, constant: int = 1) -> float:
    """:func:`global_count` of so many counted tokens in so many responses."""
    if reduction == "token_mean":
        return float(tokens)
    if reduction in ("response_mean", "response_sum"):
        return float(responses)
    if reduction == "constant":
        return float(responses * constant)
    raise ValueError(f"unknown reduction {reduction!r}")


def reduce_tokens(
    loss_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    count: float,
    reduction: Reduction,
    *,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """This micro-batch's share of the loss: a scalar; the shares of all micro-batches add up to the loss.

    ``weights_N`` multiplies each response's share (the count stays that of the unweighted batch).
    """
    loss = loss_NT.masked_fill(~mask_NT, 0.0)
    if reduction == "response_mean":
        loss = loss / mask_NT.sum(-1, keepdim=True).clamp(min=1)
    if weights_N is not None:
        loss = loss * weights_N[:, None]
    return loss.sum() / max(count, 1.0)


def reduce_items(
    loss_P: torch.Tensor, count: float, *, weights_P: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ over items (pairs) / ``count``, the number of items in the whole optimiser batch."""
    if weights_P is not None:
        loss_P = loss_P * weights_P
    return loss_P.sum() / max(count, 1.0)


def response_sums(values_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
    """Σ_t over the tokens that count, ``[N]``: a response's log-probability from its tokens'."""
    return values_NT.masked_fill(~mask_NT, 0.0).sum(-1)
