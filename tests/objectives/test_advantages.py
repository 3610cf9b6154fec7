"""Group-relative advantages, against literal loops and by enumeration of what they do to a gradient."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from trimtab.objectives.advantages import Baseline, group_advantages


def test_population_and_sample_standard_deviation_by_hand() -> None:
    # Rewards 1, 2, 3, 6: mean 3, deviations −2, −1, 0, 3, squares 14. ÷G: √3.5 = 1.8708, so the first is
    # −2/1.8708 = −1.0690. ÷(G−1): √4.6667 = 2.1602, −0.9258. The other one by mistake: 15 % off.
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)
    population = group_advantages(rewards, scale="std", eps=0.0)[0].tolist()
    sample = group_advantages(rewards, scale="std_unbiased", eps=0.0)[0].tolist()
    assert population == pytest.approx([-1.0690, -0.5345, 0.0, 1.6036], abs=5e-5)
    assert sample == pytest.approx([-0.9258, -0.4629, 0.0, 1.3887], abs=5e-5)
    assert group_advantages(rewards, scale="none")[0].tolist() == [-2.0, -1.0, 0.0, 3.0]


def test_eps_is_added_to_the_deviation() -> None:
    # Rewards 0 and 1: deviation 0.5; eps 0.5 halves the advantage ±1. Under the root it would be ±0.5774.
    got = group_advantages(torch.tensor([[0.0, 1.0]], dtype=torch.float64), eps=0.5)
    assert got[0].tolist() == pytest.approx([-0.5, 0.5])


def test_leave_one_out_by_hand() -> None:
    # Of two responses each is compared with the other: 5.1 − 6.8 = −1.7. The group's mean would give −0.85.
    rewards = torch.tensor([[5.1, 6.8]], dtype=torch.float64)
    got = group_advantages(rewards, baseline="leave_one_out", scale="none")
    assert got[0].tolist() == pytest.approx([-1.7, 1.7])


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    draw = random.Random(0)
    for size in (2, 3, 7):
        rewards = [[draw.uniform(-5, 5) for _ in range(size)] for _ in range(4)]
        got = group_advantages(
            torch.tensor(rewards, dtype=torch.float64), baseline="leave_one_out", scale="none"
        )
        for row, answer in zip(rewards, got.tolist(), strict=True):
            for i, reward in enumerate(row):
                others = [other for j, other in enumerate(row) if j != i]
                assert answer[i] == pytest.approx(reward - sum(others) / len(others), abs=1e-12)


@pytest.mark.parametrize("scale", ["none", "std", "std_unbiased"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(baseline: Baseline, scale: str) -> None:
    # In fp32 the mean of three times 1000.1 is not 1000.1; divided by eps the rounding would be no rounding.
    rewards = torch.full((1, 3), 1000.1)
    naive = (rewards - rewards.mean(-1, keepdim=True)) / 1e-4
    assert naive.abs().max() > 0.1
    got = group_advantages(rewards, baseline=baseline, scale=scale)  # type: ignore[arg-type]
    assert got.tolist() == [[0.0, 0.0, 0.0]]


def test_groups_do_not_mix() -> None:
    rewards = torch.tensor([[0.0, 1.0], [10.0, 30.0]], dtype=torch.float64)
    together = group_advantages(rewards)
    for row in range(2):
        assert torch.equal(together[row : row + 1], group_advantages(rewards[row : row + 1]))
    # Normalised over the whole batch both of the first group's would be negative.
    assert together[0, 1] > 0.99


def test_shift_changes_nothing_and_a_scaled_advantage_ignores_the_rewards_unit() -> None:
    rewards = torch.tensor([[0.2, 0.9, 0.4]], dtype=torch.float64)
    plain = group_advantages(rewards, eps=0.0)
    assert torch.allclose(group_advantages(rewards * 50 + 7, eps=0.0), plain, atol=1e-12)


def expected_gradient(baseline: Baseline, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E[Σ_i A_i ∇log π(y_i) / G] over every group of ``size`` draws from 3 actions, and ∇E[r]."""
    logits = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * rewards).sum(), logits, retain_graph=True)
    total = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=size):
        picks = list(drawn)
        advantages = group_advantages(rewards[picks][None], baseline=baseline, scale="none")[0]
        (gradient,) = torch.autograd.grad((advantages * logp[picks]).mean(), logits, retain_graph=True)
        total += math.exp(sum(logp[i].item() for i in picks)) * gradient
    return total, exact


@pytest.mark.parametrize("size", [2, 4])
def test_the_group_mean_shrinks_the_gradient_and_leave_one_out_does_not(size: int) -> None:
    got, exact = expected_gradient("leave_one_out", size)
    assert (got - exact).abs().max() < 1e-12
    got, exact = expected_gradient("group_mean", size)
    assert (got - (1 - 1 / size) * exact).abs().max() < 1e-12


def test_a_group_of_one_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="median"):
        group_advantages(torch.zeros(1, 2), baseline="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iqr"):
        group_advantages(torch.zeros(1, 2), scale="iqr")  # type: ignore[arg-type]
