"""Direct Preference Optimization's loss. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.preference import dpo_loss
from trimtab.objectives.reduce import reduce_items, response_sums


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    # β = 0.1. Chosen: −10 against the reference's −11, r̂_w = 0.1·1 = 0.1.
    # Rejected: −12 against −11.5, r̂_l = 0.1·(−0.5) = −0.05. Logit 0.15, loss ln(1 + e^−0.15) = 0.6210.
    # Reference forgotten: logit 0.2, 0.5981. Sides swapped: ln(1 + e^0.15) = 0.7710. No β: 0.2014.
    loss, chosen, rejected = dpo_loss(of(-10.0), of(-12.0), of(-11.0), of(-11.5), beta=0.1)
    assert loss.item() == pytest.approx(0.6210, abs=5e-5)
    assert chosen.item() == pytest.approx(0.1)
    assert rejected.item() == pytest.approx(-0.05)


def test_dpo_reference_free_by_hand() -> None:
    # β = 0.5, −45.6 against −28.3: logit 0.5·(−45.6 + 28.3) = −8.65, σ = 1.751e-4,
    # loss 8.65 + ln(1 + e^−8.65) = 8.65 + 0.000175 = 8.6502. A rounded σ gives 8.62; sides swapped 0.0002.
    loss, chosen, rejected = dpo_loss(of(-45.6), of(-28.3), None, None, beta=0.5)
    assert loss.item() == pytest.approx(8.6502, abs=5e-5)
    assert (chosen - rejected).item() == pytest.approx(-8.65, abs=1e-12)
    assert torch.exp(-loss).item() == pytest.approx(1.751e-4, abs=5e-8)


def test_dpo_starts_at_ln_2_and_at_the_reference_every_pair_weighs_one_half() -> None:
    mine, other = of(-3.0, -40.0).requires_grad_(), of(-9.0, -2.0)
    loss, chosen, rejected = dpo_loss(mine, other, mine.detach(), other, beta=0.3)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.6931472, 0.6931472], abs=5e-8)
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]
    # β·σ(0) = 0.3·0.5
    assert mine.grad is not None
    assert mine.grad.tolist() == pytest.approx([-0.15, -0.15])


def test_dpo_gradient_weight_is_sigma_of_rejected_minus_chosen() -> None:
    # As in the first test, r̂_l − r̂_w = −0.15: weight σ(−0.15) = 0.46257, gradient ∓0.1·0.46257 = ∓0.0463.
    # The weight with the sides swapped, σ(+0.15), would give ∓0.0537.
    chosen, rejected = of(-10.0).requires_grad_(), of(-12.0).requires_grad_()
    dpo_loss(chosen, rejected, of(-11.0), of(-11.5), beta=0.1)[0].backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0463, abs=5e-5)
    assert rejected.grad.item() == pytest.approx(0.0463, abs=5e-5)


def test_dpo_weight_is_large_where_the_pair_is_wrongly_ordered() -> None:
    chosen = of(-30.0, -10.0).requires_grad_()
    dpo_loss(chosen, of(-10.0, -30.0), None, None, beta=0.5)[0].sum().backward()
    wrong, right = (chosen.grad if chosen.grad is not None else of(0, 0)).tolist()
    # ∓0.5·σ(±10): 0.499977 where the order is wrong, 0.0000227 where it is right already.
    assert wrong == pytest.approx(-0.499977, abs=1e-6)
    assert right == pytest.approx(-2.27e-5, abs=1e-7)


def test_dpo_does_not_overflow() -> None:
    # log(σ(x)) written out would be log(0) = −inf here; the loss is the logit itself, 0.5·2000.
    loss, *_ = dpo_loss(of(-2000.0), of(0.0), None, None, beta=0.5)
    assert loss.item() == pytest.approx(1000.0)


def test_dpo_shown_rewards_carry_no_gradient_and_one_reference_is_refused() -> None:
    chosen = of(-1.0).requires_grad_()
    _, *shown = dpo_loss(chosen, of(-2.0), None, None, beta=1.0)
    assert not any(value.requires_grad for value in shown)
    with pytest.raises(ValueError, match="both"):
        dpo_loss(chosen, of(-2.0), of(-1.0), None, beta=1.0)


def test_dpo_masked_tokens_change_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    reference = torch.randn(2, 3, dtype=torch.float64)

    def loss_and_gradient(junk: float) -> tuple[float, torch.Tensor]:
        values = torch.tensor([[-1.0, -2.0, junk], [-0.5, junk, junk]], dtype=torch.float64)
        values.requires_grad_()
        sums, refs = response_sums(values, mask), response_sums(reference, mask)
        loss = dpo_loss(sums[:1], sums[1:], refs[:1], refs[1:], beta=0.2)[0].sum()
        (gradient,) = torch.autograd.grad(loss, values)
        return loss.item(), gradient

    first, second = loss_and_gradient(0.0), loss_and_gradient(123.0)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert not first[1][~mask].any()


def test_dpo_sums_tokens_where_the_bug_would_average_them() -> None:
    # Chosen: two tokens at −1, rejected: one at −1.5. Sums −2 and −1.5, β = 1: logit −0.5, loss 0.9741.
    # Averages −1 and −1.5 would give logit +0.5 and 0.4741: the other side wins.
    mask = torch.tensor([[True, True], [True, False]])
    sums = response_sums(torch.tensor([[-1.0, -1.0], [-1.5, 9.0]], dtype=torch.float64), mask)
    loss, *_ = dpo_loss(sums[:1], sums[1:], None, None, beta=1.0)
    assert loss.item() == pytest.approx(0.9741, abs=5e-5)


def test_dpo_weighted_pairs_by_hand() -> None:
    # Losses ln 2 each; weights 3 and 1 over a count of two pairs: (3 + 1)/2·0.6931 = 1.3863.
    loss, *_ = dpo_loss(of(0.0, 0.0), of(0.0, 0.0), None, None, beta=1.0)
    assert reduce_items(loss, 2, weights_P=of(3.0, 1.0)).item() == pytest.approx(1.3863, abs=5e-5)


@pytest.mark.parametrize("reference_free", [False, True])
def test_dpo_gradcheck(reference_free: bool) -> None:
    torch.manual_seed(0)
    policy = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    refs = [None, None] if reference_free else [torch.randn(3, dtype=torch.float64) for _ in range(2)]

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return dpo_loss(chosen, rejected, *refs, beta=0.7)[0]

    assert torch.autograd.gradcheck(loss, tuple(policy))
