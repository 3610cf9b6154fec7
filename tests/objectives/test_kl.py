"""KL estimators: values by hand, and by enumeration what each is in expectation and does as a loss."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.objectives.kl import Estimator, Level, kl_estimate, kl_loss

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
LEVELS: tuple[Level, ...] = ("token", "sequence")


@pytest.mark.parametrize(
    ("ratio", "k1", "k2", "k3"),
    [
        # d = ln 2 = 0.6931: d²/2 = 0.2402; 1/2 + 0.6931 − 1 = 0.1931 (with e^+d − d − 1: 0.3069).
        (2.0, 0.6931, 0.2402, 0.1931),
        # d = −0.6931: k1 is negative, k2 the same as before, k3 = 2 − 0.6931 − 1 = 0.3069.
        (0.5, -0.6931, 0.2402, 0.3069),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_kl_by_hand(ratio: float, k1: float, k2: float, k3: float) -> None:
    policy, ref = torch.tensor([math.log(ratio)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    got = [kl_estimate(policy, ref, estimator).item() for estimator in ESTIMATORS]
    assert got == pytest.approx([k1, k2, k3], abs=5e-5)


def test_k3_keeps_its_digits_near_zero() -> None:
    # d = 1e-5 in fp32: d²/2 = 5e-11. exp(−d) + d − 1 written out loses it all to rounding (0, or 6e-8).
    policy = torch.tensor([1e-5], requires_grad=True)
    k3 = kl_estimate(policy, torch.zeros(1), "k3")
    assert 0 <= k3.item() < 2e-10
    k3.backward()
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(1e-5, rel=1e-2)


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy and log-probabilities of a reference over five actions."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0, -0.4], dtype=torch.float64, requires_grad=True)
    return logits, torch.log_softmax(torch.tensor([1.0, 0.2, -0.5, 0.1, -1.2], dtype=torch.float64), -1)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logits, ref = distributions()
    policy = logits.log_softmax(-1)
    p, exact = policy.exp(), (policy.exp() * (policy - ref)).sum().item()
    got = {e: (p * kl_estimate(policy, ref, e)).sum().item() for e in ESTIMATORS}
    assert got["k1"] == pytest.approx(exact, abs=1e-12)
    assert got["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(got["k2"] - exact) > 0.01


def gradient_as_a_loss(estimator: Estimator) -> torch.Tensor:
    """E over y ~ π (the draw itself not differentiated) of the estimator's gradient."""
    logits, ref = distributions()
    policy = logits.log_softmax(-1)
    loss = (policy.exp().detach() * kl_estimate(policy, ref, estimator)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_as_a_loss_k1_does_nothing_k2_is_reverse_and_k3_forward_kl() -> None:
    logits, ref = distributions()
    policy = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - policy)).sum(), logits)
    assert gradient_as_a_loss("k1").abs().max() < 1e-12
    assert (gradient_as_a_loss("k2") - reverse).abs().max() < 1e-12
    assert (gradient_as_a_loss("k3") - forward).abs().max() < 1e-12
    # The two directions really pull apart here: taking one for the other is no rounding matter.
    assert (reverse - forward).abs().max() > 0.05


def tree(level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of k2 as a loss over all 9 two-token responses, and of the exact sequence KL."""
    torch.manual_seed(0)
    # Row 0 holds the logits of the first token, rows 1 to 3 those of the second after each first.
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(4, 3, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3)]

    def of(logps: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack([logps[0, a], logps[1 + a, b]]) for a, b in pairs])

    policy_NT, ref_NT = of(policy), of(ref)
    mask = torch.ones(9, 2, dtype=torch.bool)
    terms = kl_loss(policy_NT, ref_NT, mask, estimator="k2", level=level)
    p_N = policy_NT.sum(-1).exp()
    (got,) = torch.autograd.grad((p_N.detach() * terms.sum(-1)).sum(), logits, retain_graph=True)
    exact = (p_N * (policy_NT.sum(-1) - ref_NT.sum(-1))).sum()
    return got, torch.autograd.grad(exact, logits)[0]


def test_sequence_level_has_the_sequence_kls_gradient_and_token_level_has_not() -> None:
    got, exact = tree("sequence")
    assert (got - exact).abs().max() < 1e-12
    got, exact = tree("token")
    # The first token's term does not see the KL that its successors incur; the last token's is whole.
    assert (got[0] - exact[0]).abs().max() > 0.05
    assert (got[1:] - exact[1:]).abs().max() < 1e-12


def test_sequence_level_sits_on_the_first_counted_token() -> None:
    # Log-ratios 0.5 and 1 (the first column does not count): the whole response's is 1.5, k2 = 1.125.
    # Token by token k2 would be 0.125 and 0.5, together 0.625.
    policy = torch.tensor([[9.0, 0.5, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True]])
    zeros = torch.zeros_like(policy)
    assert kl_loss(policy, zeros, mask, estimator="k2", level="sequence").tolist() == [[0.0, 1.125, 0.0]]
    assert kl_loss(policy, zeros, mask, estimator="k2", level="token").tolist() == [[0.0, 0.125, 0.5]]


def test_a_response_without_counted_tokens_has_no_kl() -> None:
    mask = torch.zeros(1, 2, dtype=torch.bool)
    for level in LEVELS:
        got = kl_loss(torch.ones(1, 2), torch.zeros(1, 2), mask, level=level)
        assert not got.any()


def test_one_token_makes_the_levels_equal() -> None:
    policy, mask = torch.tensor([[0.7, 5.0]], dtype=torch.float64), torch.tensor([[True, False]])
    for estimator in ESTIMATORS:
        both = [
            kl_loss(policy, torch.zeros_like(policy), mask, estimator=estimator, level=level)
            for level in LEVELS
        ]
        assert torch.equal(*both)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_gradcheck(estimator: Estimator, level: Level) -> None:
    torch.manual_seed(1)
    policy = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ref, mask = torch.randn(2, 3).double(), torch.tensor([[True, True, False], [False, True, True]])

    def loss(values: torch.Tensor) -> torch.Tensor:
        return kl_loss(values, ref, mask, estimator=estimator, level=level)

    assert torch.autograd.gradcheck(loss, (policy,))


def test_unknown_names_are_refused() -> None:
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(one, one, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="word"):
        kl_loss(one, one, mask, level="word")  # type: ignore[arg-type]
