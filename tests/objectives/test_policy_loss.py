"""The clipped surrogate, importance weights and GRPO's loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimtab.objectives.policy import clipped_policy_loss, relative_loss, truncated_importance_weights


def surrogate(ratio: float, advantage: float, **clip: float) -> tuple[float, float, bool]:
    """The surrogate (minus the loss), its gradient with respect to log π, and whether it was clipped."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage).double()
    loss, clipped = clipped_policy_loss(logp, old, advantages, **clip)
    (gradient,) = torch.autograd.grad(-loss.sum(), logp)
    return -loss.item(), gradient.item(), bool(clipped.item())


@pytest.mark.parametrize(
    ("ratio", "value", "gradient", "clipped"),
    [
        # A = +1.4, ε = 0.1: 1.4·r as long as r ≤ 1.1, then flat at 1.4·1.1 = 1.54.
        (0.35, 0.4900, 0.4900, False),  # a clip as projection would say 1.4·0.9 = 1.26 here
        (0.90, 1.2600, 1.2600, False),
        (1.00, 1.4000, 1.4000, False),
        (1.05, 1.4700, 1.4700, False),
        (1.11, 1.5400, 0.0000, True),
        (2.00, 1.5400, 0.0000, True),  # without the clip 2.8
    ],
)
def test_surrogate_of_a_positive_advantage(
    ratio: float, value: float, gradient: float, clipped: bool
) -> None:
    got = surrogate(ratio, 1.4, clip_low=0.1, clip_high=0.1)
    assert got == (pytest.approx(value, abs=5e-5), pytest.approx(gradient, abs=5e-5), clipped)


@pytest.mark.parametrize(
    ("ratio", "value", "gradient", "clipped"),
    [
        # A("new") = 5.1 − 6.8 = −1.7, ε = 0.1: flat at −1.7·0.9 = −1.53 below 0.9, then −1.7·r without end.
        (0.50, -1.5300, 0.0000, True),
        (0.95, -1.6150, -1.6150, False),
        (1.00, -1.7000, -1.7000, False),
        (2.00, -3.4000, -3.4000, False),  # max instead of min, or clipping both sides: −1.87
    ],
)
def test_surrogate_of_a_negative_advantage(
    ratio: float, value: float, gradient: float, clipped: bool
) -> None:
    got = surrogate(ratio, 5.1 - 6.8, clip_low=0.1, clip_high=0.1)
    assert got == (pytest.approx(value, abs=5e-5), pytest.approx(gradient, abs=5e-5), clipped)


def test_surrogate_has_two_separate_clips() -> None:
    # clip_high 0.28: flat at 1.28; clip_low 0.2: flat at −0.8. Swapped they would be 1.2 and −0.72.
    assert surrogate(1.5, 1.0, clip_low=0.2, clip_high=0.28)[0] == pytest.approx(1.28)
    assert surrogate(0.5, -1.0, clip_low=0.2, clip_high=0.28)[0] == pytest.approx(-0.80)


def test_surrogate_old_and_advantages_carry_no_gradient() -> None:
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss, _ = clipped_policy_loss(*tensors)
    loss.sum().backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_importance_weights_by_hand() -> None:
    # π_old/π_sampler = 0.5, 1 and 3; the cap 2 holds the last. The inverse would be 2, 1 and 0.33.
    old = torch.log(torch.tensor([[0.1, 0.4, 0.6]], dtype=torch.float64)).requires_grad_()
    weights = truncated_importance_weights(old, torch.log(torch.tensor([[0.2, 0.4, 0.2]]).double()), 2.0)
    assert weights[0].tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert not weights.requires_grad


