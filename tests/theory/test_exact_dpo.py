"""DPO on all pairs, each in both orders, weighted by their exact Bradley–Terry probabilities."""

from __future__ import annotations

import pytest
import torch
from theory_optima import forward_kl_optimum, reverse_kl_optimum, total_variation

from trimtab.objectives.preference import dpo_loss
from trimtab.objectives.reduce import reduce_items

REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)


def converge(beta: float, *, reference_free: bool = False, hard: bool = False) -> torch.Tensor:
    """The policy that minimises the loss, from the reference on, by LBFGS."""
    chosen_P, rejected_P = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j]).T
    weights_P = torch.sigmoid(REWARDS[chosen_P] - REWARDS[rejected_P])
    if hard:
        weights_P = (weights_P > 0.5).double()
    ref_V = REF.log()
    logits_V = ref_V.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [logits_V], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        policy_V = logits_V.log_softmax(-1)
        loss_P, _, _ = dpo_loss(
            policy_V[chosen_P],
            policy_V[rejected_P],
            None if reference_free else ref_V[chosen_P],
            None if reference_free else ref_V[rejected_P],
            beta=beta,
        )
        total = reduce_items(loss_P, len(loss_P), weights_P=weights_P)
        total.backward()
        return total

    optimiser.step(loss)
    return logits_V.detach().softmax(-1)


@pytest.mark.parametrize("beta", [0.1, 0.2, 0.4])
def test_dpo_reaches_the_reverse_kl_optimum(beta: float) -> None:
    policy = converge(beta)
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, beta)) < 0.001
    # A wrong strength and the other divergence are far off.
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, 3 * beta)) > 0.05
    assert total_variation(policy, forward_kl_optimum(REF, REWARDS, beta)) > 0.05


def test_without_the_reference_the_optimum_has_no_anchor() -> None:
    policy = converge(0.3, reference_free=True)
    uniform = torch.full_like(REF, 1 / 6)
    assert total_variation(policy, reverse_kl_optimum(uniform, REWARDS, 0.3)) < 0.001
    assert total_variation(policy, reverse_kl_optimum(REF, REWARDS, 0.3)) > 0.1


def test_pairs_that_always_agree_have_no_optimum() -> None:
    # Without the pairs' weights (the better answer always chosen) the margins grow without limit.
    policy = converge(0.3, hard=True)
    assert float(policy.max()) > 0.99
