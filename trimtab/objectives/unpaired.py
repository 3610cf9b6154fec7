"""Losses on single responses with a label: good or bad, thumbs up or down, allow or deny."""

from __future__ import annotations

import torch


def kto_loss(
    policy_logps_N: torch.Tensor,
    ref_logps_N: torch.Tensor,
    desirable_N: torch.Tensor,
    z_ref: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024).

        h(y)  = log π(y|x) − log π_ref(y|x)
        v(y)  = λ_D·σ(β·(h(y) − z_ref))      desirable
                λ_U·σ(β·(z_ref − h(y)))      undesirable
        ℓ     = λ − v(y)                     λ_D or λ_U

    Log-probabilities of whole responses (sums over their tokens, nats), ``[N]``; ``desirable_N`` is boolean.
    ``z_ref`` is the baseline of :func:`mismatched_kl`, the same for the whole optimiser batch, or 0: then
    this is APO-zero (D'Oosterlinck et al., 2024) on unpaired responses.

    Returns (loss, reward β·h), each ``[N]``; the reward is detached, and so is z_ref. The gradient is
    ∂ℓ/∂log π(y) = ∓λ·β·s(1 − s), s = σ(β·(h − z_ref)): up for a desirable response, down for an undesirable
    one, and next to nothing at both ends, so that what is learned or hopeless is left alone.
    """
    gap_N = policy_logps_N - ref_logps_N
    away_N = beta * (gap_N - torch.as_tensor(z_ref, dtype=gap_N.dtype, device=gap_N.device).detach())
    value_N = torch.sigmoid(torch.where(desirable_N, away_N, -away_N))
    weight_N = torch.full_like(value_N, undesirable_weight).masked_fill(desirable_N, desirable_weight)
    return weight_N * (1 - value_N), (beta * gap_N).detach()


def mismatched_kl(policy_logps_M: torch.Tensor, ref_logps_M: torch.Tensor) -> torch.Tensor:
    """KTO's baseline z_ref, a scalar: a biased estimate of KL(π‖π_ref) (Ethayarajh et al., 2024).

        z_ref = max(0, Σ_i log(π(y_j|x_i) / π_ref(y_j|x_i)) / m),   j = i + 1, the last one's the first

    Each prompt with the next one's response, of all m of the optimiser batch; sums over tokens, nats.
    Detached. In real arithmetic it does not depend on how the batch is cut.
    """
    return (policy_logps_M.double() - ref_logps_M.double()).mean().clamp(min=0).detach()