def grpo(
    policy: torch.Tensor, mask: torch.Tensor | None = None, ref: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GRPO's loss with π_old = 1 everywhere and advantage 2."""
    mask = torch.ones(policy.shape, dtype=torch.bool) if mask is None else mask
    advantages = torch.full((policy.shape[0],), 2.0, dtype=torch.float64)
    return relative_loss(policy, torch.zeros_like(policy), ref, advantages, mask, **kwargs)


def test_grpo_by_hand() -> None:
    # A = 2, ε = 0.2, ratios 1.3 (clipped: −2·1.2 = −2.4) and 1 (−2). π/π_ref = 2 on both, so d = 0.6931,
    # k3 = 1/2 + 0.6931 − 1 = 0.1931; with β = 0.1: −2.4 + 0.0193 = −2.3807 and −1.9807.
    # KL added to the reward's side (a minus) would give −2.4193; k3 of −d, 2 − 0.6931 − 1 = 0.3069: −2.3693.
    policy = torch.tensor([[math.log(1.3), 0.0]], dtype=torch.float64)
    loss, clipped, kl = grpo(policy, ref=policy - math.log(2.0), beta=0.1)
    assert loss[0].tolist() == pytest.approx([-2.3807, -1.9807], abs=5e-5)
    assert clipped[0].tolist() == [True, False]
    assert kl[0].tolist() == pytest.approx([0.1931, 0.1931], abs=5e-5)


@pytest.mark.parametrize(("estimator", "value"), [("k1", 0.6931), ("k2", 0.2402), ("k3", 0.1931)])
def test_grpo_uses_the_estimator_it_is_given_and_logs_k3(estimator: str, value: float) -> None:
    policy = torch.zeros(1, 1, dtype=torch.float64)
    loss, _, kl = grpo(policy, ref=policy - math.log(2.0), beta=1.0, kl_estimator=estimator)
    assert loss.item() == pytest.approx(-2.0 + value, abs=5e-5)
    assert kl.item() == pytest.approx(0.1931, abs=5e-5)


def test_grpo_importance_weighs_surrogate_and_kl_alike() -> None:
    # (−2 + 0.1·0.1931)·0.5 = −0.9903. A weight on the surrogate alone would give −0.9807.
    policy = torch.zeros(1, 1, dtype=torch.float64)
    weights = torch.full((1, 1), 0.5, dtype=torch.float64)
    loss, *_ = grpo(policy, ref=policy - math.log(2.0), beta=0.1, importance_NT=weights)
    assert loss.item() == pytest.approx(-0.9903, abs=5e-5)


def test_grpo_sign_of_gradient() -> None:
    policy = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, *_ = relative_loss(policy, policy.detach(), None, advantages, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    # Descent raises the log-probability of the better response and lowers that of the worse, by A alone.
    assert gradient.tolist() == [[-1.0, -1.0], [1.0, 1.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_masked_tokens_change_nothing(level: str) -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    torch.manual_seed(0)
    clean = 0.1 * torch.randn(3, 2, 3, dtype=torch.float64)

    def run(junk: float) -> list[torch.Tensor]:
        policy, old, ref = (values.masked_fill(~mask, junk * (i + 1)) for i, values in enumerate(clean))
        policy.requires_grad_()
        weights = torch.ones(2, 3, dtype=torch.float64).masked_fill(~mask, junk)
        advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
        out = relative_loss(
            policy, old, ref, advantages, mask, beta=0.3, kl_level=level, importance_NT=weights
        )
        return [*out, *torch.autograd.grad(out[0].sum(), policy)]

    for quiet, loud in zip(run(0.0), run(7.0), strict=True):
        assert torch.equal(quiet, loud)
        assert not quiet[~mask].any()


def test_grpo_without_a_reference_refuses_beta_and_shows_no_kl() -> None:
    policy = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="reference"):
        grpo(policy, beta=0.1)
    assert grpo(policy)[2].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_grpo_gradcheck(estimator: str, level: str) -> None:
    # Unequal lengths, a response of one token, and ratios on every side of both clips.
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    ratios = [[0.5, 1.05, 1.6], [0.6, 1.5, 1.0], [0.93, 1.0, 1.0]]
    policy = torch.log(torch.tensor(ratios, dtype=torch.float64)).requires_grad_()
    ref = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    weights = torch.linspace(0.5, 1.5, 9, dtype=torch.float64).view(3, 3)

    def loss(policy_logps: torch.Tensor) -> torch.Tensor:
        return relative_loss(
            policy_logps,
            torch.zeros(3, 3, dtype=torch.float64),
            ref,
            advantages,
            mask,
            beta=0.3,
            kl_estimator=estimator,  # type: ignore[arg-type]
            kl_level=level,  # type: ignore[arg-type]
            importance_NT=weights,
        )[0]

    assert torch.autograd.gradcheck(loss, (policy,))
