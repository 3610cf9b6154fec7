"""Reward losses on data that a known reward makes: what minimises them is that reward, up to a constant.

Nothing is sampled: pairs carry their exact Bradley–Terry probabilities, rankings their Plackett–Luce ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from trimtab.objectives.ranking import bradley_terry_loss, pairwise_ranking_loss, plackett_luce_loss
from trimtab.objectives.reduce import reduce_items

FIVE = torch.tensor([1.3, -0.4, 0.2, 2.1, -1.0], dtype=torch.float64)
FOUR = torch.tensor([0.9, -0.6, 1.7, 0.1], dtype=torch.float64)
CHOSEN, REJECTED = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T
RANKINGS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64)


def minimise(loss_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """The scores that minimise the loss, by LBFGS."""
    scores = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = loss_of(scores)
        total.backward()
        return total

    optimiser.step(loss)
    return scores.detach()


def fit_pairs(
    rewards: torch.Tensor,
    start: float = 0.0,
    *,
    margin: float = 0.0,
    centre: float = 0.0,
    swapped: bool = False,
) -> torch.Tensor:
    """Scores of five items from all their pairs, in both orders."""
    weights_P = torch.sigmoid(rewards[CHOSEN] - rewards[REJECTED])
    better, worse = (REJECTED, CHOSEN) if swapped else (CHOSEN, REJECTED)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        margin_P = torch.full_like(weights_P, margin) if margin else None
        loss_P = bradley_terry_loss(scores[better], scores[worse], margin_P=margin_P, centre=centre)
        return reduce_items(loss_P, 10, weights_P=weights_P)

    return minimise(loss, torch.full((5,), start, dtype=torch.float64))


def ranking_probabilities(rewards: torch.Tensor) -> torch.Tensor:
    """P of each of the 24 rankings, one item drawn after the other, with no code of the package."""
    chances = []
    for ranks in RANKINGS.tolist():
        order, chance = sorted(range(4), key=lambda i: ranks[i]), 1.0
        for place in range(4):
            left = torch.stack([rewards[i] for i in order[place:]]).exp()
            chance *= float(left[0] / left.sum())
        chances.append(chance)
    assert sum(chances) == pytest.approx(1.0)
    return torch.tensor(chances, dtype=torch.float64)


def fit_rankings(
    rewards: torch.Tensor, loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Scores of four items from all their rankings."""
    weights_P, mask = ranking_probabilities(rewards), torch.ones(24, 4, dtype=torch.bool)

    def total(scores: torch.Tensor) -> torch.Tensor:
        return reduce_items(loss(scores.expand(24, 4), RANKINGS, mask), 1, weights_P=weights_P)

    return minimise(total, torch.zeros(4, dtype=torch.float64))


def off(scores: torch.Tensor, rewards: torch.Tensor) -> float:
    """The largest error of any difference, which no constant can mend: max over items, both centred."""
    return float(((scores - scores.mean()) - (rewards - rewards.mean())).abs().max())


def test_pairs_give_the_rewards_back_up_to_a_constant() -> None:
    scores = fit_pairs(FIVE)
    assert off(scores, FIVE) < 1e-6
    # Wrong losses. Sides swapped: the mirror image, 2·1.66 off. A margin of 0.5 that the data does not have.
    assert off(fit_pairs(FIVE, swapped=True), FIVE) == pytest.approx(3.32, abs=1e-4)
    assert off(fit_pairs(FIVE, margin=0.5), FIVE) == pytest.approx(0.357, abs=1e-3)


def test_the_constant_is_wherever_it_began() -> None:
    # The loss does not see it, so its gradient never moves it: the rewards' own mean, 0.44, is not recovered.
    for start in (0.0, 5.0):
        scores = fit_pairs(FIVE, start)
        assert scores.mean().item() == pytest.approx(start, abs=1e-9)
        assert off(scores, FIVE) < 1e-6


@pytest.mark.parametrize("start", [0.0, 5.0])
def test_centring_puts_the_constant_at_0(start: float) -> None:
    # Summed over items the gradient of the pairs is 0, so that of the centring is: 4·(n − 1)·c·Σ s = 0.
    scores = fit_pairs(FIVE + 30, start, centre=0.01)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-7)


def test_centring_shrinks_differences_in_proportion() -> None:
    # (s_i + s_j)² over all pairs of five is 3·Σ s² + (Σ s)²: beside the origin it pulls on the spread.
    # Halving c halves the error, so c → 0 gives the rewards back; at the usual c = 0.01 the span of 3.1 is 11
    # % short.
    centred = fit_pairs(FIVE, centre=0.01)
    assert (centred.max() - centred.min()).item() / 3.1 == pytest.approx(0.889, abs=1e-3)
    errors = [off(fit_pairs(FIVE, centre=c), FIVE) for c in (0.01, 0.005, 0.0025, 1e-6)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.25)
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.15)
    assert errors[3] < 1e-4


def test_one_pair_a_prompt_is_centred_without_shrinking() -> None:
    # With two responses a prompt (s_w + s_l)² is the origin alone.
    weights_P = torch.sigmoid(torch.tensor([1.4, -1.4], dtype=torch.float64))

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return reduce_items(bradley_terry_loss(scores, scores.flip(0), centre=0.5), 1, weights_P=weights_P)

    scores = minimise(loss, torch.tensor([3.0, 3.0], dtype=torch.float64))
    assert scores.tolist() == pytest.approx([0.7, -0.7], abs=1e-6)


def test_rankings_give_the_rewards_back() -> None:
    scores = fit_rankings(FOUR, plackett_luce_loss)
    assert off(scores, FOUR) < 1e-6


def test_pairs_of_rankings_give_them_back_too() -> None:
    # In a Plackett–Luce ranking i stands before j with probability σ(r_i − r_j), whatever else is ranked
    # (Luce's axiom), so the pairwise loss has the same minimum: where both apply they differ in variance, not
    # in aim.
    assert off(fit_rankings(FOUR, lambda s, r, m: pairwise_ranking_loss(s, r, m)[0]), FOUR) < 1e-6


def test_wrong_ranking_losses_are_far_off() -> None:
    # Softmax over all four at every place: every ranking costs the same, so all scores become equal.
    def never_taken_out(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return -scores.log_softmax(-1).sum(-1)

    def worst_first(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return plackett_luce_loss(-scores, -ranks, mask)

    assert off(fit_rankings(FOUR, never_taken_out), FOUR) == pytest.approx(1.175, abs=1e-4)
    # Plackett–Luce from the worst upwards is another distribution, though it orders the items alike.
    assert off(fit_rankings(FOUR, worst_first), FOUR) == pytest.approx(0.144, abs=1e-3)
    # Rank 1 read as the worst.
    backwards = fit_rankings(FOUR, lambda s, r, m: plackett_luce_loss(s, -r, m))
    assert off(backwards, FOUR) == pytest.approx(2.206, abs=1e-3)
