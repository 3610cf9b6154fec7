"""Estimators of KL(π‖π_ref) from samples of π, and what each does as a loss (Schulman, 2020).

With d = log π(y) − log π_ref(y):

    k1 = d                    unbiased, can be negative; its plain gradient is zero in expectation
    k2 = d² / 2               biased, gradient = that of the reverse KL(π‖π_ref) on policy
    k3 = e^(−d) + d − 1       unbiased, never negative; gradient = that of KL(π_ref‖π) on policy

So as a *loss* k2 and k3 pull to different optima: k2 to π_ref·exp(r/β′)/Z, k3 to β′·π_ref/(λ − r).
Inside the *reward* (detached) k1 alone has the reverse KL's gradient, at β itself whatever the baseline. A
detached k3 has that of KL(π‖π_ref) − KL(π_ref‖π), a detached k2 that of E_π[d²/2] − KL(π‖π_ref): both vanish
near π_ref and let answers die out.
"""

from __future__ import annotations

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]


def kl_estimate(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, estimator: Estimator = "k3"
) -> torch.Tensor:
    """Elementwise estimate in nats, any shape. Differentiable in ``policy_logps``; detach it for a reward.

    Raises ValueError for an unknown estimator.
    """
    d = policy_logps - ref_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


def kl_loss(
    policy_logps_NT: torch.Tensor,
    ref_logps_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    *,
    estimator: Estimator = "k3",
    level: Level = "token",
) -> torch.Tensor:
    """The KL term of a policy loss, ``[N, T]``, 0 where nothing counts.

    "token": the estimator of each token's own conditional. It drops the KL that later tokens incur, so
    for responses of several tokens its optimum follows a backward recursion, not the sequence formula.
    "sequence": the estimator of the whole response's log-ratio, placed on its first counted token so
    that a sum over tokens is the sequence's estimate.
    """
    if level == "token":
        return kl_estimate(policy_logps_NT, ref_logps_NT, estimator).masked_fill(~mask_NT, 0.0)
    if level != "sequence":
        raise ValueError(f"unknown KL level {level!r}: token or sequence")
    policy_N = policy_logps_NT.masked_fill(~mask_NT, 0.0).sum(-1)
    ref_N = ref_logps_NT.masked_fill(~mask_NT, 0.0).sum(-1)
    first = mask_NT & (mask_NT.cumsum(-1) == 1)
    return kl_estimate(policy_N, ref_N, estimator)[:, None] * first
