"""KTO's direction on answers that can be listed: up, down, saturated at both ends, held by its baseline."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.reduce import reduce_items
from trimtab.objectives.unpaired import kto_loss, mismatched_kl

REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
GOOD_CHANCE = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)
"""Chance that an answer is judged good; the exact expectation over labels is taken."""


def descend(
    steps: int, *, baseline: bool = True, weights: tuple[float, float] = (1.0, 1.0), beta: float = 1.0
) -> torch.Tensor:
    """Answers drawn from π_ref, each with both labels by its chance; plain gradient descent."""
    logits_V = REF.log().clone()
    both = torch.tensor([True] * 6 + [False] * 6)
    weights_N = torch.cat([REF * GOOD_CHANCE, REF * (1 - GOOD_CHANCE)])
    for _ in range(steps):
        logits_V.requires_grad_(True)
        policy_V = logits_V.log_softmax(-1)
        # Mismatched responses come from the data's own distribution.
        gap_V = policy_V.detach() - REF.log()
        z_ref = (REF * gap_V).sum().clamp(min=0) if baseline else 0.0
        loss_N, _ = kto_loss(
            policy_V.repeat(2),
            REF.log().repeat(2),
            both,
            z_ref,
            beta=beta,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
        )
        (gradient,) = torch.autograd.grad(reduce_items(loss_N, 1, weights_P=weights_N), logits_V)
        logits_V = (logits_V - 2.0 * gradient).detach()
    return logits_V.softmax(-1)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.6, 1.0), (1.0, 1.6)])
def test_the_first_step_goes_up_for_the_good_and_down_for_the_bad(weights: tuple[float, float]) -> None:
    # At π_ref every σ is ½, so that answer y is pushed by π_ref(y)·(λ_D·p − λ_U·(1 − p))·β/4, less its share
    # of the mean push. With λ_D 1.6 an answer that is good two times in five is pushed up: 0.64 > 0.6.
    push = weights[0] * GOOD_CHANCE - weights[1] * (1 - GOOD_CHANCE)
    assert (push[2] > 0) == (weights[0] > weights[1])
    wanted = 2.0 * REF * (push - (REF * push).sum()) / 4
    moved = (descend(1, weights=weights) / REF).log()
    torch.testing.assert_close(moved - moved.mean(), wanted - wanted.mean(), rtol=0, atol=1e-12)


def test_in_the_long_run_the_majority_label_decides() -> None:
    # σ saturates: every answer goes to where λ_D·p against λ_U·(1 − p) sends it, and the best alone is left.
    # The paper proves as much: with noise, KTO's optimum is the majority's answer, not a soft preference.
    policy = descend(4000)
    assert float(policy[[2, 4]].max()) < 0.01
    assert float(policy[0] + policy[5]) > 0.8


def test_what_is_learned_or_hopeless_is_left_alone() -> None:
    h = torch.linspace(-40, 40, 81, dtype=torch.float64).requires_grad_()
    for label, sign in ((True, -1), (False, 1)):
        labels = torch.full((81,), label)
        (gradient,) = torch.autograd.grad(kto_loss(h, torch.zeros_like(h), labels, 2.0, beta=1.0)[0].sum(), h)
        assert bool((sign * gradient >= 0).all())
        # Strongest where h is the baseline, 2: not at 0, where it would be without one. λβ/4 there.
        assert int(gradient.abs().argmax()) == 42
        assert gradient.abs().max().item() == pytest.approx(0.25)
        assert gradient[[0, -1]].abs().max().item() < 1e-15


def test_the_baseline_estimates_the_kl_that_it_stands_for() -> None:
    # Were y_j drawn from π, its mean would be KL(π‖π_ref) itself; from the data it is a biased stand-in.
    policy = torch.softmax(torch.arange(6, dtype=torch.float64), -1)
    exact = float((policy * (policy / REF).log()).sum())
    torch.manual_seed(0)
    drawn = torch.multinomial(policy, 200_000, replacement=True)
    assert float(mismatched_kl(policy.log()[drawn], REF.log()[drawn])) == pytest.approx(exact, abs=0.02)
    # Over answers drawn from π_ref the mean is −KL(π_ref‖π), which the clamp makes 0.
    drawn = torch.multinomial(REF, 2000, replacement=True)
    assert float(mismatched_kl(policy.log()[drawn], REF.log()[drawn])) == 0.0
