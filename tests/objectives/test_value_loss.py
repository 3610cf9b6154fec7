"""The critic's clipped loss. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.reduce import global_count, reduce_tokens
from trimtab.objectives.value import clipped_value_loss


def loss_of(value: float, target: float, *, clip: float = 0.2) -> tuple[float, float, bool]:
    """Loss, its gradient with respect to V, and whether it was clipped, from V_old = 1."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), target).double()
    loss, clipped = clipped_value_loss(values, old, returns, clip=clip)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    return loss.item(), gradient.item(), bool(clipped)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        # Not moved: ½·1². Without the ½ it would be 1.
        (1.0, 0.0, 0.500, 1.0, False),
        # Within the clip: ½·1.1².
        (1.1, 0.0, 0.605, 1.1, False),
        # Moved 0.5 towards the target: V_clip = 0.8, ½·max(0.25, 0.64). The smaller of the two would be
        # 0.125.
        (0.5, 0.0, 0.320, 0.0, True),
        (0.5, 0.4, 0.080, 0.0, True),
        # Moved 0.5 away from it: ½·max(2.25, 1.44); the clip must not stop the way back.
        (1.5, 0.0, 1.125, 1.5, False),
        # Past the target: V_clip = 0.8, ½·max(0.04, 0.01), and the gradient points back up.
        (0.5, 0.7, 0.020, -0.2, False),
    ],
)
def test_value_loss_by_hand(value: float, target: float, loss: float, gradient: float, clipped: bool) -> None:
    assert loss_of(value, target) == (pytest.approx(loss), pytest.approx(gradient), clipped)


def test_an_infinite_clip_is_the_squared_error() -> None:
    assert loss_of(0.5, 0.0, clip=float("inf")) == (pytest.approx(0.125), pytest.approx(0.5), False)


@pytest.mark.parametrize("clip", [0.0, -0.1, float("nan")])
def test_a_clip_that_lets_nothing_move_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        loss_of(0.5, 0.0, clip=clip)


def test_rounding_inside_the_clip_does_not_count_as_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = 0.1 * torch.rand(3, 40, 50, generator=generator) - 0.05
    _, clipped = clipped_value_loss(values, old, returns, clip=0.2)
    assert not clipped.any()
    # V_old + (V − V_old) is not V in fp32, so comparing the two errors alone would say otherwise.
    assert ((old + (values - old) - returns).square() > (values - returns).square()).any()


def test_old_values_and_returns_carry_no_gradient() -> None:
    tensors = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    clipped_value_loss(*tensors, clip=0.2)[0].sum().backward()
    assert [t.grad is None for t in tensors] == [False, True, True]


def test_tokens_that_do_not_count_change_nothing_and_splits_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    values, old, returns = torch.randn(3, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]]).bool()
    count = global_count([mask], "token_mean")

    def gradient(values: torch.Tensor, returns: torch.Tensor, parts: int) -> tuple[float, torch.Tensor]:
        values = values.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(3).chunk(parts):
            loss, _ = clipped_value_loss(values[rows], old[rows], returns[rows], clip=0.3)
            total = total + reduce_tokens(loss, mask[rows], count, "token_mean")
        (grad,) = torch.autograd.grad(total, values)
        return total.item(), grad

    whole, grad = gradient(values, returns, 1)
    assert not grad[~mask].any()
    other, other_grad = gradient(values, returns.masked_fill(~mask, 99.0), 1)
    assert other == whole
    assert torch.equal(other_grad, grad)
    split, split_grad = gradient(values, returns, 3)
    assert split == pytest.approx(whole, abs=1e-14)
    torch.testing.assert_close(split_grad, grad, atol=1e-14, rtol=0)


@pytest.mark.parametrize("clip", [0.3, float("inf")])
def test_value_loss_gradient_matches_finite_differences(clip: float) -> None:
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    values.requires_grad_()
    assert clip > 1 or clipped_value_loss(values, old, returns, clip=clip)[1].any()
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, clip=clip)[0], (values,))
