"""What a group drawn at several temperatures teaches, enumerated: nothing is biased by the mix."""

from __future__ import annotations

import itertools

import pytest
import torch

from trimtab.kernels.logps import selected_logps
from trimtab.objectives.advantages import group_advantages
from trimtab.objectives.policy import clipped_policy_loss

REWARDS = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
TEMPERATURES = torch.tensor([0.6, 1.0, 1.7], dtype=torch.float64)


def learned(scored_at: torch.Tensor) -> torch.Tensor:
    """The expected gradient of the surrogate over all groups of three, with ratios at ``scored_at``."""
    logits = torch.tensor([0.2, -0.4, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(4, dtype=torch.float64)
    drawn = [(logits.detach() / t).softmax(-1) for t in TEMPERATURES]
    for group in itertools.product(range(4), repeat=3):
        answers = torch.tensor(group)
        weight = torch.stack([p[y] for p, y in zip(drawn, group, strict=True)]).prod()
        policy_logps, _ = selected_logps(logits.expand(3, 4), answers, scored_at)
        advantages = group_advantages(REWARDS[answers][None], baseline="leave_one_out", scale="none")
        loss, _ = clipped_policy_loss(
            policy_logps[:, None],
            policy_logps.detach()[:, None],
            advantages.view(3, 1),
            clip_low=0.2,
            clip_high=0.2,
        )
        total -= weight * torch.autograd.grad(loss.sum(), logits)[0]
    return total


def test_the_gradient_is_the_sum_of_each_strategys_policy_gradient() -> None:
    logits = torch.tensor([0.2, -0.4, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    values = sum((logits / t).softmax(-1) @ REWARDS for t in TEMPERATURES)
    truth = torch.autograd.grad(values, logits)[0]
    assert learned(TEMPERATURES) == pytest.approx(truth, abs=1e-12)
    # Scored at one temperature for all, as a ratio at a run's own temperature would be, it is another.
    assert (learned(torch.ones(3)) - truth).abs().max() > 0.04
