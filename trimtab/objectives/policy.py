"""Policy-gradient objectives on sampled responses."""

from __future__ import annotations

import torch

from trimtab.objectives.kl import Estimator, Level, kl_loss


def clipped_policy_loss(
    policy_logps_NT: torch.Tensor,
    old_logps_NT: torch.Tensor,
    advantages_NT: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al., 2017, eq. 7), as a loss.

        ρ = exp(log π − log π_old)
        ℓ = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)

    Clipping only takes gradient away: it is no projection. ``old_`` and the advantages carry no gradient.
    ``advantages_NT`` broadcasts (``[N, 1]`` for one advantage a response).

    Returns (loss, clipped) ``[N, T]``; ``clipped`` is True where the clip removed the gradient.
    """
    advantages_NT = advantages_NT.detach()
    ratio = torch.exp(policy_logps_NT - old_logps_NT.detach())
    free = ratio * advantages_NT
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages_NT
    return -torch.minimum(free, held), held < free


def truncated_importance_weights(
    old_logps_NT: torch.Tensor, sampler_logps_NT: torch.Tensor, cap: float
) -> torch.Tensor:
    """min(π_old / π_sampler, cap) per token, detached ``[N, T]`` (Espeholt et al., 2018; Yao et al., 2025).

    Corrects for tokens that were not drawn from π_old itself: nucleus sampling, another precision, an
    older policy. 1 where the two agree.
    """
    return torch.exp(old_logps_NT - sampler_logps_NT).clamp(max=cap).detach()


def grpo_loss(
    policy_logps_NT: torch.Tensor,
    old_logps_NT: torch.Tensor,
    ref_logps_NT: torch.Tensor | None,
    advantages_N: torch.Tensor,
    mask_NT: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_level: Level = "token",
    importance_NT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group Relative Policy Optimization (DeepSeekMath, 2024, eq. 3): clipped surrogate + β·KL in the loss.

    One advantage per response, the same for each of its tokens. ``importance_NT`` multiplies the surrogate
    and the KL alike: both are expectations under the policy, and a weight on one of them alone would change
    β. ``ref_logps_NT = None`` leaves the KL term out and needs β = 0.

    Returns (loss, clipped, kl), each ``[N, T]`` and 0 or False where ``mask_NT`` is False; ``kl`` is the
    k3 estimate for the log, detached, 0 without a reference.
    """
    if ref_logps_NT is None and beta != 0.0:
        raise ValueError("beta is not 0 but no reference log-probabilities were given")
    loss, clipped = clipped_policy_loss(
        policy_logps_NT, old_logps_NT, advantages_N[:, None], clip_low=clip_low, clip_high=clip_high
    )
    shown = torch.zeros_like(loss)
    if ref_logps_NT is not None:
        shown = kl_loss(policy_logps_NT.detach(), ref_logps_NT, mask_NT, estimator="k3")
        if beta != 0.0:
            penalty = kl_loss(policy_logps_NT, ref_logps_NT, mask_NT, estimator=kl_estimator, level=kl_level)
            loss = loss + beta * penalty
    if importance_NT is not None:
        loss = loss * importance_NT
    return loss.masked_fill(~mask_NT, 0.0), clipped & mask_NT, shown
