"""Rewards on their way to token rewards: moments in one pass, and the estimators of the KL in the reward."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from trimtab.objectives.kl import Estimator
from trimtab.objectives.value import Moments, token_rewards


def test_moments_by_hand() -> None:
    # 1, 3, then 5: mean 3, Σ(x − 3)² = 8, deviation √(8/2) = 2. Divided by n it would be 1.63; the mean of
    # the two batches' means 3.5.
    found = Moments().seeing([1.0, 3.0]).seeing([5.0])
    assert (found.count, found.mean, found.squares) == (3, 3.0, 8.0)
    assert found.std == pytest.approx(2.0)
    scaled = found.scaled(torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
    assert scaled.tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_moments_do_not_depend_on_how_they_came() -> None:
    draw = random.Random(1)
    values = [draw.gauss(1e4, 3.0) for _ in range(60)]
    found = Moments()
    for start, stop in ((0, 1), (1, 1), (1, 20), (20, 60)):
        found = found.seeing(values[start:stop])
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-12)
    # E[x²] − E[x]² would have lost half of its digits here.
    assert found.std == pytest.approx(statistics.stdev(values), rel=1e-9)


def test_one_reward_or_equal_ones_become_0() -> None:
    for values in ([0.5], [0.1] * 7):
        moments = Moments().seeing(values)
        assert moments.std == pytest.approx(0.0, abs=1e-12)
        assert moments.scaled(torch.tensor(values)).abs().max() < 1e-6
    assert Moments().std == 0.0


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        Moments().seeing([1.0, math.nan])


def test_the_estimators_in_the_reward_by_hand() -> None:
    # log π − log π_ref = 0.5 and −1, β = 0.1, reward 2. k1: −0.05, 2.1. k2: −0.0125, 1.95. k3: e^−0.5 − 0.5 =
    # 0.10653 and e − 2 = 0.71828, so −0.010653 and 1.928172. With d the wrong way round k3's first is
    # e^0.5 − 1.5 = 0.14872.
    policy = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected: dict[Estimator, list[float]] = {
        "k1": [-0.05, 2.1],
        "k2": [-0.0125, 1.95],
        "k3": [-0.0106531, 1.9281718],
    }
    for estimator, row in expected.items():
        rewards, _ = token_rewards(
            torch.tensor([2.0]).double(), policy, ref, mask, beta=0.1, estimator=estimator
        )
        assert rewards[0].tolist() == pytest.approx(row, abs=1e-6), estimator
