"""Policy-gradient objectives on sampled responses: which ratio, which surrogate, and the KL beside it."""

from __future__ import annotations

from typing import Literal

import torch

from trimtab.objectives.kl import Estimator, Level, kl_loss

Ratio = Literal["token", "sequence", "sequence_token", "response"]
"""What π/π_old is taken of; see :func:`policy_ratio`."""
Surrogate = Literal["clip", "cispo", "reinforce"]
"""What is made of it; see :func:`relative_loss`."""


def policy_ratio(
    policy_logps_NT: torch.Tensor,
    old_logps_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    level: Ratio = "token",
) -> torch.Tensor:
    """π/π_old, ``[N, T]``; only what ``mask_NT`` counts enters it. ``old_`` carries no gradient.

        token            ρ_t = exp(log π(y_t) − log π_old(y_t))                        (PPO, GRPO)
        sequence         s = exp(mean_t (log π(y_t) − log π_old(y_t)))                  (GSPO, eq. 7)
        sequence_token   s_t = sg[s]·π(y_t)/sg[π(y_t)]: the value s, a gradient a token  (GSPO-token, eq. 14)
        response         exp(Σ_t (log π(y_t) − log π_old(y_t))): the exact weight of the whole response

    GSPO is Zheng et al., 2025. "sequence" and "response" stand in every column of their row; sg stops the
    gradient. With one token a response all four are the same. ValueError for an unknown level.
    """
    gap_NT = policy_logps_NT - old_logps_NT.detach()
    if level == "token":
        return torch.exp(gap_NT)
    total_N1 = gap_NT.masked_fill(~mask_NT, 0.0).sum(-1, keepdim=True)
    if level == "response":
        return torch.exp(total_N1).expand_as(gap_NT)
    mean_N1 = total_N1 / mask_NT.sum(-1, keepdim=True).clamp(min=1)
    if level == "sequence":
        return torch.exp(mean_N1).expand_as(gap_NT)
    if level == "sequence_token":
        return torch.exp(mean_N1.detach()) * torch.exp(policy_logps_NT - policy_logps_NT.detach())
    raise ValueError(f"unknown ratio {level!r}: token, sequence, sequence_token or response")


def clipped_surrogate(
    ratio_NT: torch.Tensor,
    advantages_NT: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """−min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) and where that took the gradient, each ``[N, T]``.

    Clipping only takes gradient away: it is no projection. ``dual_clip`` c > 1 (Ye et al., 2020) holds the
    surrogate of a negative advantage at c·A from below, so that a ratio above c has no gradient either;
    0 leaves it out. The advantages carry no gradient; they broadcast.
    """
    advantages_NT = advantages_NT.detach()
    free = ratio_NT * advantages_NT
    held = ratio_NT.clamp(1 - clip_low, 1 + clip_high) * advantages_NT
    surrogate, clipped = torch.minimum(free, held), held < free
    if dual_clip:
        floor = dual_clip * advantages_NT
        too_far = (advantages_NT < 0) & (surrogate < floor)
        surrogate, clipped = torch.where(too_far, floor, surrogate), clipped | too_far
    return -surrogate, clipped


def clipped_policy_loss(
    policy_logps_NT: torch.Tensor,
    old_logps_NT: torch.Tensor,
    advantages_NT: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al., 2017, eq. 7), as a loss.

        ρ = exp(log π − log π_old)
        ℓ = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)

    ``old_`` and the advantages carry no gradient. ``advantages_NT`` broadcasts (``[N, 1]`` for one advantage
    a response). ``dual_clip``: see :func:`clipped_surrogate`.

    Returns (loss, clipped) ``[N, T]``; ``clipped`` is True where the clip removed the gradient.
    """
    ratio = torch.exp(policy_logps_NT - old_logps_NT.detach())
    return clipped_surrogate(
        ratio, advantages_NT, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def clipped_weight_loss(
    policy_logps_NT: torch.Tensor,
    ratio_NT: torch.Tensor,
    advantages_NT: torch.Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (MiniMax, 2025, eq. 4 and 5): REINFORCE with a clipped importance weight.

        ℓ = −sg[clip(ρ, 1 − clip_low, 1 + clip_high)] · A · log π(y_t)

    No token loses its gradient −w·A·∇log π; a large ρ only weighs no more than the clip. ``clip_low`` 1 sets
    no lower bound. Returns (loss, clipped) ``[N, T]``; ``clipped`` is True where the weight was held.
    """
    ratio_NT = ratio_NT.detach()
    weight_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    return -weight_NT * advantages_NT.detach() * policy_logps_NT, weight_NT != ratio_NT


