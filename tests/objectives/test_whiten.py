"""Whitening over the counted entries of a whole rollout."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.value import whiten

NAN = float("nan")


def of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_whiten_by_hand() -> None:
    # 1, 2, 3: mean 2, Σ(x − 2)² = 2, ÷(n − 1) = 1. ÷n would give ±1.2247; with the 50 counted, the mean is
    # 14.
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = of([1.0, 50.0, 3.0], [NAN, 2.0, -7.0])
    assert whiten(values, mask).tolist() == [
        [pytest.approx(-1.0), 0.0, pytest.approx(1.0)],
        [0.0, pytest.approx(0.0), 0.0],
    ]


def test_the_mean_can_stay() -> None:
    # 2, 4, 6: mean 4, standard deviation 2, so −1, 0, 1 around 4. The mean scaled too would give 1, 2, 3.
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert whiten(of([2.0, 4.0, 6.0]), mask, shift_mean=False)[0].tolist() == pytest.approx([3.0, 4.0, 5.0])


def test_mean_0_and_variance_1_over_what_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 7 + 3 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    whitened = whiten(values, mask)
    assert whitened[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened[mask].var().item() == pytest.approx(1.0, abs=1e-6)
    assert not whitened[~mask].any()
    assert torch.equal(whiten(values.masked_fill(~mask, NAN), mask), whitened)


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, 0.0), (False, 4.0)])
def test_one_entry_is_no_nan(shift_mean: bool, expected: float) -> None:
    # ÷(n − 1) with n = 1 is 0/0.
    mask = torch.tensor([[False, True]])
    assert whiten(of([9.0, 4.0]), mask, shift_mean=shift_mean).tolist() == [[0.0, expected]]


def test_no_entry_at_all() -> None:
    assert whiten(of([NAN, 1.0]), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_equal_entries_are_exactly_0() -> None:
    values = torch.full((1, 3), 1000.1)
    assert not whiten(values, torch.ones(1, 3, dtype=torch.bool)).any()
    # The rounding of the mean, over a standard deviation of nothing but rounding, would be a real number.
    naive = (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
    assert float(naive.abs().max()) > 0.1


def test_order_and_sign_stay_and_scale_goes() -> None:
    values, mask = of([-2.0, 0.5, 1.0, 8.0]), torch.ones(1, 4, dtype=torch.bool)
    whitened = whiten(values, mask)
    assert whitened[0].diff().min() > 0
    torch.testing.assert_close(whiten(1000 * values + 5, mask), whitened)


def test_halves_whitened_apart_are_not_the_whole() -> None:
    # Why it is done over the whole rollout: half by half, a good and a bad response would look the same.
    values, mask = of([1.0, 2.0], [11.0, 12.0]), torch.ones(2, 2, dtype=torch.bool)
    whole = whiten(values, mask)
    apart = torch.cat([whiten(values[i : i + 1], mask[i : i + 1]) for i in range(2)])
    assert whole[0].max() < 0 < whole[1].min()
    assert torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert whiten(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=torch.bool)).dtype == dtype
