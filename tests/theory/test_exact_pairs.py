"""What the losses on pairs converge to, on responses that can be listed, with exact preferences.

Every pair stands there in both orders, weighted by the chance that it is judged so, as in test_exact_dpo.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from theory_optima import reverse_kl_optimum, total_variation

from trimtab.objectives.preference import PAIR_LOSSES, odds_ratio_loss, sigmoid_loss
from trimtab.objectives.reduce import reduce_items

REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)
CHOSEN_P, REJECTED_P = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j]).T
CHANCES_P = torch.sigmoid(REWARDS[CHOSEN_P] - REWARDS[REJECTED_P])

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""h of the chosen and of the rejected responses, ``[P]`` → ``[P]``."""


def converge(loss: Loss, weights_P: torch.Tensor, steps: int = 500) -> torch.Tensor:
    """The policy that minimises the weighted loss, from the reference on, by LBFGS."""
    logits_V = REF.log().clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [logits_V],
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        h_V = logits_V.log_softmax(-1) - REF.log()
        total = reduce_items(loss(h_V[CHOSEN_P], h_V[REJECTED_P]), len(CHOSEN_P), weights_P=weights_P)
        total.backward()
        return total

    optimiser.step(closure)
    return logits_V.detach().softmax(-1)


def ipo_optimum(chances_VV: torch.Tensor, tau: float) -> torch.Tensor:
    """argmax E_{y~π, y'~μ}[p(y ≻ y')] − τ·KL(π‖π_ref), μ uniform: π ∝ π_ref·exp(mean_y' p(y ≻ y')/τ)."""
    return torch.softmax(REF.log() + chances_VV.mean(-1) / tau, dim=-1)


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_ipo_reaches_its_closed_form(tau: float) -> None:
    # IPO's objective is linear in the preferences, not in their logits: its optimum weighs each answer by the
    # mean chance that it wins. p(y ≻ y) = ½ belongs to the mean.
    chances_VV = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])
    policy = converge(lambda w, r: PAIR_LOSSES["ipo"](w, r, beta=tau), CHANCES_P)
    assert total_variation(policy, ipo_optimum(chances_VV, tau)) < 0.001
    # DPO's optimum at the same strength, and the optimum at half of it, are others.
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, tau)) > 0.05
    assert total_variation(policy, ipo_optimum(chances_VV, tau / 2)) > 0.05


def test_ipo_has_an_optimum_where_pairs_always_agree_and_dpo_has_none() -> None:
    hard_P = (CHANCES_P > 0.5).double()
    tau = 0.5
    policy = converge(lambda w, r: PAIR_LOSSES["ipo"](w, r, beta=tau), hard_P)
    # Every gap is drawn to 1 and no further, so that no answer vanishes.
    assert float(policy.min()) > 0.01
    assert float(converge(lambda w, r: PAIR_LOSSES["sigmoid"](w, r, beta=tau), hard_P).max()) > 0.99


@pytest.mark.parametrize("flips", [0.1, 0.3])
def test_robust_dpo_on_flipped_labels_is_dpo_on_clean_ones(flips: float) -> None:
    """Unbiased pair by pair, so in value, in gradient and in where it ends."""
    torch.manual_seed(0)
    w, r = torch.randn(2, 7, dtype=torch.float64)
    robust = PAIR_LOSSES["robust"]
    mean = (1 - flips) * robust(w, r, beta=0.3, label_smoothing=flips) + flips * robust(
        r, w, beta=0.3, label_smoothing=flips
    )
    torch.testing.assert_close(mean, sigmoid_loss(w, r, beta=0.3), rtol=0, atol=1e-12)

    flipped_P = (1 - flips) * CHANCES_P + flips * (1 - CHANCES_P)
    optimum = reverse_kl_optimum(REF, REWARDS, 0.3)
    policy = converge(lambda w, r: robust(w, r, beta=0.3, label_smoothing=flips), flipped_P)
    assert total_variation(policy, optimum) < 0.001
    # DPO takes the flipped labels at their word and ends nearer to the reference; the conservative loss
    # smooths them once more.
    for smoothing in (0.0, flips):
        loss = functools.partial(sigmoid_loss, beta=0.3, label_smoothing=smoothing)
        assert total_variation(converge(loss, flipped_P), optimum) > 0.03


@pytest.mark.parametrize("name", ["sigmoid", "exo"])
def test_conservative_losses_stop_at_the_smoothed_label(name: str) -> None:
    # One pair, always judged alike: h_w − h_l = log((1 − ε)/ε)/β. DPO's would grow without end.
    smoothing, beta = 0.1, 2.0
    only_P = ((CHOSEN_P == 0) & (REJECTED_P == 1)).double()
    policy = converge(
        lambda w, r: PAIR_LOSSES[name](w, r, beta=beta, label_smoothing=smoothing), only_P, steps=2000
    )
    h_V = (policy / REF).log()
    assert float(h_V[0] - h_V[1]) == pytest.approx(math.log(9) / beta, abs=1e-3)


