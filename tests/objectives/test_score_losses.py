"""Regression on ratings and the loss of steps. The numbers are worked out by hand in the comments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from trimtab.objectives.reduce import reduce_items
from trimtab.objectives.scores import rating_loss, step_loss

NAN = float("nan")
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BOTH = [rating_loss, step_loss]


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 4, 2, 1 and 3 entries, the last with a hole."""
    generator = torch.Generator().manual_seed(3)
    scores, given = (torch.rand(4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1]]).bool()
    return 3 * scores - 1.5, given, mask


def test_rating_loss_by_hand() -> None:
    # (2.5 − 4)² = 2.25, with half of it 1.125; the slope 2·(2.5 − 4) = −3 raises the score.
    score = of(2.5).requires_grad_()
    got = rating_loss(score, of(4.0), torch.tensor([True]))
    assert got.item() == 2.25
    got.sum().backward()
    assert score.grad is not None
    assert score.grad.item() == -3.0


def test_step_loss_by_hand() -> None:
    # Logit 1: −ln σ(1) = 0.3133 for a right step, −ln σ(−1) = 1.3133 for a wrong one, and at y = 0.25
    # 0.25·0.3133 + 0.75·1.3133 = 1.0633 (0.5633 with the label turned about). Slope σ(1) − 0.25 = 0.4811.
    logits = of(1.0, 1.0, 1.0).requires_grad_()
    got = step_loss(logits, of(1.0, 0.0, 0.25), torch.ones(3, dtype=torch.bool))
    assert got.tolist() == pytest.approx([0.3133, 1.3133, 1.0633], abs=5e-5)
    got.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-0.2689, 0.7311, 0.4811], abs=5e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_the_score_moves_to_what_is_given(loss: Loss) -> None:
    scores = of(0.0, 0.0).requires_grad_()
    loss(scores, of(1.0, 0.1), torch.ones(2, dtype=torch.bool)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0].item() < 0
    assert scores.grad[1].item() > (0 if loss is step_loss else -1)


@pytest.mark.parametrize("loss", BOTH)
def test_what_is_masked_changes_nothing(loss: Loss) -> None:
    scores, given, mask = ragged()
    plain = scores.clone().requires_grad_()
    whole = loss(plain, given, mask)
    (gradient,) = torch.autograd.grad(whole.sum(), plain)
    assert not gradient[~mask].any()
    dirty = scores.masked_fill(~mask, NAN).requires_grad_()
    other = loss(dirty, given.masked_fill(~mask, NAN), mask)
    assert torch.equal(other, whole)
    assert torch.equal(torch.autograd.grad(other.sum(), dirty)[0], gradient)


@pytest.mark.parametrize("loss", BOTH)
def test_padding_and_splitting_change_nothing(loss: Loss) -> None:
    scores, given, mask = ragged()
    whole, count = loss(scores, given, mask), int(mask.sum())
    alone = [loss(scores[n, keep], given[n, keep], mask[n, keep]) for n, keep in enumerate(mask)]
    assert sum(float(reduce_items(part, count)) for part in alone) == pytest.approx(
        float(reduce_items(whole, count))
    )
    # A mean over each row's own entries would weigh them otherwise.
    means = sum(float(part.mean()) for part in alone) / 4
    assert abs(means - float(reduce_items(whole, count))) > 1e-3


@pytest.mark.parametrize("loss", BOTH)
def test_gradients_match_finite_differences(loss: Loss) -> None:
    scores, given, mask = ragged()
    assert torch.autograd.gradcheck(lambda s: loss(s, given, mask), (scores.requires_grad_(),))


@pytest.mark.parametrize("loss", BOTH)
def test_what_is_given_carries_no_gradient(loss: Loss) -> None:
    scores, given, mask = ragged()
    given.requires_grad_()
    loss(scores.requires_grad_(), given, mask).sum().backward()
    assert given.grad is None


@pytest.mark.parametrize("label", [-1.0, 1.5, NAN])
def test_a_label_that_is_no_probability_is_refused(label: float) -> None:
    with pytest.raises(ValueError, match="probability, from 0 to 1"):
        step_loss(of(0.0), of(label), torch.tensor([True]))


def test_step_loss_is_finite_where_sigma_is_0() -> None:
    assert step_loss(of(-1000.0, 1000.0), of(1.0, 1.0), torch.ones(2).bool()).tolist() == [1000.0, 0.0]


def test_agreement_with_torch() -> None:
    scores, given, mask = ragged()
    torch.testing.assert_close(
        step_loss(scores, given, mask)[mask],
        F.binary_cross_entropy_with_logits(scores, given, reduction="none")[mask],
    )
    torch.testing.assert_close(
        rating_loss(scores, given, mask)[mask], F.mse_loss(scores, given, reduction="none")[mask]
    )
    # A head of two outputs and a softmax, as in TRL: the difference of its two logits is ours.
    two = torch.stack([torch.zeros_like(scores), scores], -1)[mask]
    hard = (given > 0.5).double()
    torch.testing.assert_close(
        step_loss(scores, hard, mask)[mask], F.cross_entropy(two, hard[mask].long(), reduction="none")
    )
