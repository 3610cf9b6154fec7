"""Is σ(β·Δ) a probability that means what it says?"""

from __future__ import annotations

import pytest
import torch

from trimtab.evaluation.preferences import implicit_calibration
from trimtab.groups import Group, Response

PAIRS = [
    Group(id=f"p{k}", prompt=f"prompt {k}", responses=[Response(tokens=[1, 2]), Response(tokens=[3])])
    for k in range(2)
]


def test_by_hand() -> None:
    ratios_P2 = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = implicit_calibration(ratios_P2, PAIRS, 0.5)
    # Margins 1 and −½: p = 0.731059 and 0.377541; without β they would be 2 and −1, and Brier 0.274.
    assert found["brier"] == pytest.approx(((1 - 0.731059) ** 2 + (1 - 0.377541) ** 2) / 2, abs=1e-6)
    # Confidence 0.731 and right, 0.622 and wrong, in bins of their own.
    assert found["ece"] == pytest.approx((1 - 0.731059) / 2 + 0.622459 / 2, abs=1e-6)
    assert found["accuracy"] == 0.5
    assert found["margin_mean"] == pytest.approx(0.25)


def test_a_temperature_undoes_a_wrong_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    true_P = torch.randn(4000, generator=generator, dtype=torch.float64) * 2
    wins_P = torch.rand(4000, generator=generator, dtype=torch.float64) < torch.sigmoid(true_P)
    margin_P = torch.where(wins_P, true_P, -true_P)
    pairs = [
        Group(id=f"p{k}", prompt=f"prompt {k}", responses=[Response(tokens=[1]), Response(tokens=[2])])
        for k in range(4000)
    ]
    ratios_P2 = torch.stack([margin_P / 0.1, torch.zeros_like(margin_P)], dim=1)
    right = implicit_calibration(ratios_P2, pairs, 0.1)
    wrong = implicit_calibration(ratios_P2, pairs, 0.5)
    assert right["ece"] < 0.03 < wrong["ece"]
    assert right["temperature"]["value"] == pytest.approx(1.0, rel=0.1)
    assert wrong["temperature"]["value"] == pytest.approx(5.0, rel=0.1)  # β / 5 would have been right
