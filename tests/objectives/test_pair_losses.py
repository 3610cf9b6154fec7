"""The losses on pairs beside plain DPO. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimtab.objectives.preference import (
    ABSOLUTE,
    PAIR_LOSSES,
    SMOOTHED,
    dpo_loss,
    log_odds,
    odds_ratio_loss,
    sigmoid_loss,
)
from trimtab.objectives.reduce import response_sums

W, L, BETA = 1.0, -0.5, 0.1
"""h of the chosen and the rejected response: Δ = 1.5, r̂ = 0.1 and −0.05, βΔ = 0.15, σ(0.15) = 0.537430.

ln(1 + e^−0.15) = 0.620957 and ln(1 + e^0.15) = 0.770957.
"""
CASES: dict[str, tuple[dict[str, float], float, dict[str, float]]] = {
    # ε 0.1: 0.9·0.620957 + 0.1·0.770957. Ignored: 0.620957. The sign of robust's: 0.602207.
    "sigmoid": ({"label_smoothing": 0.1}, 0.635957, {"h(y_w)": 0.1 * (0.537430 - 0.9)}),
    # (0.9·0.620957 − 0.1·0.770957)/0.8. Not divided: 0.481766. Conservative: 0.635957.
    "robust": (
        {"label_smoothing": 0.1},
        0.602207,
        {"h(y_w)": -0.1 * (0.9 * 0.462570 + 0.1 * 0.537430) / 0.8},
    ),
    # 1 − 0.15. β forgotten: 0.
    "hinge": ({}, 0.85, {"h(y_w)": -0.1}),
    # (1.5 − 5)². With 1/β: 72.25. β within the difference as well: 23.5225.
    "ipo": ({}, 12.25, {"h(y_w)": 2 * (1.5 - 5)}),
    # ε 0.1: 0.537430·(−0.620957 + 0.105361) + 0.462570·(−0.770957 + 2.302585). The forward KL: 0.310874.
    "exo": (
        {"label_smoothing": 0.1},
        0.431388,
        {"h(y_w)": 0.1 * 0.537430 * 0.462570 * (0.15 - math.log(9))},
    ),
    # 0.644397 + ½·0.744397 + ½·0.668460. Without the halves: 2.057254.
    "nca": ({}, 1.350825, {"h(y_w)": 0.1 * (1.5 * 0.524979 - 1), "h(y_l)": 0.1 * 0.5 * 0.487503}),
    # 1 − 0.524979 + 0.487503. Of Δ, as in DPO: 1 − 0.537430 = 0.462570.
    "apo_zero": ({}, 0.962524, {"h(y_w)": -0.1 * 0.249376, "h(y_l)": 0.1 * 0.249844}),
    # 0.524979 + 1 − 0.537430.
    "apo_down": ({}, 0.987549, {"h(y_w)": 0.1 * (0.249376 - 0.248599), "h(y_l)": 0.1 * 0.248599}),
    # (1 − 5)² + (−0.5 + 5)². With 1/β: 171.25. Both towards +5: 46.25.
    "sppo": ({}, 36.25, {"h(y_w)": -8.0, "h(y_l)": 9.0}),
}


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(CASES))
def test_value_and_gradient_by_hand(name: str) -> None:
    more, value, gradients = CASES[name]
    chosen, rejected = of(W).requires_grad_(), of(L).requires_grad_()
    loss = PAIR_LOSSES[name](chosen, rejected, beta=BETA, **more)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(value, abs=2e-6)
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    found = {"h(y_w)": chosen.grad.item(), "h(y_l)": rejected.grad.item()}
    for side, wanted in gradients.items():
        assert found[side] == pytest.approx(wanted, abs=2e-6), side
    if name not in ABSOLUTE:
        # A function of the difference alone: the sides' gradients are each other's negative.
        assert found["h(y_l)"] == pytest.approx(-found["h(y_w)"], abs=1e-12)
    # Better is up with the chosen one ("down" has both fall) and down with the rejected one.
    assert found["h(y_l)"] > 0
    assert (found["h(y_w)"] < 0) == (name != "apo_down")


def test_every_loss_has_its_hand_value() -> None:
    assert set(PAIR_LOSSES) == set(CASES) | {"odds"}
    assert set(PAIR_LOSSES) >= SMOOTHED | ABSOLUTE


def test_smoothing_of_dpo_is_that_of_its_parts() -> None:
    chosen, rejected, refs = of(-10.0), of(-12.0), (of(-11.0), of(-11.5))
    loss, *_ = dpo_loss(chosen, rejected, *refs, beta=BETA, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.635957, abs=2e-6)


def test_a_conservative_pair_is_left_alone_where_it_is_as_sure_as_its_label() -> None:
    # σ(βΔ) = 0.9 at Δ = ln 9/β: the gradient is 0 there and turns beyond; plain DPO's is −β·0.1 for ever.
    for name in ("sigmoid", "exo"):
        gap = of(math.log(9) / BETA, 40.0).requires_grad_()
        PAIR_LOSSES[name](gap, of(0.0, 0.0), beta=BETA, label_smoothing=0.1).sum().backward()
        assert gap.grad is not None
        assert gap.grad[0].item() == pytest.approx(0.0, abs=1e-12)
        assert gap.grad[1].item() > 0
    gap = of(math.log(9) / BETA).requires_grad_()
    PAIR_LOSSES["robust"](gap, of(0.0), beta=BETA, label_smoothing=0.1).backward()
    assert gap.grad is not None
    assert gap.grad.item() < 0


def test_simpo_by_hand() -> None:
    # Chosen: 8 tokens that sum to −4, mean −0.5; rejected: 2 tokens, −3, mean −1.5. β 2, γ 1: 2·1 − 1 = 1,
    # ln(1 + e^−1) = 0.313262. Sums for means: ln(1 + e^3) = 3.048587. γ times β: ln 2. γ forgotten: 0.126928.
    mask = torch.arange(8)[None, :] < torch.tensor([[8], [2]])
    logps = torch.where(mask, torch.tensor([[-0.5], [-1.5]], dtype=torch.float64), 7.0)
    means = response_sums(logps, mask) / mask.sum(-1)
    loss = sigmoid_loss(means[:1], means[1:], beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)


def test_odds_ratio_by_hand() -> None:
    # p = e^−0.5 = 0.606531 and e^−1.2 = 0.301194; odds 1.541494 and 0.431013; ln of their ratio 1.274370;
    # λ 0.1: 0.1·ln(1 + e^−1.274370) = 0.024655. The likelihoods' ratio: 0.1·ln(1 + e^−0.7) = 0.040319.
    chosen, rejected = of(-0.5).requires_grad_(), of(-1.2).requires_grad_()
    loss = odds_ratio_loss(chosen, rejected, beta=0.1)
    assert loss.item() == pytest.approx(0.024655, abs=1e-6)
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    # −0.1·σ(−1.274370)/(1 − p): σ = 0.218510.
    assert chosen.grad.item() == pytest.approx(-0.1 * 0.218510 / (1 - 0.606531), abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.1 * 0.218510 / (1 - 0.301194), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact_at_both_ends(dtype: torch.dtype) -> None:
    # log(1 − e^x) written out is log(0) above −1e-8 in fp32, and 1 − e^x is 1 below −20.
    values = [-1e-6, -1e-3, -0.3, -math.log(2), -0.8, -20.0, -300.0]
    logps = torch.tensor(values, dtype=dtype, requires_grad=True)
    odds = log_odds(logps)
    exact = [x - math.log(-math.expm1(x)) for x in values]
    assert odds.tolist() == pytest.approx(exact, rel=2e-6)
    odds.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-1 / math.expm1(x) for x in values], rel=2e-5)


def test_a_certain_response_has_finite_odds_and_no_nan() -> None:
    logps = torch.tensor([0.0, -0.0, -1.0], requires_grad=True)
    loss = odds_ratio_loss(logps, torch.full((3,), -2.0), beta=0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert logps.grad is not None
    assert logps.grad[:2].tolist() == [0.0, 0.0]
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_nothing_overflows(name: str) -> None:
    sides = (of(-2000.0, 3000.0), of(3000.0, -2000.0))
    if name == "odds":
        sides = (of(-2000.0, -1e-9), of(-1e-9, -2000.0))
    chosen, rejected = (side.requires_grad_() for side in sides)
    loss = PAIR_LOSSES[name](chosen, rejected, beta=0.5, **smoothing(name))
    loss.sum().backward()
    assert all(bool(torch.isfinite(t).all()) for t in (loss, chosen.grad, rejected.grad) if t is not None)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    sides = [torch.randn(5, dtype=torch.float64) for _ in range(2)]
    if name == "odds":
        sides = [-side.abs() - 0.05 for side in sides]
    inputs = tuple(side.requires_grad_() for side in sides)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return PAIR_LOSSES[name](chosen, rejected, beta=0.7, **smoothing(name))

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_one_pair_alone_and_among_others(name: str) -> None:
    torch.manual_seed(1)
    chosen, rejected = -torch.rand(2, 4, dtype=torch.float64) - 0.1
    whole = PAIR_LOSSES[name](chosen, rejected, beta=0.3, **smoothing(name))
    alone = [
        PAIR_LOSSES[name](c, r, beta=0.3, **smoothing(name)) for c, r in zip(chosen, rejected, strict=True)
    ]
    assert torch.equal(whole, torch.stack(alone))


def smoothing(name: str) -> dict[str, Any]:
    return {"label_smoothing": 0.1} if name in SMOOTHED else {}