def test_conservative_dpo_shrinks_the_reward_that_it_finds() -> None:
    # Exact Bradley–Terry pairs, smoothed: the optimum's gap is logit((1 − ε)p + ε(1 − p))/β for two answers.
    smoothing, beta, p = 0.2, 1.0, 0.8
    weights_P = torch.zeros_like(CHANCES_P)
    weights_P[(CHOSEN_P == 0) & (REJECTED_P == 1)] = p
    weights_P[(CHOSEN_P == 1) & (REJECTED_P == 0)] = 1 - p
    policy = converge(lambda w, r: sigmoid_loss(w, r, beta=beta, label_smoothing=smoothing), weights_P)
    h_V = (policy / REF).log()
    believed = (1 - smoothing) * p + smoothing * (1 - p)
    assert float(h_V[0] - h_V[1]) == pytest.approx(math.log(believed / (1 - believed)) / beta, abs=1e-4)


def test_sppo_pulls_each_side_to_its_own_target() -> None:
    # For a pair seen once the minimum is where h_w = +1/(2β) and h_l = −1/(2β), whatever the others do.
    only_P = ((CHOSEN_P == 0) & (REJECTED_P == 1)).double()
    policy = converge(lambda w, r: PAIR_LOSSES["sppo"](w, r, beta=1.0), only_P)
    h_V = (policy / REF).log()
    assert h_V[:2].tolist() == pytest.approx([0.5, -0.5], abs=1e-3)


def test_apo_and_nca_hold_the_chosen_answer_where_dpo_lets_it_fall() -> None:
    """The losses that look at each side, at a policy that has become less likely to say either answer."""
    for name, sign in (("sigmoid", 0), ("nca", -1), ("apo_zero", -1), ("apo_down", 1)):
        w, r = (torch.tensor([h], dtype=torch.float64, requires_grad=True) for h in (-1.0, -4.0))
        PAIR_LOSSES[name](w, r, beta=1.0).backward()
        assert w.grad is not None
        assert r.grad is not None
        both = float(w.grad + r.grad)  # along (1, 1): what happens to the two together
        assert (abs(both) < 1e-12) if sign == 0 else (both * sign > 0), name


def test_simpo_and_orpo_move_token_means_apart_and_not_lengths() -> None:
    """The same mean log-probability a token gives the same loss, however long; sums would not."""
    sums = {8: torch.tensor([-4.0], dtype=torch.float64), 2: torch.tensor([-1.0], dtype=torch.float64)}
    other = torch.tensor([-1.5], dtype=torch.float64)
    for loss in (
        lambda w: sigmoid_loss(w, other, beta=2.0, gamma=1.0),
        lambda w: odds_ratio_loss(w, other, beta=0.1),
    ):
        assert float(loss(sums[8] / 8)) == float(loss(sums[2] / 2))
    w, r = torch.tensor([-0.5], requires_grad=True), torch.tensor([-1.5], requires_grad=True)
    for value in (sigmoid_loss(w, r, beta=2.0, gamma=1.0), odds_ratio_loss(w, r, beta=0.1)):
        grad_w, grad_l = torch.autograd.grad(value, (w, r))
        assert grad_w.item() < 0 < grad_l.item()
    # γ is the lead at which SimPO's pull has halved; without it half is at no lead at all.
    lead = torch.tensor([0.0, 0.5], requires_grad=True)
    sigmoid_loss(lead, torch.zeros(2), beta=2.0, gamma=1.0).sum().backward()
    assert lead.grad is not None
    assert lead.grad[1].item() == pytest.approx(-2.0 * 0.5)


def test_orpo_has_an_optimum_where_the_odds_ratio_alone_has_none() -> None:
    """NLL + λ·odds ratio with exact preferences is finite; without the likelihood it runs to a corner."""
    hard_P = (CHANCES_P > 0.5).double()

    def orpo(nll: float) -> torch.Tensor:
        ref_P = REF.log()[CHOSEN_P], REF.log()[REJECTED_P]

        def loss(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            chosen, rejected = w + ref_P[0], r + ref_P[1]
            return odds_ratio_loss(chosen, rejected, beta=0.1) - nll * chosen

        return converge(loss, hard_P)

    wins_V = torch.zeros(6, dtype=torch.float64).index_add(0, CHOSEN_P, hard_P)
    with_likelihood = orpo(1.0)
    # Beside the likelihood's own optimum (the share of wins), moved towards the best answer.
    assert total_variation(with_likelihood, wins_V / wins_V.sum()) < 0.1
    assert float(with_likelihood[0]) > float(wins_V[0] / wins_V.sum()) + 0.005
    assert float(orpo(0.0)[0]) > 0.95
