"""KTO's loss and its baseline. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.reduce import response_sums
from trimtab.objectives.unpaired import kto_loss, mismatched_kl

GOOD, BAD = torch.tensor([True]), torch.tensor([False])


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kto_by_hand() -> None:
    # log π −10 against −12: h = 2; z 0.5, β 0.1: β(h − z) = 0.15, σ = 0.537430.
    # Good: 1 − 0.537430 = 0.462570. Bad: 1 − σ(−0.15) = 0.537430. Baseline forgotten: 0.450166, 0.549834.
    for label, wanted in ((GOOD, 0.462570), (BAD, 0.537430)):
        loss, reward = kto_loss(of(-10.0), of(-12.0), label, 0.5, beta=0.1)
        assert loss.item() == pytest.approx(wanted, abs=1e-6)
        assert reward.item() == pytest.approx(0.2)


def test_kto_class_weights_by_hand() -> None:
    # 4/3·0.462570 = 0.616760 and 0.5·0.537430 = 0.268715. Exchanged: 0.231285 and 0.716573.
    label = torch.tensor([True, False])
    weights = {"desirable_weight": 4 / 3, "undesirable_weight": 0.5}
    loss, _ = kto_loss(of(-10.0, -10.0), of(-12.0, -12.0), label, 0.5, beta=0.1, **weights)
    assert loss.tolist() == pytest.approx([0.616760, 0.268715], abs=1e-6)


def test_kto_without_a_baseline_is_apo_zero_unpaired() -> None:
    policy, ref, label = of(-3.0, -8.0), of(-4.0, -6.0), torch.tensor([True, False])
    loss, _ = kto_loss(policy, ref, label, 0.0, beta=0.3)
    r = 0.3 * (policy - ref)
    assert loss.tolist() == pytest.approx([1 - torch.sigmoid(r[0]).item(), torch.sigmoid(r[1]).item()])


def test_kto_gradient_up_for_good_down_for_bad_and_none_at_the_ends() -> None:
    label = torch.tensor([True, False, True, False, True, False])
    policy = of(2.0, 2.0, 400.0, 400.0, -400.0, -400.0).requires_grad_()
    loss, _ = kto_loss(policy, torch.zeros(6, dtype=torch.float64), label, 0.5, beta=0.1)
    loss.sum().backward()
    assert policy.grad is not None
    # ∓0.1·0.537430·0.462570 = ∓0.024860; DPO's weight would stay near 0.1 for what is badly wrong.
    assert policy.grad[:2].tolist() == pytest.approx([-0.024860, 0.024860], abs=1e-6)
    assert policy.grad[2:].abs().max().item() < 1e-15


def test_the_baseline_by_hand_is_clamped_and_detached() -> None:
    # Gaps 1 and 0.5: mean 0.75. Reversed they are below 0, where no KL can be. Summed: 1.5.
    policy = of(-3.0, -5.0).requires_grad_()
    z_ref = mismatched_kl(policy, of(-4.0, -5.5))
    assert z_ref.item() == pytest.approx(0.75)
    assert not z_ref.requires_grad
    assert mismatched_kl(of(-4.0, -5.5), of(-3.0, -5.0)).item() == 0.0
    loss, reward = kto_loss(policy, of(-4.0, -5.5), torch.tensor([True, True]), z_ref, beta=0.1)
    assert loss.requires_grad
    assert not reward.requires_grad


def test_a_baseline_with_a_gradient_would_be_another_loss() -> None:
    # Were z_ref the batch's own mean reward with its gradient, equal good responses would not be moved.
    policy = of(1.0, 1.0).requires_grad_()
    z_ref = policy.mean()
    kto_loss(policy, of(0.0, 0.0), torch.tensor([True, True]), z_ref, beta=0.1)[0].sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.025, -0.025])


def test_kto_masked_tokens_change_nothing_and_tokens_are_summed() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    label = torch.tensor([True, False])

    def loss_and_gradient(junk: float) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.tensor([[-1.0, -2.0, junk], [-0.5, junk, junk]], dtype=torch.float64)
        values.requires_grad_()
        sums = response_sums(values, mask)
        loss = kto_loss(sums, of(-2.0, -1.0), label, 0.0, beta=1.0)[0]
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        return loss.detach(), gradient

    first, second = loss_and_gradient(0.0), loss_and_gradient(123.0)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not first[1][~mask].any()
    # h = −3 + 2 = −1 and −0.5 + 1 = 0.5: 1 − σ(−1) = 0.731059, 1 − σ(−0.5) = 0.622459. Means: 0.622459 first.
    assert first[0].tolist() == pytest.approx([0.731059, 0.622459], abs=1e-6)


def test_kto_gradcheck() -> None:
    torch.manual_seed(0)
    policy = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ref, label = torch.randn(4, dtype=torch.float64), torch.tensor([True, False, False, True])

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return kto_loss(policy, ref, label, 0.3, beta=0.7, desirable_weight=1.2, undesirable_weight=0.8)[0]

    assert torch.autograd.gradcheck(loss, (policy,))
