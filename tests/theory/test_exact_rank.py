"""What the losses on rankings, ratings and steps converge to, where everything can be enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from trimtab.objectives.ranking import bradley_terry_loss, pairwise_ranking_loss, plackett_luce_loss
from trimtab.objectives.reduce import reduce_items
from trimtab.objectives.scores import rating_loss, step_loss

REWARDS = torch.tensor([0.9, -0.6, 1.7, 0.1], dtype=torch.float64)
REF_LOGPS = torch.tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.float64).log()
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def minimise(loss_of: Callable[[torch.Tensor], torch.Tensor], size: int) -> torch.Tensor:
    values = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [values], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = loss_of(values)
        total.backward()
        return total

    optimiser.step(loss)
    return values.detach()


def chances(ranks_RK: torch.Tensor) -> torch.Tensor:
    """P of each of these weak orders under the rewards, by summing strict ones; no code of the package."""
    out = []
    for ranks in ranks_RK.tolist():
        total = 0.0
        for order in itertools.permutations(range(4)):
            if [ranks[i] for i in order] != sorted(ranks):
                continue
            chance = 1.0
            for place in range(4):
                left = torch.stack([REWARDS[i] for i in order[place:]]).exp()
                chance *= float(left[0] / left.sum())
            total += chance
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


def all_of(pattern: list[float]) -> torch.Tensor:
    return torch.tensor(sorted(set(itertools.permutations(pattern))), dtype=torch.float64)


def off(scores: torch.Tensor, rewards: torch.Tensor) -> float:
    return float(((scores - scores.mean()) - (rewards - rewards.mean())).abs().max())


def pairs(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return pairwise_ranking_loss(scores, ranks, mask)[0]


def breslow(scores: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cox's partial likelihood with Breslow's treatment of ties: every member against all not yet placed."""
    left = ranks[:, None, :] >= ranks[:, :, None]
    rest = scores[:, None, :].masked_fill(~left, float("-inf")).logsumexp(-1)
    return (rest - scores).sum(-1)


def fit(loss: Loss, ranks_RK: torch.Tensor) -> torch.Tensor:
    weights_R = chances(ranks_RK)
    assert float(weights_R.sum()) == pytest.approx(1.0)
    mask = torch.ones_like(ranks_RK, dtype=torch.bool)
    return minimise(
        lambda s: reduce_items(loss(s.expand_as(ranks_RK), ranks_RK, mask), 1, weights_P=weights_R), 4
    )


@pytest.mark.parametrize(
    "pattern",
    [[1, 2, 3, 4], [1, 1, 3, 4], [1, 1, 3, 3], [1, 2, 2, 4], [1, 2, 3, 3], [1, 2, 2, 2], [1, 1, 1, 4]],
)
def test_rankings_with_ties_give_the_rewards_back(pattern: list[float]) -> None:
    """Rankings whose ties hide the order within them: what is left says enough, if it is read exactly."""
    assert off(fit(plackett_luce_loss, all_of(pattern)), REWARDS) < 1e-6


def test_breslows_ties_do_not() -> None:
    assert off(fit(breslow, all_of([1, 1, 3, 4])), REWARDS) > 0.2
    assert off(fit(breslow, all_of([1, 2, 2, 2])), REWARDS) > 0.2


def test_pairs_of_strict_rankings_agree_and_of_tied_ones_do_not() -> None:
    """Pairwise losses drop a tie's pairs, and which pairs remain depends on the rewards: a bias."""
    assert off(fit(pairs, all_of([1, 2, 3, 4])), REWARDS) < 1e-6
    assert off(fit(pairs, all_of([1, 2, 2, 4])), REWARDS) > 0.05


@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("loss", [plackett_luce_loss, pairs])
def test_a_policy_from_rankings_is_the_tilted_reference(loss: Loss, beta: float) -> None:
    """π = π_ref·exp(r/β)/Z, as for DPO; without the reference it is exp(r/β)/Z."""
    ranks_RK = all_of([1, 2, 3, 4])
    weights_R, mask = chances(ranks_RK), torch.ones_like(ranks_RK, dtype=torch.bool)
    for ref_logps in (REF_LOGPS, torch.zeros_like(REF_LOGPS)):

        def total(logits: torch.Tensor, ref_logps: torch.Tensor = ref_logps) -> torch.Tensor:
            scores = beta * (logits.log_softmax(-1) - ref_logps)
            return reduce_items(loss(scores.expand_as(ranks_RK), ranks_RK, mask), 1, weights_P=weights_R)

        found = minimise(total, 4).softmax(-1)
        assert float((found - (ref_logps + REWARDS / beta).softmax(-1)).abs().max()) < 1e-6
    # A policy that ignores β would be the tilt at β = 1.
    assert (
        float(((ref_logps + REWARDS / beta).softmax(-1) - (ref_logps + REWARDS).softmax(-1)).abs().max())
        > 0.1
    )


def test_soft_labels_give_the_log_odds() -> None:
    target = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    found = minimise(lambda gap: bradley_terry_loss(gap, torch.zeros_like(gap), target_P=target).sum(), 3)
    assert found.tolist() == pytest.approx((target / (1 - target)).log().tolist(), abs=1e-6)


def test_a_margin_moves_the_gap_by_itself() -> None:
    """With p of the pairs one way round and 1 − p the other, both asking for m: more than the log-odds."""
    p, m = 0.8, 0.7

    def total(gap: torch.Tensor) -> torch.Tensor:
        margin, zero = torch.full_like(gap, m), torch.zeros_like(gap)
        better, worse = (bradley_terry_loss(*s, margin_P=margin) for s in ((gap, zero), (zero, gap)))
        return (p * better + (1 - p) * worse).sum()

    gap = minimise(total, 1)
    # p·σ(m − g) = (1 − p)·σ(m + g).
    assert float(p * torch.sigmoid(m - gap)) == pytest.approx(
        float((1 - p) * torch.sigmoid(m + gap)), abs=1e-8
    )
    assert float(gap) > 1.5  # ln 4 = 1.386 without the margin


def test_regression_gives_the_mean_rating() -> None:
    """Ratings 1, 2, 5 with chances ½, ¼, ¼: 2.25, and not the median 1.5 nor the mode 1. Missing: no say."""
    ratings = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25, 0.8], dtype=torch.float64)
    known = torch.tensor([True, True, True, False])
    found = minimise(
        lambda r: reduce_items(rating_loss(r.expand(4), ratings, known), 1, weights_P=weights), 1
    )
    assert float(found) == pytest.approx(2.25, abs=1e-8)


def test_steps_give_the_probability_of_their_label() -> None:
    """By hard labels of that frequency, and by soft labels of that mean."""
    hard, share = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    mask = torch.ones(2, dtype=torch.bool)
    found = minimise(lambda z: reduce_items(step_loss(z.expand(2), hard, mask), 1, weights_P=share), 1)
    assert float(found.sigmoid()) == pytest.approx(0.3, abs=1e-8)
    soft = torch.tensor([0.2, 0.4], dtype=torch.float64)
    found = minimise(lambda z: step_loss(z.expand(2), soft, mask).sum(), 1)
    assert float(found.sigmoid()) == pytest.approx(0.3, abs=1e-8)
