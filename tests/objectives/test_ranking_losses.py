"""Losses on pairs and rankings. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from trimtab.objectives.ranking import bradley_terry_loss, pairwise_ranking_loss, plackett_luce_loss
from trimtab.objectives.reduce import reduce_items

NAN = float("nan")


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def group(scores: list[float], ranks: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One group as the losses take it."""
    return of(*scores)[None], of(*ranks)[None], torch.ones(1, len(scores), dtype=torch.bool)


def pairwise(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return pairwise_ranking_loss(scores, ranks, mask)[0]


LISTWISE = [pairwise, plackett_luce_loss]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of 4, 2, 1 and 3 responses, the last with a hole."""
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ranks = torch.tensor([[2, 4, 1, 3], [2, 1, 0, 0], [1, 0, 0, 0], [3, 0, 1, 2]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1]]).bool()
    return scores, ranks, mask


# Pairs.


def test_bradley_terry_by_hand() -> None:
    # 1 against 0.5: ln(1 + e^−0.5) = 0.4741. Sides swapped: ln(1 + e^0.5) = 0.9741.
    assert bradley_terry_loss(of(1.0), of(0.5)).item() == pytest.approx(0.4741, abs=5e-5)


def test_margin_by_hand() -> None:
    # A margin of 0.3 asks for more: ln(1 + e^−0.2) = 0.5981. Added to the gap it would ask for less: 0.3711.
    got = bradley_terry_loss(of(1.0), of(0.5), margin_P=of(0.3))
    assert got.item() == pytest.approx(0.5981, abs=5e-5)


def test_centring_by_hand() -> None:
    # 0.4741 + 0.01·(1 + 0.5)² = 0.4966. The square of the difference would give 0.4766, of the mean 0.4797.
    got = bradley_terry_loss(of(1.0), of(0.5), centre=0.01)
    assert got.item() == pytest.approx(0.4966, abs=5e-5)


def test_bradley_terry_gradient() -> None:
    # −σ(r_l − r_w + m) = −σ(−0.2) = −0.4502 for the better one, which therefore rises, and +0.4502 for the
    # other.
    chosen, rejected, margin = of(1.0).requires_grad_(), of(0.5).requires_grad_(), of(0.3).requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, margin_P=margin)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.4502, abs=5e-5)
    assert rejected.grad.item() == pytest.approx(0.4502, abs=5e-5)
    assert margin.grad is None


def test_only_centring_sees_the_origin() -> None:
    chosen, rejected = of(1.0, -2.0), of(0.5, 3.0)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected)
    )
    moved = bradley_terry_loss(chosen + 7, rejected + 7, centre=0.01)
    assert (moved > bradley_terry_loss(chosen, rejected, centre=0.01) + 0.01).all()
    # Its pull is to the mean: a pair around 0 costs nothing more.
    torch.testing.assert_close(
        bradley_terry_loss(of(2.0), of(-2.0), centre=9.0), bradley_terry_loss(of(2.0), of(-2.0))
    )


def test_bradley_terry_is_finite_where_sigma_is_0() -> None:
    # log(σ(−1000)) computed in two steps is −∞.
    got = bradley_terry_loss(of(-500.0, 500.0), of(500.0, -500.0))
    assert got.tolist() == [1000.0, 0.0]


# Every ordered pair of a ranking.


def test_the_worked_ranking() -> None:
    # Log-probabilities −32.1, −67.4, −58.9, −18.2 at β 0.3, ranking 2 > 3 > 1 > 4. Gaps β·(better − worse):
    # (2>3) −2.55, (2>1) −10.59, (2>4) −14.76, (3>1) −8.04, (3>4) −12.21, (1>4) −4.17; each costs ln(1 +
    # e^−gap): 2.6252 + 10.5900 + 14.7600 + 8.0403 + 12.2100 + 4.1853 = 52.4109. The mean would be 8.7352;
    # with the sides of every pair swapped 0.0909.
    scores, ranks, mask = group([-32.1, -67.4, -58.9, -18.2], [3, 1, 2, 4])
    loss, pairs = pairwise_ranking_loss(0.3 * scores, ranks, mask)
    assert loss.item() == pytest.approx(52.4109, abs=5e-5)
    assert pairs.item() == 6
    # The pair (2>1) alone: ln(1 + e^10.59) = 10.5900.
    only = torch.tensor([[True, True, False, False]])
    loss, pairs = pairwise_ranking_loss(0.3 * scores, ranks, only)
    assert loss.item() == pytest.approx(10.5900, abs=5e-5)
    assert pairs.item() == 1


def test_ties_form_no_pair() -> None:
    # Ranks 1, 2, 2: two pairs, ln(1 + e^−1) + ln(1 + e^−2) = 0.3133 + 0.1269; the tie itself would add ln 2.
    loss, pairs = pairwise_ranking_loss(*group([2.0, 1.0, 0.0], [1, 2, 2]))
    assert (loss.item(), pairs.item()) == (pytest.approx(0.4402, abs=5e-5), 2)
    loss, pairs = pairwise_ranking_loss(*group([2.0, 1.0], [1, 1]))
    assert (loss.item(), pairs.item()) == (0.0, 0)


def test_only_the_order_of_ranks_matters() -> None:
    scores = [0.3, -1.0, 2.0]
    for loss in LISTWISE:
        assert loss(*group(scores, [2, 3, 1])).item() == loss(*group(scores, [0.5, 7.5, -4])).item()


# The whole ranking.


def test_plackett_luce_by_hand() -> None:
    # Scores 2, 1, 0, ranked so: ln(1 + e^−1 + e^−2) + ln(1 + e^−1) + 0 = 0.4076 + 0.3133 = 0.7209. Softmax
    # over all three at every place, the placed ones not taken out: 0.4076 + 1.4076 + 2.4076 = 4.2228. Rank 1
    # read as the worst: 2.4076 + 1.3133 = 3.7209.
    loss = plackett_luce_loss(*group([2.0, 1.0, 0.0], [1, 2, 3]))
    assert loss.item() == pytest.approx(0.7209, abs=5e-5)
    assert plackett_luce_loss(*group([2.0, 1.0, 0.0], [3, 2, 1])).item() == pytest.approx(3.7209, abs=5e-5)


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    total = sum(
        math.exp(-plackett_luce_loss(*group([0.7, -1.2, 0.1, 2.0], [float(r) for r in ranks])).item())
        for ranks in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)


def test_plackett_luce_refuses_ties_if_told() -> None:
    with pytest.raises(ValueError, match="share a rank"):
        plackett_luce_loss(*group([2.0, 1.0, 0.0], [1, 2, 2]), ties="refuse")
    # Padding shares rank 0 in every batch, and is no tie.
    scores, ranks, mask = group([2.0, 1.0, 5.0, 5.0], [1, 2, 0, 0])
    mask[0, 2:] = False
    assert plackett_luce_loss(scores, ranks, mask, ties="refuse").item() == pytest.approx(0.3133, abs=5e-5)


def test_plackett_luce_is_finite_for_extreme_scores() -> None:
    # Underflow of exp would make log Σ exp infinite.
    assert plackett_luce_loss(*group([-2000.0, 0.0, 2000.0], [1, 2, 3])).item() == pytest.approx(6000.0)


# Both.


@pytest.mark.parametrize("loss", LISTWISE)
def test_a_group_of_two_is_one_pair(loss: Loss) -> None:
    scores, ranks, mask = group([0.3, 1.1], [2, 1])
    assert loss(scores, ranks, mask).item() == pytest.approx(bradley_terry_loss(of(1.1), of(0.3)).item())


@pytest.mark.parametrize("loss", LISTWISE)
def test_a_group_of_one_costs_nothing(loss: Loss) -> None:
    assert loss(*group([3.0], [1])).tolist() == [0.0]


@pytest.mark.parametrize("loss", LISTWISE)
def test_the_best_rises_and_the_worst_falls(loss: Loss) -> None:
    scores, ranks, mask = group([0.0, 0.0, 0.0], [2, 3, 1])
    (gradient,) = torch.autograd.grad(loss(scores.requires_grad_(), ranks, mask).sum(), scores)
    middle, worst, best = gradient[0].tolist()
    assert best < middle < worst
    assert best < 0 < worst
    assert best + middle + worst == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("loss", LISTWISE)
def test_what_is_masked_changes_nothing(loss: Loss) -> None:
    scores, ranks, mask = ragged()
    plain = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(plain, ranks, mask).sum(), plain)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    dirty = scores.masked_fill(~mask, NAN).requires_grad_()
    (other,) = torch.autograd.grad(loss(dirty, ranks.masked_fill(~mask, 2.0), mask).sum(), dirty)
    assert torch.equal(other, gradient)


@pytest.mark.parametrize("loss", LISTWISE)
def test_padding_and_splitting_change_nothing(loss: Loss) -> None:
    scores, ranks, mask = ragged()
    whole = loss(scores, ranks, mask)
    for p, keep in enumerate(mask):
        alone = loss(scores[p : p + 1, keep], ranks[p : p + 1, keep], mask[p : p + 1, keep])
        assert alone.item() == pytest.approx(whole[p].item(), abs=1e-14)
    parts = [reduce_items(part, len(whole)).item() for part in whole.split(1)]
    assert sum(parts) == pytest.approx(reduce_items(whole, len(whole)).item())


@pytest.mark.parametrize("loss", LISTWISE)
def test_the_order_in_which_responses_stand_does_not_matter(loss: Loss) -> None:
    scores, ranks, mask = ragged()
    order = torch.tensor([3, 0, 2, 1])
    torch.testing.assert_close(
        loss(scores[:, order], ranks[:, order], mask[:, order]), loss(scores, ranks, mask)
    )


@pytest.mark.parametrize("loss", LISTWISE)
def test_gradients_match_finite_differences(loss: Loss) -> None:
    scores, ranks, mask = ragged()
    assert torch.autograd.gradcheck(lambda s: loss(s, ranks, mask), (scores.requires_grad_(),))


def test_bradley_terry_gradient_matches_finite_differences() -> None:
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    margin = torch.full_like(chosen, 0.4)
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry_loss(c, r, margin_P=margin, centre=0.1),
        (chosen.requires_grad_(), rejected.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_keep_the_dtype(dtype: torch.dtype) -> None:
    scores, ranks, mask = ragged()
    for loss in LISTWISE:
        assert loss(scores.to(dtype), ranks, mask).dtype == dtype
    assert bradley_terry_loss(scores[0].to(dtype), scores[1].to(dtype), centre=0.1).dtype == dtype
