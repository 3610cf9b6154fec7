"""Values from the order of a group's rewards: gains by place, ties, soft Bradley–Terry labels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trimtab.objectives.advantages import group_advantages
from trimtab.objectives.judgements import bradley_terry_shares, dcg_gains, listwise_gains, places

GAINS = [1.0, 0.6, 0.3, 0.0]


def row(*rewards: float) -> torch.Tensor:
    return torch.tensor([rewards], dtype=torch.float64)


def test_places_and_ties() -> None:
    first, last = places(row(2.0, 5.0, 2.0, -1.0))
    assert first.tolist() == [[1, 0, 1, 3]]
    assert last.tolist() == [[2, 0, 2, 3]]


def test_gains_by_hand() -> None:
    assert listwise_gains(row(-3.0, 7.0, 2.0, 2.5), GAINS)[0].tolist() == pytest.approx([0.0, 1.0, 0.3, 0.6])
    # Second and third tie: (0.6 + 0.3)/2 each. The better place for both would be 0.6, the worse 0.3.
    assert listwise_gains(row(2.0, 7.0, 2.0, -3.0), GAINS)[0].tolist() == pytest.approx(
        [0.45, 1.0, 0.45, 0.0]
    )
    # More responses than gains: further places have the last. Fewer: the first places' alone.
    assert listwise_gains(row(6, 5, 4, 3, 2, 1), [1.0, 0.5])[0].tolist() == [1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert listwise_gains(row(1, 2), GAINS)[0].tolist() == pytest.approx([0.6, 1.0])


def test_winner_takes_all() -> None:
    assert listwise_gains(row(1, 4, 2), [1.0, 0.0])[0].tolist() == [0.0, 1.0, 0.0]
    assert listwise_gains(row(4, 4, 4, 0), [1.0, 0.0])[0].tolist() == pytest.approx([1 / 3] * 3 + [0.0])


def test_dcg_discounts() -> None:
    assert dcg_gains(4) == pytest.approx([1.0, 1 / math.log2(3), 0.5, 1 / math.log2(5)], abs=1e-12)
    # The discount of natural logarithms would be 1/ln 2 = 1.4427 at the first place.
    assert dcg_gains(2)[1] == pytest.approx(0.6309, abs=5e-5)


def test_the_sum_of_gains_is_the_same_whatever_ties() -> None:
    for rewards in itertools.product([0.0, 1.0, 2.0], repeat=4):
        assert listwise_gains(row(*rewards), GAINS).sum().item() == pytest.approx(1.9)
    # So a group in which all tie has no advantage, up to the rounding that eps would blow up: exactly none.
    assert not group_advantages(listwise_gains(row(3, 3, 3), [1.0, 0.0])).any()


def test_groups_are_judged_apart() -> None:
    both = torch.tensor([[1.0, 2.0], [30.0, 20.0]], dtype=torch.float64)
    assert listwise_gains(both, [1.0, 0.0]).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_bradley_terry_by_hand() -> None:
    # Of two, σ(±1.7/2) = 0.7006 and 0.2994; without the temperature 0.8455.
    got = bradley_terry_shares(row(6.8, 5.1), 2.0)[0].tolist()
    assert got == pytest.approx([0.7006, 0.2994], abs=5e-5)
    # Of three, the mean over the other two: (σ(1) + σ(3))/2 = 0.8418. With itself (½) it would be 0.7279.
    assert bradley_terry_shares(row(3, 2, 0))[0, 0].item() == pytest.approx(0.8418, abs=5e-5)


def test_bradley_terry_limits() -> None:
    rewards = row(0.3, 0.9, 0.3, -2.0)
    shares = bradley_terry_shares(rewards, 1e-6)[0].tolist()
    assert shares == pytest.approx([0.5, 1.0, 0.5, 0.0])  # win shares, a tie one half: (½ + 1)/3 = 0.5
    assert bradley_terry_shares(rewards).mean().item() == pytest.approx(0.5)
    assert (bradley_terry_shares(rewards, 1e6) - 0.5).abs().max() < 1e-5


def test_bradley_terry_refuses() -> None:
    with pytest.raises(ValueError, match="at least two"):
        bradley_terry_shares(row(1.0))
    with pytest.raises(ValueError, match="above 0"):
        bradley_terry_shares(row(1.0, 2.0), 0.0)
