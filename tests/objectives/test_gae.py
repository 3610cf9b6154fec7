"""Generalised advantages: by hand, against the sum that defines them, and over tokens that do not count."""

from __future__ import annotations

import itertools

import pytest
import torch

from trimtab.objectives.value import gae

NAN = float("nan")
CASES = list(itertools.product([1.0, 0.97, 0.5], [0.0, 0.3, 0.95, 1.0]))


def of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, values and mask: full, short, holes inside, a late start, one token, none. NaN where idle."""
    generator = torch.Generator().manual_seed(3)
    rows = ["111111", "110000", "100110", "001011", "010000", "000000"]
    mask = torch.tensor([[c == "1" for c in row] for row in rows])
    rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask


def rows(tensor: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """Each response's counted entries as plain numbers."""
    return [row[keep].tolist() for row, keep in zip(tensor, mask, strict=True)]


def double_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Σ_l (γλ)^l·δ_{t+l}, as it is printed."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v2 - v for r, v2, v in zip(rewards, after, values, strict=False)]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def lambda_returns(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """(1 − λ)·Σ_n λ^(n−1)·G^(n), the last n-step return taking all the weight that is left."""
    end, returns = len(rewards), []
    for t in range(end):
        steps = [
            sum(gamma**i * rewards[t + i] for i in range(n))
            + (gamma**n * values[t + n] if t + n < end else 0.0)
            for n in range(1, end - t + 1)
        ]
        weights = [(1 - lam) * lam**i for i in range(len(steps) - 1)] + [lam ** (len(steps) - 1)]
        assert sum(weights) == pytest.approx(1.0)
        returns.append(sum(w * g for w, g in zip(weights, steps, strict=True)))
    return returns


def test_gae_by_hand() -> None:
    # γ 0.9, λ 0.5, rewards 0 0 1, values 0.5 0.4 0.6; after the end the value is 0.
    #   δ = 0.9·0.4 − 0.5 = −0.14,   0.9·0.6 − 0.4 = 0.14,   1 − 0.6 = 0.4
    #   Â₃ = 0.4,   Â₂ = 0.14 + 0.45·0.4 = 0.32,   Â₁ = −0.14 + 0.45·0.32 = 0.004;   R = Â + V
    # λ in place of γλ: Â₂ = 0.34. γ forgotten at the value: δ₂ = 0.2, Â₂ = 0.38. The value in the padding (9)
    # taken for the state after the end: Â₃ = 1 + 8.1 − 0.6 = 8.5.
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(of([0.0, 0.0, 1.0, 7.0]), of([0.5, 0.4, 0.6, 9.0]), mask, gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.004, 0.32, 0.4, 0.0], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.504, 0.72, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), CASES)
def test_gae_is_the_double_sum(gamma: float, lam: float) -> None:
    rewards, values, mask = ragged()
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for got, r, v in zip(rows(advantages, mask), rows(rewards, mask), rows(values, mask), strict=True):
        assert got == pytest.approx(double_sum(r, v, gamma, lam), abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), CASES)
def test_returns_are_the_lambda_weighted_mean_of_n_step_returns(gamma: float, lam: float) -> None:
    rewards, values, mask = ragged()
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for got, r, v in zip(rows(returns, mask), rows(rewards, mask), rows(values, mask), strict=True):
        assert got == pytest.approx(lambda_returns(r, v, gamma, lam), abs=1e-12)


def test_lambda_0_is_the_temporal_difference() -> None:
    rewards, values, mask = ragged()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for got, r, v in zip(rows(advantages, mask), rows(rewards, mask), rows(values, mask), strict=True):
        assert got == pytest.approx([a + 0.9 * c - b for a, b, c in zip(r, v, [*v[1:], 0.0], strict=False)])


def test_lambda_1_returns_do_not_depend_on_the_critic() -> None:
    # γ = λ = 1: the reward still to come, whatever the values; with λ = 0.95 they would differ.
    rewards, values, mask = ragged()
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    _, others = gae(rewards, -3 * values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, others, atol=1e-12, rtol=0)
    for got, r in zip(rows(returns, mask), rows(rewards, mask), strict=True):
        assert got == pytest.approx([sum(r[t:]) for t in range(len(r))])
    biased = [gae(rewards, v, mask, gamma=1.0, lam=0.95)[1] for v in (values, -3 * values)]
    assert float((biased[0] - biased[1]).abs().max()) > 0.1


def test_uncounted_positions_are_zero_and_never_read() -> None:
    rewards, values, mask = ragged()
    filled = gae(rewards.nan_to_num(55.0), values.nan_to_num(-9.0), mask, gamma=0.9, lam=0.8)
    for got, other in zip(gae(rewards, values, mask, gamma=0.9, lam=0.8), filled, strict=True):
        assert torch.equal(got, other)
        assert not got[~mask].any()
        assert got.isfinite().all()


def test_a_hole_is_as_if_it_were_not_there() -> None:
    # Time does not pass in the hole: with γ = 0.5 a discounted one would change the first two advantages.
    mask = torch.tensor([[True, True, False, False, True]])
    holed = gae(of([1.0, 0.0, NAN, NAN, 2.0]), of([0.3, 0.2, NAN, NAN, 0.7]), mask, gamma=0.5, lam=0.9)
    closed = gae(of([1.0, 0.0, 2.0]), of([0.3, 0.2, 0.7]), mask[:, mask[0]], gamma=0.5, lam=0.9)
    for got, expected in zip(holed, closed, strict=True):
        assert got[mask].tolist() == expected[0].tolist()


def test_each_response_is_as_if_alone() -> None:
    rewards, values, mask = ragged()
    together = gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for n in range(len(mask)):
        alone = gae(rewards[n : n + 1], values[n : n + 1], mask[n : n + 1], gamma=0.97, lam=0.9)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[n], part[0])


def test_thousands_of_tokens_neither_overflow_nor_vanish() -> None:
    # A closed form with (γλ)^−t would overflow; a constant reward of 1 gives 1/(1 − γλ) far from the end.
    ones = torch.ones(1, 8192, dtype=torch.float64)
    advantages, _ = gae(ones, torch.zeros_like(ones), ones.bool(), gamma=1.0, lam=0.95)
    assert advantages[0, 0].item() == pytest.approx(20.0)
    assert advantages[0, -1].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_keeps_the_dtype_and_carries_no_gradient(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    for got in gae(torch.ones_like(values), values, torch.ones(2, 3).bool(), gamma=1.0, lam=0.9):
        assert got.dtype == dtype
        assert not got.requires_grad
