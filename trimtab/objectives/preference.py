"""Losses on preference pairs."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def dpo_loss(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    ref_chosen_P: torch.Tensor | None,
    ref_rejected_P: torch.Tensor | None,
    *,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Direct Preference Optimization (Rafailov et al., 2023, eq. 7).

        r̂(y) = β·(log π(y|x) − log π_ref(y|x))          the implicit reward
        ℓ    = −log σ(r̂(y_w) − r̂(y_l))

    Arguments are log-probabilities of whole responses (sums over their tokens, nats), one per pair.
    ``ref_… = None`` is the reference-free form, r̂(y) = β·log π(y|x): it has no anchor and is not the
    canonical loss. A higher β holds the policy closer to the reference.

    Returns (loss, chosen reward, rejected reward), each ``[P]``; the rewards are detached. The gradient is
    ∂ℓ/∂log π(y_w) = −β·σ(r̂(y_l) − r̂(y_w)), and its negative for y_l.
    """
    if (ref_chosen_P is None) != (ref_rejected_P is None):
        raise ValueError("give both reference log-probabilities or neither")
    chosen = policy_chosen_P if ref_chosen_P is None else policy_chosen_P - ref_chosen_P
    rejected = policy_rejected_P if ref_rejected_P is None else policy_rejected_P - ref_rejected_P
    loss = -F.logsigmoid(beta * (chosen - rejected))
    return loss, (beta * chosen).detach(), (beta * rejected).detach()
