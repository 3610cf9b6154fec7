"""Ties under Plackett–Luce, margins and soft labels. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trimtab.objectives.ranking import (
    LARGEST_TIE,
    bradley_terry_loss,
    pairwise_ranking_loss,
    plackett_luce_loss,
)

NAN = float("nan")


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss(scores: torch.Tensor, ranks: list[float]) -> torch.Tensor:
    return plackett_luce_loss(scores[None], of(*ranks)[None], torch.ones(1, len(ranks), dtype=torch.bool))[0]


def by_enumeration(scores: list[float], ranks: list[float]) -> float:
    """−log of the summed probability of all strict rankings that agree, with no code of the package."""
    total = 0.0
    for order in itertools.permutations(range(len(scores))):
        if [ranks[i] for i in order] != sorted(ranks):
            continue
        chance = 1.0
        for place, i in enumerate(order):
            chance *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in order[place:])
        total += chance
    return -math.log(total)


def test_a_tie_by_hand() -> None:
    # Weights 3, 2, 1, the first two tied above the third: 3/6·2/3 + 2/6·3/4 = 7/12, so ln(12/7) = 0.5390.
    # Breslow would take 3·2/6² (1.7918), Efron 3·2/(6·3.5) (1.2528), the order as given 3/6·2/3 (1.0986).
    scores = of(3.0, 2.0, 1.0).log()
    assert loss(scores, [1, 1, 3]).item() == pytest.approx(0.5390, abs=5e-5)
    assert loss(scores, [1, 1, 3]).item() == pytest.approx(math.log(12 / 7), abs=1e-12)


def test_a_tie_in_the_last_place_is_a_ranking_of_the_best_alone() -> None:
    # The best of four: −log softmax, ln(1 + e^−1 + e^−2 + e^−3) = 0.4402. Breslow's tie would add to it.
    assert loss(of(3.0, 2.0, 1.0, 0.0), [1, 2, 2, 2]).item() == pytest.approx(0.4402, abs=5e-5)
    assert loss(of(3.0, 2.0, 1.0, 0.0), [1, 1, 1, 1]).item() == 0.0
    # The best two of four: the first two draws and no third.
    two = 0.4402 + math.log(1 + math.exp(-1) + math.exp(-2))
    assert loss(of(3.0, 2.0, 1.0, 0.0), [1, 2, 3, 3]).item() == pytest.approx(two, abs=5e-5)


@pytest.mark.parametrize(
    "ranks",
    [[1, 1, 3, 4, 5], [1, 2, 2, 2, 5], [1, 1, 3, 3, 5], [2, 1, 2, 5, 1], [3, 3, 1, 1, 1], [1, 1, 1, 1, 5]],
)
def test_ties_are_the_sum_over_their_orders(ranks: list[float]) -> None:
    scores = [0.7, -1.2, 0.1, 2.0, -0.4]
    assert loss(of(*scores), ranks).item() == pytest.approx(by_enumeration(scores, ranks), abs=1e-12)


def test_ties_of_one_pattern_are_a_distribution() -> None:
    # All ways to place two, then one, then two of five.
    patterns = set(itertools.permutations([1.0, 1.0, 3.0, 4.0, 4.0]))
    scores = of(0.7, -1.2, 0.1, 2.0, -0.4)
    assert len(patterns) == 30
    assert sum(math.exp(-loss(scores, list(p)).item()) for p in patterns) == pytest.approx(1.0)


def test_a_tie_leaves_open_how_its_members_compare() -> None:
    scores = of(0.3, 0.3, 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores, [1, 1, 3]), scores)
    assert gradient[0].item() == pytest.approx(gradient[1].item())
    assert gradient[0].item() < 0 < gradient[2].item()
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-15)


def mixed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups of 4 with a tie, of 2, of 1, of 3 tied above and with a hole, and of 4 all tied."""
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ranks = of(1, 3, 1, 4, 2, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 3, 2, 2, 2, 2).view(5, 4)
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool
    )
    return scores, ranks, mask


def test_masks_padding_and_splitting_change_nothing() -> None:
    scores, ranks, mask = mixed()
    dirty = scores.masked_fill(~mask, NAN).requires_grad_()
    whole = plackett_luce_loss(dirty, ranks.masked_fill(~mask, 1.0), mask)
    (gradient,) = torch.autograd.grad(whole.sum(), dirty)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    for p, keep in enumerate(mask):
        assert whole[p].item() == pytest.approx(
            loss(scores[p, keep], ranks[p, keep].tolist()).item(), abs=1e-14
        )


