"""Token rewards, generalised advantages, whitening and the critic's loss: what PPO adds to a policy loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.objectives.kl import Estimator, kl_estimate


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of all rewards seen so far, in one pass (Chan, Golub and LeVeque, 1979).

    >>> Moments().seeing([1.0, 3.0]).seeing([5.0]).mean
    3.0
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Σ(x − mean)² over what was seen."""

    @property
    def std(self) -> float:
        """The sample's standard deviation, ÷(n − 1); 0 of fewer than two."""
        return float((self.squares / max(self.count - 1, 1)) ** 0.5)

    def seeing(self, values: list[float]) -> Moments:
        """These moments and those of ``values`` together. ValueError for a value that is not finite."""
        new = torch.tensor(values, dtype=torch.float64)
        if not bool(new.isfinite().all()):
            raise ValueError("a reward is not a finite number")
        if not len(new):
            return self
        mean, total = float(new.mean()), self.count + len(new)
        gap = mean - self.mean
        squares = float((new - mean).square().sum()) + gap * gap * self.count * len(new) / total
        return Moments(total, self.mean + gap * len(new) / total, self.squares + squares)

    def scaled(self, values_N: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
        """(x − mean)/√(var + ε), any shape: equal rewards become 0, not noise blown up."""
        return (values_N - self.mean) / (self.std**2 + eps) ** 0.5


@torch.no_grad()
def token_rewards(
    rewards_N: torch.Tensor,
    policy_logps_NT: torch.Tensor,
    ref_logps_NT: torch.Tensor | None,
    mask_NT: torch.Tensor,
    *,
    beta: float,
    estimator: Estimator = "k1",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reward of each token (Ziegler et al., 2019, eq. 2; Stiennon et al., 2020, section 3.4).

        kl_t = log π(y_t) − log π_ref(y_t)                          the k1 estimate, in nats
        r_t  = −β·kl_t,  and the response's own reward is added at its last counted token

    The KL is taken from the reward: a token that π likes better than π_ref costs. The sum over a response
    is r(x, y) − β·log(π(y)/π_ref(y)), so with γ = λ = 1 the KL acts on the whole response. The last counted
    token is the last True of ``mask_NT``, whatever holes come before it. A response without a counted token
    has no place for its reward and gets none.

    ``estimator`` "k2" or "k3" takes that estimate in kl_t's place, as TRL (k3) and OpenRLHF and verl (both)
    can. Those are never negative, so a token that π likes *less* costs, too. The gradient is then no longer
    that of the KL. On one token a response, with d = log π − log π_ref, it ascends

        k2:  E[r] − β·(E_π[d²/2] − KL(π‖π_ref))          k3:  E[r] − β·(KL(π‖π_ref) − KL(π_ref‖π))

    whose penalties are flat (of third order) around π_ref, and under which an answer that has fallen below
    its π_ref is pushed further down.

    Returns (rewards, kl), each ``[N, T]``, 0 where ``mask_NT`` is False, without gradient. ``ref_logps_NT =
    None`` means no KL and needs β = 0, else ValueError.
    """
    if ref_logps_NT is None:
        if beta != 0.0:
            raise ValueError("beta is not 0 but no reference log-probabilities were given")
        kl_NT = torch.zeros_like(policy_logps_NT)
    else:
        kl_NT = kl_estimate(policy_logps_NT, ref_logps_NT, estimator).masked_fill(~mask_NT, 0.0)
    # Counting from the end, the last counted token is the first one seen.
    last_NT = mask_NT & (mask_NT.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last_NT, rewards_N[:, None], 0.0) - beta * kl_NT, kl_NT


@torch.no_grad()
def gae(
    token_rewards_NT: torch.Tensor,
    values_NT: torch.Tensor,
    mask_NT: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (GAE; Schulman et al., 2016, eq. 16).

        δ_t = r_t + γ·V(s_{t+1}) − V(s_t)
        Â_t = Σ_l (γλ)^l·δ_{t+l} = δ_t + γλ·Â_{t+1}
        R_t = Â_t + V(s_t)                                the critic's target, the TD(λ) return

    ``values_NT[n, t]`` is the value of the state *before* token t, and the state after the last counted
    token is terminal: its value is 0. Time runs over counted tokens only: a hole in ``mask_NT`` (the output
    of a tool, say) passes the later advantage and value through, undiscounted.
    λ = 1 has no bias from the critic and the most variance, λ = 0 is δ_t.

    Returns (advantages, returns), each ``[N, T]``, 0 where ``mask_NT`` is False, without gradient. What
    stands at uncounted positions is never read.
    """
    advantages_NT, returns_NT = torch.zeros_like(values_NT), torch.zeros_like(values_NT)
    next_value_N = values_NT.new_zeros(values_NT.shape[0])
    advantage_N = torch.zeros_like(next_value_N)
    for t in reversed(range(values_NT.shape[1])):
        counts_N, value_N = mask_NT[:, t], values_NT[:, t]
        delta_N = token_rewards_NT[:, t] + gamma * next_value_N - value_N
        advantage_N = torch.where(counts_N, delta_N + gamma * lam * advantage_N, advantage_N)
        next_value_N = torch.where(counts_N, value_N, next_value_N)
        advantages_NT[:, t] = advantage_N.masked_fill(~counts_N, 0.0)
        returns_NT[:, t] = (advantage_N + value_N).masked_fill(~counts_N, 0.0)
    return advantages_NT, returns_NT


def whiten(
    values_NT: torch.Tensor, mask_NT: torch.Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> torch.Tensor:
    """Mean 0 and variance 1 over all counted entries of the tensor, ``[N, T]``; 0 where nothing counts.

        (x − mean)/√(var + eps),   var = Σ(x − mean)²/(n − 1)

    The variance is that of a sample, ÷(n − 1), as in TRL, verl, torchtune and SkyRL (xtuner divides by n).
    ``shift_mean=False`` scales around the mean and leaves the mean as it was (TRL's and verl's polarity;
    torchtune's is the opposite). One entry alone, or equal entries, have variance 0 and become 0 (the mean,
    with ``shift_mean=False``).

    The entries depend on each other: give it a whole rollout, or how it is split changes the result.
    """
    counted = values_NT[mask_NT]
    if not counted.numel():
        return torch.zeros_like(values_NT)
    # One entry as the origin changes nothing but the rounding: equal entries become exactly 0.
    origin = counted[0].detach()
    centred = counted - origin
    mean = centred.mean()
    centred = centred - mean
    variance = centred.square().sum() / max(counted.numel() - 1, 1)
    whitened = centred * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean + origin
    return torch.zeros_like(values_NT).masked_scatter(mask_NT, whitened)


def clipped_value_loss(
    values_NT: torch.Tensor, old_values_NT: torch.Tensor, returns_NT: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The critic's squared error, held near the old values (the PPO authors' code; Stiennon et al., 2020).

        V_clip = V_old + clip(V − V_old, −c, c)
        ℓ      = ½·max((V − R)², (V_clip − R)²)

    The larger of the two errors counts, so clipping takes gradient away only where the value has moved more
    than c towards its target. ``clip = inf`` is ½·(V − R)². ``old_`` and the returns carry no gradient;
    ∂ℓ/∂V = V − R where unclipped.

    Returns (loss, clipped) ``[N, T]``, unmasked; ``clipped`` is True where the clip removed the gradient.
    ValueError unless clip > 0.
    """
    if not clip > 0:
        raise ValueError(f"clip = {clip}: a value that may not move learns nothing; give a number above 0")
    old_values_NT, returns_NT = old_values_NT.detach(), returns_NT.detach()
    moved_NT = values_NT - old_values_NT
    free_NT = (values_NT - returns_NT).square()
    held_NT = (old_values_NT + moved_NT.clamp(-clip, clip) - returns_NT).square()
    # Inside the clip the two differ by rounding alone, which must not count as clipped.
    clipped_NT = (moved_NT.abs() > clip) & (held_NT > free_NT)
    return 0.5 * torch.where(clipped_NT, held_NT, free_NT), clipped_NT
