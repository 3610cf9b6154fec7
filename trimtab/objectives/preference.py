"""Losses on preference pairs, each a function of two numbers a pair and of β.

    h(y) = log π(y|x) − log π_ref(y|x)        summed over the response's tokens, nats
    r̂(y) = β·h(y)                             the implicit reward
    Δ    = h(y_w) − h(y_l)                    y_w chosen, y_l rejected

``chosen_P`` and ``rejected_P`` are h of the two sides, ``[P]``, differentiable. In the reference-free form
they are log π alone; in the length-normalised one h (or log π) is divided by the response's number of tokens:
the caller decides, the formulas stay. Losses are unreduced, ``[P]``. Higher β holds closer to π_ref.

Left out on purpose: losses that compare a pair with others of its batch (AOT, BCO), whose value would depend
on how a batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F


def dpo_loss(
    policy_chosen_P: torch.Tensor,
    policy_rejected_P: torch.Tensor,
    ref_chosen_P: torch.Tensor | None,
    ref_rejected_P: torch.Tensor | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Direct Preference Optimization (Rafailov et al., 2023, eq. 7).

        r̂(y) = β·(log π(y|x) − log π_ref(y|x))          the implicit reward
        ℓ    = −log σ(r̂(y_w) − r̂(y_l))

    Arguments are log-probabilities of whole responses (sums over their tokens, nats), one per pair.
    ``ref_… = None`` is the reference-free form, r̂(y) = β·log π(y|x): it has no anchor and is not the
    canonical loss. A higher β holds the policy closer to the reference. ``label_smoothing``: see
    :func:`sigmoid_loss`.

    Returns (loss, chosen reward, rejected reward), each ``[P]``; the rewards are detached. The gradient is
    ∂ℓ/∂log π(y_w) = −β·σ(r̂(y_l) − r̂(y_w)), and its negative for y_l.
    """
    if (ref_chosen_P is None) != (ref_rejected_P is None):
        raise ValueError("give both reference log-probabilities or neither")
    chosen = policy_chosen_P if ref_chosen_P is None else policy_chosen_P - ref_chosen_P
    rejected = policy_rejected_P if ref_rejected_P is None else policy_rejected_P - ref_rejected_P
    loss = sigmoid_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return loss, (beta * chosen).detach(), (beta * rejected).detach()


