"""Advantages from the rewards of a group."""

from __future__ import annotations

from typing import Literal

import torch

Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["none", "std", "std_unbiased"]


def group_advantages(
    rewards_PG: torch.Tensor,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "std",
    eps: float = 1e-4,
) -> torch.Tensor:
    """Rewards relative to the group, ``[P, G]``: A_i = (r_i − baseline_i) / scale.

    baseline "group_mean" (GRPO; DeepSeekMath, 2024, section 4.1.2) contains the sample itself, which
    scales the expected gradient by 1 − 1/G; "leave_one_out" (RLOO; Ahmadian et al., 2024, eq. 5) is the
    mean of the others and unbiased. scale "std" divides by the population standard deviation (÷G) of the
    group plus ``eps``, "std_unbiased" by the sample one (÷(G−1)), "none" by nothing (Dr. GRPO).

    A group with equal rewards has advantage 0. A group of one has no baseline: ValueError.
    """
    size = rewards_PG.shape[-1]
    if size < 2:
        raise ValueError("a group-relative advantage needs at least two responses a prompt")
    # Taking one response's reward as the origin changes no advantage, and makes equal rewards exactly 0: the
    # rounding of their mean, divided by eps, would be an advantage of 0.4 for three times 1000.1 in fp32.
    rewards_PG = rewards_PG - rewards_PG[..., :1]
    advantages = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    if baseline == "leave_one_out":
        # r_i − (Σ_j r_j − r_i)/(G−1) = (r_i − mean)·G/(G−1)
        advantages = advantages * (size / (size - 1))
    elif baseline != "group_mean":
        raise ValueError(f"unknown baseline {baseline!r}: group_mean or leave_one_out")
    if scale == "none":
        return advantages
    if scale not in ("std", "std_unbiased"):
        raise ValueError(f"unknown scale {scale!r}: none, std or std_unbiased")
    spread = rewards_PG.std(-1, keepdim=True, correction=0 if scale == "std" else 1)
    return advantages / (spread + eps)