def test_gradients_with_ties_match_finite_differences() -> None:
    scores, ranks, mask = mixed()
    assert torch.autograd.gradcheck(lambda s: plackett_luce_loss(s, ranks, mask), (scores.requires_grad_(),))


def test_ties_are_finite_for_extreme_scores() -> None:
    # −2000 drawn before 2000: 4000 nats, and ln 2 is lost beside them.
    assert loss(of(-2000.0, -2000.0, 2000.0), [1, 1, 3]).item() == pytest.approx(8000.0, rel=1e-3)
    assert loss(of(2000.0, 1000.0, -2000.0), [1, 1, 3]).item() == pytest.approx(0.0, abs=1e-12)


def test_a_large_tie_above_the_last_place_is_refused() -> None:
    many = LARGEST_TIE + 1
    with pytest.raises(ValueError, match=f"{many} responses share a place"):
        loss(torch.zeros(many + 1, dtype=torch.float64), [1.0] * many + [2.0])
    # In the last place it costs nothing to count; all of one size at equal scores: ln(n + 1).
    assert loss(torch.zeros(many + 1, dtype=torch.float64), [2.0] * many + [1.0]).item() == pytest.approx(
        math.log(many + 1)
    )
    ten = loss(torch.zeros(LARGEST_TIE + 1, dtype=torch.float64), [1.0] * LARGEST_TIE + [2.0])
    assert ten.item() == pytest.approx(math.log(LARGEST_TIE + 1))


# Soft labels and margins.


def test_a_soft_label_by_hand() -> None:
    # Gap 0.5, p 0.8: 0.8·0.4741 + 0.2·0.9741 = 0.5741. The hard label would give 0.4741, the sides of p
    # swapped 0.8741. Slope σ(0.5) − 0.8 = −0.1775.
    chosen = of(1.0).requires_grad_()
    got = bradley_terry_loss(chosen, of(0.5), target_P=of(0.8))
    assert got.item() == pytest.approx(0.5741, abs=5e-5)
    got.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.1775, abs=5e-5)
    # At p = ½ equal scores are best, whichever is called chosen.
    at_half = of(0.0).requires_grad_()
    bradley_terry_loss(at_half, of(0.0), target_P=of(0.5)).sum().backward()
    assert at_half.grad is not None
    assert at_half.grad.item() == 0.0


def test_p_of_1_is_the_hard_label() -> None:
    gap = of(-3.0, 0.0, 2.0)
    soft = bradley_terry_loss(gap, torch.zeros_like(gap), target_P=torch.ones_like(gap))
    torch.testing.assert_close(soft, bradley_terry_loss(gap, torch.zeros_like(gap)))


def test_margins_belong_to_the_better_of_a_pair() -> None:
    # Scores 0, 1 of which the second is ranked first: gap 1, margin[1, 0] = 0.3, so ln(1 + e^−0.7) = 0.4032.
    # The entry of the reversed pair, 9, is never read.
    scores, ranks, mask = of(0.0, 1.0)[None], of(2.0, 1.0)[None], torch.ones(1, 2, dtype=torch.bool)
    margin = of(0.0, 9.0, 0.3, 0.0).view(1, 2, 2)
    got, _ = pairwise_ranking_loss(scores, ranks, mask, margin_PKK=margin)
    assert got.item() == pytest.approx(0.4032, abs=5e-5)
    soft, _ = pairwise_ranking_loss(scores, ranks, mask, target_PKK=of(0.8).view(1, 1, 1))
    assert soft.item() == pytest.approx(bradley_terry_loss(of(1.0), of(0.0), target_P=of(0.8)).item())


def test_margins_and_soft_labels_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        bradley_terry_loss(of(1.0), of(0.0), margin_P=of(0.1), target_P=of(0.8))


def test_masked_margins_change_nothing() -> None:
    scores, ranks, mask = mixed()
    margin = torch.full((5, 4, 4), 0.3, dtype=torch.float64)
    both = mask[:, :, None] & mask[:, None, :]
    whole, _ = pairwise_ranking_loss(scores, ranks, mask, margin_PKK=margin)
    dirty, _ = pairwise_ranking_loss(
        scores.masked_fill(~mask, NAN), ranks, mask, margin_PKK=margin.masked_fill(~both, NAN)
    )
    assert torch.equal(whole, dirty)


def test_gradients_of_margins_and_soft_labels_match_finite_differences() -> None:
    scores, ranks, mask = mixed()
    for extra in ({"margin_PKK": of(0.4).view(1, 1, 1)}, {"target_PKK": of(0.7).view(1, 1, 1)}):
        assert torch.autograd.gradcheck(
            lambda s, extra=extra: pairwise_ranking_loss(s, ranks, mask, **extra)[0],
            (scores.detach().requires_grad_(),),
        )
