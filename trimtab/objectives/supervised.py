"""Supervised fine-tuning: the negative log-likelihood of the tokens that count."""

from __future__ import annotations

import torch


def sft_loss(policy_logps_NT: torch.Tensor) -> torch.Tensor:
    """ℓ[n, t] = −log π(y_t | x, y_<t), ``[N, T]``. Differentiable in ``policy_logps_NT``."""
    return -policy_logps_NT