def truncated_importance_weights(
    old_logps_NT: torch.Tensor,
    sampler_logps_NT: torch.Tensor,
    cap: float,
    *,
    mask_NT: torch.Tensor | None = None,
    level: Ratio = "token",
) -> torch.Tensor:
    """min(π_old / π_sampler, cap), detached ``[N, T]`` (Espeholt et al., 2018; Yao et al., 2025).

    Corrects for tokens that were not drawn from π_old itself: nucleus sampling, another precision, an
    older policy. 1 where the two agree. ``level`` as the ratio's that it stands beside, which needs
    ``mask_NT`` unless it is a token's: the weight is then one for the response, the product over its tokens
    ("response") or their geometric mean ("sequence", "sequence_token").
    """
    if level == "token":
        return torch.exp(old_logps_NT - sampler_logps_NT).clamp(max=cap).detach()
    assert mask_NT is not None
    level = "sequence" if level == "sequence_token" else level
    return policy_ratio(old_logps_NT.detach(), sampler_logps_NT, mask_NT, level).clamp(max=cap)


def relative_loss(
    policy_logps_NT: torch.Tensor,
    old_logps_NT: torch.Tensor,
    ref_logps_NT: torch.Tensor | None,
    advantages: torch.Tensor,
    mask_NT: torch.Tensor,
    *,
    surrogate: Surrogate = "clip",
    ratio: Ratio = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    beta: float = 0.0,
    kl_estimator: Estimator = "k3",
    kl_level: Level = "token",
    kl_unbiased: bool = False,
    importance_NT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of the group-relative family: a surrogate + β·KL (GRPO: DeepSeekMath, 2024, eq. 3).

        clip        −min(ρ·A, clip(ρ)·A)                 GRPO, DAPO, GSPO; :func:`clipped_surrogate`
        cispo       −sg[clip(ρ)]·A·log π                 :func:`clipped_weight_loss`
        reinforce   −ρ·A, whose gradient is −ρ·A·∇log π  REINFORCE; on policy ρ = 1

    ``advantages`` ``[N]``, the same for each token of a response, or ``[N, T]``. A ratio of the whole
    "response" is one term a response, which stands on its first counted token, so that a sum over tokens is
    that term; "sequence" is repeated on each token, so that a mean over tokens is. ``importance_NT``
    multiplies the surrogate and the KL alike: both are expectations under the policy, and a weight on one of
    them alone would change β. ``ref_logps_NT = None`` leaves the KL term out and needs β = 0.

    ``kl_unbiased`` makes the KL term ρ·k (DeepSeek-V3.2, 2025; TRL's default), with ρ of the KL's own level
    and its gradient kept: an estimate of KL(π‖π_ref) from samples of π_old. As ∇(ρ·k) = ρ·(k·∇log π + ∇k), k1
    and k3 then have the gradient of that KL instead of none and of KL(π_ref‖π).

    Returns (loss, clipped, kl), each ``[N, T]`` and 0 or False where ``mask_NT`` is False; ``kl`` is the
    k3 estimate for the log, detached, 0 without a reference. ValueError for an unknown name.
    """
    if ref_logps_NT is None and beta != 0.0:
        raise ValueError("beta is not 0 but no reference log-probabilities were given")
    advantages_NT = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio_NT = policy_ratio(policy_logps_NT, old_logps_NT, mask_NT, ratio)
    clips = {"clip_low": clip_low, "clip_high": clip_high}
    if surrogate == "clip":
        loss, clipped = clipped_surrogate(ratio_NT, advantages_NT, dual_clip=dual_clip, **clips)
    elif surrogate == "cispo":
        loss, clipped = clipped_weight_loss(policy_logps_NT, ratio_NT, advantages_NT, **clips)
    elif surrogate == "reinforce":
        loss, clipped = -ratio_NT * advantages_NT.detach(), torch.zeros_like(mask_NT)
    else:
        raise ValueError(f"unknown surrogate {surrogate!r}: clip, cispo or reinforce")
    if ratio == "response":
        loss = loss.masked_fill(mask_NT.cumsum(-1) != 1, 0.0)
    shown = torch.zeros_like(loss)
    if ref_logps_NT is not None:
        shown = kl_loss(policy_logps_NT.detach(), ref_logps_NT, mask_NT, estimator="k3")
        if beta != 0.0:
            penalty = kl_loss(policy_logps_NT, ref_logps_NT, mask_NT, estimator=kl_estimator, level=kl_level)
            if kl_unbiased:
                of: Ratio = "token" if kl_level == "token" else "response"
                penalty = penalty * policy_ratio(policy_logps_NT, old_logps_NT, mask_NT, of)
            loss = loss + beta * penalty
    if importance_NT is not None:
        loss = loss * importance_NT
    return loss.masked_fill(~mask_NT, 0.0), clipped & mask_NT, shown
