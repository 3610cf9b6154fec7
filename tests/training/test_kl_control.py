"""How β follows the measured KL."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trimtab.training.kl_control import Kind, next_beta


def step(beta: float, kl: float, kind: Kind = "adaptive", **changes: Any) -> float:
    """One step with target 0.1 nats a token, horizon 1000 and 50 items, starting at 0.2."""
    options: dict[str, Any] = {"start": 0.2, "target": 0.1, "horizon": 1000, "items": 50, **changes}
    return next_beta(beta, kl, kind=kind, **options)


@pytest.mark.parametrize("kl", [-1.0, 0.0, 0.1, 50.0, float("nan")])
def test_fixed_never_moves(kl: float) -> None:
    assert step(0.37, kl, "fixed") == 0.37


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (0.100, 0.3000),  # on target
        (
            0.110,
            0.3015,
        ),  # e = 0.1: 0.3·(1 + 0.1·0.05). With kl − target for e it would be 0.30015
        (0.200, 0.3030),  # e = 1, held at 0.2; unheld it would be 0.315
        (9.999, 0.3030),
        (0.095, 0.29925),  # e = −0.05
        (0.000, 0.2970),  # e = −1, held at −0.2; the sign turned round would raise β where the KL is small
        (-0.50, 0.2970),  # a k1 estimate can be negative
        (math.inf, 0.3030),
    ],
)
def test_adaptive_by_hand(kl: float, beta: float) -> None:
    assert step(0.3, kl) == pytest.approx(beta)


def test_adaptive_grows_by_at_most_e_to_the_fifth_over_a_horizon() -> None:
    # 20 rollouts of 50 items are one horizon: (1 + 0.2·0.05)^20 = 1.2202 < e^0.2 = 1.2214.
    beta = 1.0
    for _ in range(20):
        beta = step(beta, 5.0)
    assert beta == pytest.approx(1.2202, abs=5e-5)
    assert beta < math.exp(0.2)


@pytest.mark.parametrize("items", [1000, 5001, 10**9])
def test_adaptive_never_turns_beta_negative(items: int) -> None:
    # 1 − 0.2·5001/1000 is −0.0002: unbounded, β would change its sign and reward the KL.
    assert step(0.3, 0.0, items=items) == pytest.approx(0.24)
    assert step(0.3, 1.0, items=items) == pytest.approx(0.36)


def test_adaptive_resumes_from_one_number() -> None:
    kls = [0.3, 0.02, 0.14, 0.05, 0.11]
    whole, part = 0.2, 0.2
    for kl in kls:
        whole = step(whole, kl)
    for kl in kls[:2]:
        part = step(part, kl)
    saved = float(repr(part))
    for kl in kls[2:]:
        saved = step(saved, kl)
    assert saved == whole


def test_adaptive_holds_a_policy_at_its_target() -> None:
    # A policy whose KL is 0.02/β: it sits at the target 0.1 with β = 0.2, wherever control starts.
    for beta in (0.05, 1.5):
        for _ in range(400):
            beta = step(beta, 0.02 / beta, items=500)
        assert beta == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("kl", "beta"),
    [
        (-0.3, 0.20),  # below the target β stays where it started; it does not fall
        (0.05, 0.20),
        (0.10, 0.20),
        (0.15, 0.30),  # 0.2·(1 + 0.5)
        (0.40, 0.80),  # 0.2·(1 + 3)
        (5.00, 2.00),  # 0.2·(1 + 49) is held at ten times the start
        (math.inf, 2.00),
    ],
)
def test_linear_by_hand(kl: float, beta: float) -> None:
    assert step(99.0, kl, "linear") == pytest.approx(beta)


def test_linear_slope_and_cap() -> None:
    assert step(0.2, 0.15, "linear", slope=2.0) == pytest.approx(0.4)
    assert step(0.2, 5.0, "linear", most=3.0) == pytest.approx(0.6)


def test_linear_forgets_a_spike() -> None:
    spike = step(0.2, 0.4, "linear")
    assert spike == pytest.approx(0.8)
    assert step(spike, 0.1, "linear") == 0.2
    # Adaptive control would still be 0.8 there.
    assert step(spike, 0.1) == spike


@pytest.mark.parametrize("kind", ["adaptive", "linear"])
def test_a_kl_that_is_no_number_is_refused(kind: Kind) -> None:
    # min and max of NaN would quietly give ±0.2.
    with pytest.raises(ValueError, match="not a number"):
        step(0.2, float("nan"), kind)


@pytest.mark.parametrize("kind", ["adaptive", "linear"])
@pytest.mark.parametrize("changes", [{"target": 0.0}, {"target": -0.1}, {"horizon": 0}])
def test_targets_and_horizons_must_be_positive(kind: Kind, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        step(0.2, 0.1, kind, **changes)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="fixed, adaptive or linear"):
        step(0.2, 0.1, "sometimes")  # type: ignore[arg-type]
