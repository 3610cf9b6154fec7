"""Advantages from the rewards of a group, of its steps, or of the whole rollout."""

from __future__ import annotations

from typing import Literal

import torch

Baseline = Literal["group_mean", "leave_one_out", "batch_mean"]
Scale = Literal["none", "std", "std_unbiased", "batch_std", "batch_reward_std", "batch_reward_std_unbiased"]


def group_advantages(
    rewards_PG: torch.Tensor,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "std",
    eps: float = 1e-4,
) -> torch.Tensor:
    """Rewards relative to the group, ``[P, G]``: A_i = (r_i − baseline_i) / scale.

    baseline "group_mean" (GRPO; DeepSeekMath, 2024, section 4.1.2) contains the sample itself, which
    scales the expected gradient by 1 − 1/G; "leave_one_out" (RLOO; Ahmadian et al., 2024) is the mean of
    the others and unbiased; "batch_mean" (REINFORCE++; Hu, 2025) is that of all P·G, so that an easy prompt's
    answers all count as good ones.

    scale "std" divides by the population standard deviation (÷G) of the group plus ``eps``, "std_unbiased"
    by the sample one (÷(G−1)), "none" by nothing (Dr. GRPO; Liu et al., 2025). "batch_std" (REINFORCE++)
    divides all by one number, the population deviation of the P·G advantages; "batch_reward_std" by that of
    the rewards, in which the prompts' own differences count too, "batch_reward_std_unbiased" by the sample
    one of those (÷(P·G − 1), TRL's).

    A group with equal rewards has advantage 0, unless the baseline is the batch's. A group of one has no
    baseline: ValueError.
    """
    size = rewards_PG.shape[-1]
    if size < 2:
        raise ValueError("a group-relative advantage needs at least two responses a prompt")
    # Taking one response's reward as the origin changes no advantage, and makes equal rewards exactly 0: the
    # rounding of their mean, divided by eps, would be an advantage of 0.4 for three times 1000.1 in fp32.
    across = rewards_PG - rewards_PG[:1, :1]
    rewards_PG = rewards_PG - rewards_PG[..., :1]
    advantages = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    if baseline == "leave_one_out":
        # r_i − (Σ_j r_j − r_i)/(G−1) = (r_i − mean)·G/(G−1)
        advantages = advantages * (size / (size - 1))
    elif baseline == "batch_mean":
        advantages = across - across.mean()
    elif baseline != "group_mean":
        raise ValueError(f"unknown baseline {baseline!r}: group_mean, leave_one_out or batch_mean")
    if scale == "none":
        return advantages
    if scale == "batch_std":
        return advantages / (advantages.std(correction=0) + eps)
    if scale in ("batch_reward_std", "batch_reward_std_unbiased"):
        return advantages / (across.std(correction=0 if scale == "batch_reward_std" else 1) + eps)
    if scale not in ("std", "std_unbiased"):
        raise ValueError(
            f"unknown scale {scale!r}: none, std, std_unbiased, batch_std, batch_reward_std or "
            "batch_reward_std_unbiased"
        )
    spread = rewards_PG.std(-1, keepdim=True, correction=0 if scale == "std" else 1)
    return advantages / (spread + eps)


def process_advantages(
    rewards_GK: torch.Tensor,
    ends_GK: torch.Tensor,
    steps_GK: torch.Tensor,
    length: int,
    *,
    scale: Scale = "std",
    eps: float = 1e-4,
) -> torch.Tensor:
    """Process supervision (DeepSeekMath, 2024, section 4.1.3): one group's advantages, ``[G, T]``.

        r̃_ij = (r_ij − mean(R)) / (std(R) + ε)       R: every step reward of every response of the group
        A_it = Σ_j r̃_ij over the steps j of response i that end at token t or later

    ``ends_GK`` is the index of step j's last token among the response's own, ``steps_GK`` True where there
    is such a step, T = ``length``. Tokens behind the last step have advantage 0. With one step, the whole
    response, it is the outcome's advantage.

    ``scale``: "std", "std_unbiased" or "none", of the group's steps. ValueError for another, and for a group
    of fewer than two steps, whose rewards can be compared with nothing.
    """
    count = int(steps_GK.sum())
    if count < 2:
        raise ValueError("process supervision compares the steps of a group: it needs at least two")
    if scale not in ("none", "std", "std_unbiased"):
        raise ValueError(f"process supervision has scale none, std or std_unbiased, not {scale!r}")
    # The origin: see group_advantages.
    rewards_GK = (rewards_GK - rewards_GK[steps_GK][0]).masked_fill(~steps_GK, 0.0)
    relative_GK = rewards_GK - rewards_GK.sum() / count
    if scale != "none":
        spread = rewards_GK[steps_GK].std(correction=0 if scale == "std" else 1)
        relative_GK = relative_GK / (spread + eps)
    relative_GK = relative_GK.masked_fill(~steps_GK, 0.0)
    token_T = torch.arange(length, device=rewards_GK.device)
    later_GKT = ends_GK[:, :, None] >= token_T
    return (relative_GK[:, :, None] * later_GKT).sum(1)


def overlong_punishment(lengths: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """Soft overlong punishment (DAPO; Yu et al., 2025, eq. 13), the shape of ``lengths``, from 0 to −1.

        0                                 |y| ≤ limit − buffer
        (limit − buffer − |y|) / buffer   up to the limit
        −1                                beyond it

    Lengths in tokens, the end token counted. Needs 0 < buffer ≤ limit: ValueError.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"the buffer of {buffer} tokens does not lie within the limit of {limit}")
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)
