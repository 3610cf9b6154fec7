"""Supervised fine-tuning's loss: the negative log-likelihood."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.objectives.reduce import global_count, reduce_tokens
from trimtab.objectives.supervised import sft_loss

HALF, QUARTER, EIGHTH = (math.log(p) for p in (0.5, 0.25, 0.125))


def test_sft_by_hand() -> None:
    # Probabilities 1/2, 1/4 and 1/8 cost 1, 2 and 3 times ln 2 = 0.6931. Mean: 2·0.6931 = 1.3863.
    # Forgetting the minus gives −1.3863; averaging probabilities before the log, ln(24/7)= 1.2321.
    logps = torch.tensor([[HALF, QUARTER, EIGHTH]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    count = global_count([mask], "token_mean")
    assert reduce_tokens(sft_loss(logps), mask, count, "token_mean").item() == pytest.approx(1.3863, abs=5e-5)


def test_sft_unequal_lengths_by_hand() -> None:
    # Response 1: ln 2 (one token). Response 2: 2 and 3 times ln 2. Token mean: (1+2+3)/3 = 2 times ln 2
    # = 1.3863; response mean: (1 + 2.5)/2 = 1.75 times ln 2 = 1.2130. Counting the padding as a token
    # would give 6/4 = 1.5 times ln 2 = 1.0397.
    logps = torch.tensor([[HALF, -77.0], [QUARTER, EIGHTH]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    got = {
        kind: reduce_tokens(sft_loss(logps), mask, global_count([mask], kind), kind).item()
        for kind in ("token_mean", "response_mean")
    }
    assert got["token_mean"] == pytest.approx(1.3863, abs=5e-5)
    assert got["response_mean"] == pytest.approx(1.2130, abs=5e-5)


def test_sft_gradient_raises_the_likelihood_of_counted_tokens_only() -> None:
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    reduce_tokens(sft_loss(logps), mask, 3.0, "token_mean").backward()
    assert logps.grad is not None
    assert torch.equal(logps.grad, -mask.double() / 3)


def test_sft_gradcheck() -> None:
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sft_loss, (logps,))
