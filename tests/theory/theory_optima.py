"""What the objectives are known to converge to, computed without any code of the package.

With β′ the strength of the anchor once the baseline's own factor is taken out:

    reverse KL   KL(π‖π_ref)     π(y) = π_ref(y)·exp(r(y)/β′)/Z          k2 as a loss, k1 in the reward, DPO
    forward KL   KL(π_ref‖π)     π(y) = β′·π_ref(y)/(λ − r(y))           k3 as a loss

β′ = β·G/(G − 1) where the group's mean, which holds the sample itself, is the baseline of the reward alone;
β with a leave-one-out mean, and where the KL is inside the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Optimum = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(π_ref ``[Y]``, rewards ``[Y]``, β′) → π ``[Y]``, all over one finite set of answers."""

Answer = tuple[int, ...]
"""A response, as its tokens."""


def effective_beta(beta: float, group_size: int, baseline: str) -> float:
    """β′ of a KL term in the loss."""
    return beta * group_size / (group_size - 1) if baseline == "group_mean" else beta


def reverse_kl_optimum(ref: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """argmax E_π[r] − β·KL(π‖π_ref)."""
    return torch.softmax(ref.log() + rewards / beta, dim=-1)


def forward_kl_optimum(ref: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """argmax E_π[r] − β·KL(π_ref‖π); λ by bisection, since the sum over answers falls as λ rises."""
    low, high = rewards.max(), rewards.max() + beta  # at the upper end no answer exceeds its π_ref
    for _ in range(200):
        middle = (low + high) / 2
        if (beta * ref / (middle - rewards)).sum() > 1:
            low = middle
        else:
            high = middle
    return beta * ref / (high - rewards)


OPTIMA: dict[str, Optimum] = {"k2": reverse_kl_optimum, "k3": forward_kl_optimum}
"""By the estimator of the KL term in the loss."""


def token_level_optimum(
    ref_KV: torch.Tensor, rewards: Mapping[Answer, float], beta: float, optimum: Optimum
) -> torch.Tensor:
    """The optimum of token-level KL on responses of one or two tokens, in the order of ``rewards``.

    Row 0 of ``ref_KV`` is the reference's first token, row 1 + a the token after a. A token's own term sees
    the expected reward from there on, but not the KL of later tokens. So the last token is solved first, on
    the rewards, and then the first, on what the last will bring.
    """
    vocabulary = range(ref_KV.shape[1])
    second: dict[int, torch.Tensor] = {}
    values_V = torch.zeros_like(ref_KV[0])
    for a in vocabulary:
        if (a,) in rewards:
            values_V[a] = rewards[a,]
            continue
        rewards_V = torch.tensor([rewards[a, b] for b in vocabulary], dtype=ref_KV.dtype)
        second[a] = optimum(ref_KV[1 + a], rewards_V, beta)
        values_V[a] = (second[a] * rewards_V).sum()
    first_V = optimum(ref_KV[0], values_V, beta)
    return torch.stack([first_V[y[0]] * (second[y[0]][y[1]] if len(y) == 2 else 1.0) for y in rewards])


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    """½·Σ|p − q| between two distributions over the same answers."""
    assert p.shape == q.shape
    assert torch.allclose(torch.stack([p.sum(), q.sum()]), torch.ones(2, dtype=p.dtype), atol=1e-5)
    return 0.5 * float((p - q).abs().sum())