def sigmoid_loss(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> torch.Tensor:
    """DPO's logistic loss, its conservative form, and SimPO's.

        ℓ = −(1 − ε)·log σ(βΔ − γ) − ε·log σ(−(βΔ − γ))

    ε = ``label_smoothing`` is the share of labels taken to be wrong (conservative DPO; Mitchell, 2023, "A
    note on DPO with noisy preferences & relationship to IPO", eq. 3): the loss then has a minimum at
    σ(βΔ) = 1 − ε instead of falling for ever. γ = ``gamma`` is the reward that the chosen response has to be
    ahead by (SimPO; Meng et al., 2024, eq. 6, where the sides are log π / number of tokens).

    ∂ℓ/∂h(y_w) = β·(σ(βΔ − γ) − (1 − ε)), and its negative for y_l.
    """
    logit = beta * (chosen_P - rejected_P)
    if gamma:
        logit = logit - gamma
    if not label_smoothing:
        return -F.logsigmoid(logit)
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def robust_loss(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """Robust DPO (Chowdhury et al., 2024): DPO's loss made unbiased under labels flipped with chance ε.

        ℓ = (−(1 − ε)·log σ(βΔ) + ε·log σ(−βΔ)) / (1 − 2ε)

    ε = ``label_smoothing`` < ½. Its mean over flips, (1 − ε)·ℓ(w, l) + ε·ℓ(l, w), is DPO's loss of the true
    pair. It differs from the conservative loss in the sign of the second term and the division, and it can
    be negative.

    ∂ℓ/∂h(y_w) = −β·((1 − ε)·σ(−βΔ) + ε·σ(βΔ)) / (1 − 2ε), and its negative for y_l: never 0.
    """
    logit = beta * (chosen_P - rejected_P)
    clean, flipped = -F.logsigmoid(logit), -F.logsigmoid(-logit)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """SLiC-HF's hinge (Zhao et al., 2023), on h as in RSO (Liu et al., 2023, "hinge-norm").

        ℓ = max(0, 1 − βΔ)

    SLiC-HF itself has no reference, and writes max(0, δ − Δ): that is the reference-free form with β = 1/δ,
    divided by β. ∂ℓ/∂h(y_w) = −β where βΔ < 1, else 0.
    """
    return torch.relu(1 - beta * (chosen_P - rejected_P))


def ipo_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Identity Preference Optimisation (Azar et al., 2023, eq. 17), β their τ.

        ℓ = (Δ − 1/(2β))²

    With sums over tokens as published. ∂ℓ/∂h(y_w) = 2·(Δ − 1/(2β)): beyond a gap of 1/(2β) it draws back.
    """
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def exo_loss(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float, label_smoothing: float
) -> torch.Tensor:
    """EXO on pairs (Ji et al., 2024): the reverse KL of the policy's own preference from the smoothed label.

        q = σ(βΔ),   ℓ = q·log(q / (1 − ε)) + (1 − q)·log((1 − q) / ε)

    ε = ``label_smoothing`` > 0; conservative DPO is the forward KL of the same two, without its constant. The
    minimum, 0, is at q = 1 − ε. ∂ℓ/∂h(y_w) = β·q(1 − q)·(βΔ − log((1 − ε)/ε)).
    """
    logit = beta * (chosen_P - rejected_P)
    q = torch.sigmoid(logit)
    chosen = F.logsigmoid(logit) - math.log1p(-label_smoothing)
    rejected = F.logsigmoid(-logit) - math.log(label_smoothing)
    return q * chosen + (1 - q) * rejected


def nca_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Noise contrastive alignment on pairs (Chen et al., 2024, "NCA").

        ℓ = −log σ(r̂_w) − ½·log σ(−r̂_w) − ½·log σ(−r̂_l)

    Not a function of Δ alone: it holds the chosen response's likelihood up.
    ∂ℓ/∂h(y_w) = β·(1.5·σ(r̂_w) − 1), ∂ℓ/∂h(y_l) = β·½·σ(r̂_l).
    """
    chosen, rejected = beta * chosen_P, beta * rejected_P
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def apo_zero_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Anchored preference optimisation, "zero" (D'Oosterlinck et al., 2024): one up, the other down.

        ℓ = 1 − σ(r̂_w) + σ(r̂_l)

    For chosen responses better than what the model says by itself. The paper's loss has no 1, which has no
    gradient. ∂ℓ/∂h(y_w) = −β·σ(r̂_w)(1 − σ(r̂_w)), ∂ℓ/∂h(y_l) = β·σ(r̂_l)(1 − σ(r̂_l)).
    """
    return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)


def apo_down_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Anchored preference optimisation, "down" (D'Oosterlinck et al., 2024): both down, one more.

        ℓ = σ(r̂_w) + 1 − σ(r̂_w − r̂_l)

    For chosen responses worse than what the model says by itself. With σ′ = σ(1 − σ),
    ∂ℓ/∂h(y_w) = β·(σ′(r̂_w) − σ′(r̂_w − r̂_l)), ∂ℓ/∂h(y_l) = β·σ′(r̂_w − r̂_l).
    """
    return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(beta * (chosen_P - rejected_P))


def sppo_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Self-play preference optimisation with hard labels (Wu et al., 2024, "SPPO"), β = 1/η.

        ℓ = (h(y_w) − 1/(2β))² + (h(y_l) + 1/(2β))²

    The paper's P(y beats π) is 1 for the winner and 0 for the loser, so η·(P − ½) is ±1/(2β).
    ∂ℓ/∂h(y_w) = 2·(h(y_w) − 1/(2β)), ∂ℓ/∂h(y_l) = 2·(h(y_l) + 1/(2β)).
    """
    half = 1 / (2 * beta)
    return (chosen_P - half).square() + (rejected_P + half).square()


def odds_ratio_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """ORPO's odds ratio term (Hong et al., 2024, eq. 7), times its weight β (their λ).

        odds(y) = p(y) / (1 − p(y)),   log p(y) = log π(y|x) / number of tokens
        ℓ       = −β·log σ(log odds(y_w) − log odds(y_l))

    The sides are log p, below 0. The paper adds the chosen response's negative log-likelihood.
    ∂ℓ/∂log p(y_w) = −β·σ(−log odds ratio) / (1 − p(y_w)); for y_l positive, with 1 − p(y_l).
    """
    return -beta * F.logsigmoid(log_odds(chosen_P) - log_odds(rejected_P))


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) from log p < 0, exact at both ends.

    log(1 − p) is log(−expm1(log p)) for p above ½ and log1p(−p) below. A response that is certain (log p = 0)
    has infinite odds: it counts as 1 − ε of its dtype, and has no gradient.
    """
    below = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near = torch.log(-torch.expm1(below))
    far = torch.log1p(-torch.exp(below))
    return below - torch.where(below > -math.log(2), near, far)


PAIR_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo": exo_loss,
    "nca": nca_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sppo": sppo_loss,
    "odds": odds_ratio_loss,
}
SMOOTHED = frozenset({"sigmoid", "robust", "exo"})
"""Those that take a ``label_smoothing``; all but the first need one above 0."""
ABSOLUTE = frozenset({"nca", "apo_zero", "apo_down", "sppo"})
"""Those that look at each side's h and not at Δ alone: without a reference they mean nothing."""
