"""SPIN and online DPO with every pair that could be drawn, each with its chance: their exact fixed points.

SPIN's expected loss, y_w ~ p_data and y_l ~ π_t, has its minimum at π ∝ π_t·(p_data/π_t)^(1/β) (Chen et al.,
2024, on the opponent's update under the logistic loss). So log(π_{t+1}/p_data) is (1 − 1/β)·log(π_t/p_data)
up to a constant: p_data in one iteration at β = 1, a contraction for β > ½, and below that away from p_data,
unless few steps are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from theory_optima import reverse_kl_optimum, total_variation

from trimtab.objectives.preference import sigmoid_loss
from trimtab.objectives.reduce import reduce_items

REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
DATA = torch.tensor([0.3, 0.1, 0.2, 0.05, 0.25, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)


def expected_loss(
    logits_V: torch.Tensor, chance_VV: torch.Tensor, ref_V: torch.Tensor, beta: float
) -> torch.Tensor:
    """Σ_ij chance_ij·ℓ(i chosen, j rejected), the chances being constants."""
    ratio_V = logits_V.log_softmax(-1) - ref_V.log()
    chosen_P, rejected_P = torch.cartesian_prod(*[torch.arange(len(ref_V))] * 2).T
    loss_P = sigmoid_loss(ratio_V[chosen_P], ratio_V[rejected_P], beta=beta)
    return reduce_items(loss_P, 1, weights_P=chance_VV.flatten())


def spin_gradient(policy: torch.Tensor, beta: float) -> torch.Tensor:
    """∇ of the first step of an iteration: the opponent is the policy itself."""
    logits_V = policy.log().requires_grad_(True)
    expected_loss(logits_V, DATA[:, None] * policy[None, :], policy, beta).backward()
    assert logits_V.grad is not None
    return logits_V.grad


def iterate(opponent: torch.Tensor, ref: torch.Tensor, beta: float, *, steps: int = 0) -> torch.Tensor:
    """One iteration against samples of ``opponent``: to the minimum, or some steps of descent towards it."""
    logits_V = ref.log().requires_grad_(True)
    chance_VV = DATA[:, None] * opponent[None, :]
    if not steps:
        optimiser: torch.optim.Optimizer = torch.optim.LBFGS(
            [logits_V],
            max_iter=2000,
            tolerance_grad=1e-13,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )
    else:
        optimiser = torch.optim.SGD([logits_V], lr=1.0)

    def loss() -> float:
        optimiser.zero_grad()
        total = expected_loss(logits_V, chance_VV, ref, beta)
        total.backward()
        return float(total.detach())

    for _ in range(steps or 1):
        optimiser.step(loss)
    return logits_V.detach().softmax(-1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_spin_stands_still_at_the_data_and_nowhere_else(beta: float) -> None:
    assert float(spin_gradient(DATA, beta).abs().max()) < 1e-15
    gradient = spin_gradient(REF, beta)
    # At the start of an iteration every pair weighs β/2: ∇ = −β/2·(p_data − π_t).
    assert torch.allclose(gradient, -beta / 2 * (DATA - REF), atol=1e-15)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_an_iterations_minimum(beta: float) -> None:
    found = iterate(REF, REF, beta)
    wanted = torch.softmax(REF.log() + (DATA / REF).log() / beta, dim=-1)
    assert total_variation(found, wanted) < 1e-4
    # The reward model of DPO would be weighed by 1/β with the uniform in place of the opponent.
    other = torch.softmax(DATA.log() / beta, dim=-1)
    assert beta == 1.0 or total_variation(found, other) > 0.02


@pytest.mark.parametrize("keep_previous", [False, True])
def test_iterating_converges_to_the_data(keep_previous: bool) -> None:
    """β = 2: every iteration halves the distance; with the samples of the last iteration it takes longer."""
    last, policy, distances = REF, REF, [total_variation(REF, DATA)]
    for t in range(14):
        opponent = (policy + last) / 2 if keep_previous and t else policy
        last, policy = policy, iterate(opponent, policy, 2.0)
        distances.append(total_variation(policy, DATA))
    assert distances[0] > 0.3
    assert distances[-1] < 1e-3
    if not keep_previous:
        assert all(after < 0.6 * before for before, after in pairwise(distances[:7]))


def test_a_small_beta_needs_few_steps() -> None:
    """β = 0.1 to the minimum jumps over the data (exponent 10); a few steps of descent come nearer."""
    start = total_variation(REF, DATA)
    assert total_variation(iterate(REF, REF, 0.1), DATA) > start
    policy = REF
    for _ in range(60):
        policy = iterate(policy, policy, 0.1, steps=5)
    assert total_variation(policy, DATA) < 0.05


# ---------------------------------------------------------------- online DPO


Chances = Callable[[torch.Tensor], torch.Tensor]
"""π ``[V]`` → chance of each ordered pair that is met, before it is judged ``[V, V]``."""


def descend(chances: Chances, beta: float, *, temperature: float = 1.0) -> torch.Tensor:
    """Descent on the expected loss of pairs drawn from the policy of each step; their chances are detached.

    ``temperature`` of the log-probabilities in the loss. Each logit's gradient is divided by how often its
    answer comes up, which moves no stationary point.
    """
    judged_VV = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])
    logits_V = REF.log()
    for _ in range(4000):
        logits_V = logits_V.detach().requires_grad_(True)
        policy = logits_V.detach().softmax(-1)
        met_VV = chances(policy)
        # A pair is met in either order, and the judge prefers the one or the other.
        chance_VV = judged_VV * (met_VV + met_VV.T)
        ref_V = (REF.log() / temperature).softmax(-1)
        expected_loss(logits_V / temperature, chance_VV, ref_V, beta).backward()
        assert logits_V.grad is not None
        move_V = logits_V.grad / policy
        logits_V = logits_V.detach() - move_V / beta
        if float(move_V.abs().max()) < 1e-10:
            return logits_V.softmax(-1)
    raise AssertionError(f"still moving by {float(move_V.abs().max()):.1e}")


def cooled(policy: torch.Tensor) -> torch.Tensor:
    return (policy.log() / 0.5).softmax(-1)


@pytest.mark.parametrize(
    "chances",
    [
        pytest.param(lambda p: p[:, None] * p[None, :], id="self"),
        pytest.param(lambda p: p[:, None] * REF[None, :], id="reference"),
        pytest.param(lambda p: cooled(p)[:, None] * cooled(p)[None, :], id="sampled at temperature 0.5"),
    ],
)
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_online_dpo_stands_still_at_the_reverse_kl_optimum(chances: Chances, beta: float) -> None:
    """Whatever the pairs are drawn from, as long as everything is drawn: so too at another temperature."""
    policy = descend(chances, beta)
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, beta)) < 1e-6
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, 2 * beta)) > 0.03


def test_log_probabilities_at_the_sampling_temperature_would_tune_another_model() -> None:
    """π at temperature ½ is then the optimum of π_ref at ½; π itself, which is kept, misses its own."""
    policy = descend(lambda p: cooled(p)[:, None] * cooled(p)[None, :], 0.2, temperature=0.5)
    assert total_variation(cooled(policy), reverse_kl_optimum(cooled(REF), REWARDS, 0.2)) < 1e-6
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, 0.2)) > 0.1


def test_the_better_of_a_pair_is_made_likelier() -> None:
    logits_V = REF.log().requires_grad_(True)
    judged_VV = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])
    expected_loss(logits_V, judged_VV * REF[:, None] * REF[None, :], REF, 0.2).backward()
    assert logits_V.grad is not None
    # At the reference every pair weighs β/2: ∇_i = −β/2·π_i·Σ_j π_j·(p_ij − p_ji).
    wanted = -0.1 * REF * ((judged_VV - judged_VV.T) * REF[None, :]).sum(-1)
    assert torch.allclose(logits_V.grad, wanted, atol=1e-15)
    assert logits_V.grad[0] < 0 < logits_V.grad[4]  # the best reward, the worst
