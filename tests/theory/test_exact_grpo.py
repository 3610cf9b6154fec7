"""GRPO's losses on policies whose every group is enumerated: no sampling noise, so the bound is 0.001.

The limit that a run has to meet is 0.01. Each test also states by how much the formulas miss that a reader
would expect who overlooked the estimator, the baseline or the level.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from theory_enumeration import Setting, Table, descend, expected_gradient
from theory_optima import (
    OPTIMA,
    effective_beta,
    forward_kl_optimum,
    reverse_kl_optimum,
    token_level_optimum,
    total_variation,
)

from trimtab.objectives.kl import kl_estimate
from trimtab.rollouts.sampling import SamplingConfig, sampler_logprobs

REF = torch.tensor([[0.05, 0.25, 0.15, 0.2, 0.2, 0.15]], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)
"""The best answer is the rarest, so that the two optima lie far apart."""
BETA, GROUP = 0.225, 4
BETA_PRIME = 0.3
"""0.225·4/3."""
CLOSE, APART = 0.001, 0.05


def one_token(estimator: str, baseline: str = "group_mean", **changes: Any) -> Setting:
    loss = {"beta": BETA, "kl_estimator": estimator}
    return Setting(Table(REF), REWARDS, GROUP, baseline, loss, **changes)


# ---------------------------------------------------------------- one token


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_one_token_reaches_the_optimum_of_its_estimator_and_baseline(estimator: str, baseline: str) -> None:
    policy = descend(one_token(estimator, baseline))[0]
    right = effective_beta(BETA, GROUP, baseline)
    wrong = {BETA: BETA_PRIME, BETA_PRIME: BETA}[round(right, 9)]
    other = {"k2": "k3", "k3": "k2"}[estimator]
    assert total_variation(policy, OPTIMA[estimator](REF[0], REWARDS, right)) < CLOSE
    # With the other baseline's β′: 0.092 for k2, 0.136 for k3.
    assert total_variation(policy, OPTIMA[estimator](REF[0], REWARDS, wrong)) > APART
    # With the other estimator's formula: 0.191 under β′ = 0.3, 0.268 under β′ = 0.225.
    assert total_variation(policy, OPTIMA[other](REF[0], REWARDS, right)) > APART


@pytest.mark.parametrize("size", [2, 3])
def test_the_factor_of_the_group_mean_follows_the_group_size(size: int) -> None:
    # β′ = β·2 for pairs, β·1.5 for triples.
    setting = one_token("k2")
    setting.group_size = size
    policy = descend(setting)[0]
    assert total_variation(policy, reverse_kl_optimum(REF[0], REWARDS, BETA * size / (size - 1))) < CLOSE


def test_k1_as_a_loss_has_no_expected_gradient() -> None:
    logits_KV = torch.tensor([[0.3, -1.0, 0.4, 0.0, 1.2, -0.2]], dtype=torch.float64)
    free = one_token("k1")
    free.rewards_S = torch.zeros_like(REWARDS)
    assert expected_gradient(logits_KV, free).abs().max() < 1e-12
    for estimator in ("k2", "k3"):
        free.loss["kl_estimator"] = estimator
        assert expected_gradient(logits_KV, free).abs().max() > 0.01


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_k1_inside_the_reward_gives_the_reverse_kl_optimum_at_beta_itself(baseline: str) -> None:
    # The baseline's factor scales the reward and the KL alike, so it cancels.
    setting = Setting(Table(REF), REWARDS, GROUP, baseline)
    setting.penalty = lambda policy_, ref_: BETA * kl_estimate(policy_, ref_, "k1")
    policy = descend(setting)[0]
    assert total_variation(policy, reverse_kl_optimum(REF[0], REWARDS, BETA)) < CLOSE
    assert total_variation(policy, reverse_kl_optimum(REF[0], REWARDS, BETA_PRIME)) > APART


def test_k3_inside_the_reward_does_not_hold_the_policy() -> None:
    # Detached, k3 = π_ref/π + log(π/π_ref) − 1: its first term rewards what is already common. Four of the
    # six answers die out; the reverse-KL optimum is missed by 0.48, the forward one by 0.37.
    setting = Setting(Table(REF), REWARDS, GROUP)
    setting.penalty = lambda policy_, ref_: BETA * kl_estimate(policy_, ref_, "k3")
    policy = descend(setting)[0]
    assert int((policy < 0.001).sum()) == 4
    for optimum in (reverse_kl_optimum, forward_kl_optimum):
        assert total_variation(policy, optimum(REF[0], REWARDS, BETA)) > 0.3


# ---------------------------------------------------------------- samplers that are not the policy

SHIFT = torch.tensor([0.4, -0.3, 0.2, -0.4, 0.3, -0.2], dtype=torch.float64)


@pytest.mark.parametrize(("estimator", "unweighted"), [("k2", 0.0286), ("k3", 0.0261)])
def test_importance_weights_mend_a_sampler_that_differs(estimator: str, unweighted: float) -> None:
    # Weights on the surrogate alone would change β answer by answer: 0.067 for k2 and 0.172 for k3.
    optimum = OPTIMA[estimator](REF[0], REWARDS, BETA_PRIME)

    def sampler(policy_KV: torch.Tensor) -> torch.Tensor:
        return (policy_KV + SHIFT).log_softmax(-1)

    weighted = descend(one_token(estimator, sampler=sampler, cap=2.0), rate=0.5)[0]
    assert total_variation(weighted, optimum) < CLOSE
    off = descend(one_token(estimator, sampler=sampler), rate=0.5)[0]
    assert total_variation(off, optimum) == pytest.approx(unweighted, abs=0.001)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_importance_weights_cannot_mend_what_top_p_never_draws(cap: float | None) -> None:
    # At the start the others hold 0.95, so top-p 0.9 drops the rarest answer, the best one, and for ever.
    # Within one state every weight is the mass of what is kept: it scales the gradient, it moves no optimum.
    config = SamplingConfig(top_p=0.9)
    setting = one_token("k3", sampler=lambda policy_KV: sampler_logprobs(policy_KV, config).double(), cap=cap)
    policy = descend(setting, tolerance=1e-6)[0]
    optimum = forward_kl_optimum(REF[0], REWARDS, BETA_PRIME)
    assert float(policy[0]) == pytest.approx(0.05, abs=0.001)
    assert float(optimum[0]) == pytest.approx(0.347, abs=0.001)
    assert total_variation(policy, optimum) == pytest.approx(0.297, abs=0.002)


# ---------------------------------------------------------------- two tokens

PAIR_REF = torch.tensor(
    [
        [0.15, 0.35, 0.3, 0.2],
        [0.25, 0.25, 0.25, 0.25],  # never reached: token 0 ends a response
        [0.1, 0.2, 0.3, 0.4],
        [0.25, 0.05, 0.5, 0.2],
        [0.4, 0.1, 0.2, 0.3],
    ],
    dtype=torch.float64,
)
PAIR_TABLE = Table(PAIR_REF, length=2, end=0)
PAIR_REWARDS = torch.tensor(
    [0.45, 0.9, 0.2, 0.1, 0.0, 0.3, 1.0, 0.2, 0.4, 0.5, 0.6, 0.3, 0.7], dtype=torch.float64
)
PAIR_GROUP = 3
PAIR_BETA = 0.16
"""β′ = 0.24."""


def two_tokens(estimator: str, level: str, baseline: str = "group_mean") -> torch.Tensor:
    loss = {"beta": PAIR_BETA, "kl_estimator": estimator, "kl_level": level}
    setting = Setting(PAIR_TABLE, PAIR_REWARDS, PAIR_GROUP, baseline, loss)
    return PAIR_TABLE.probabilities(descend(setting))


def pair_optima(estimator: str, baseline: str = "group_mean") -> tuple[torch.Tensor, torch.Tensor]:
    """What token-level and sequence-level terms converge to."""
    beta = effective_beta(PAIR_BETA, PAIR_GROUP, baseline)
    rewards = dict(zip(PAIR_TABLE.answers, PAIR_REWARDS.tolist(), strict=True))
    token = token_level_optimum(PAIR_REF, rewards, beta, OPTIMA[estimator])
    return token, OPTIMA[estimator](PAIR_TABLE.probabilities(PAIR_REF), PAIR_REWARDS, beta)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_two_tokens_reach_the_optimum_of_their_level(estimator: str, level: str, baseline: str) -> None:
    policy = two_tokens(estimator, level, baseline)
    token, sequence = pair_optima(estimator, baseline)
    right, wrong = (token, sequence) if level == "token" else (sequence, token)
    assert total_variation(policy, right) < CLOSE
    assert total_variation(policy, wrong) > APART


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_two_tokens_miss_the_other_estimators_optimum(level: str) -> None:
    index = ["token", "sequence"].index(level)
    assert total_variation(two_tokens("k3", level), pair_optima("k2")[index]) > APART
    assert total_variation(two_tokens("k2", level), pair_optima("k3")[index]) > APART


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_unbiased_kl_has_the_reverse_kl_optimum_whatever_its_estimator(estimator: str) -> None:
    setting = one_token(estimator)
    setting.loss["kl_unbiased"] = True
    policy = descend(setting)[0]
    assert total_variation(policy, reverse_kl_optimum(REF[0], REWARDS, BETA_PRIME)) < CLOSE
    # Without the ratio's own gradient k3 stops at the other optimum (and k1 nowhere): 0.191 away.
    assert total_variation(policy, forward_kl_optimum(REF[0], REWARDS, BETA_PRIME)) > APART


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_unbiased_kl_has_one_expected_gradient_from_fresh_and_stale_samples(level: str) -> None:
    # Only the KL: no reward. Stale samples come from another policy, whose ratio the term corrects. At the
    # level of tokens only a token's own is corrected, so the responses have one.
    generator = torch.Generator().manual_seed(3)
    length, states = (1, 1) if level == "token" else (2, 4)
    ref_KV = torch.randn(states, 3, generator=generator).double().softmax(-1)
    logits_KV = torch.randn(states, 3, generator=generator).double()
    old_KV = torch.randn(states, 3, generator=generator).double().log_softmax(-1)
    table = Table(ref_KV, length=length)
    rewards_S = torch.zeros(len(table.answers), dtype=torch.float64)
    loss = {"beta": 1.0, "kl_estimator": "k3", "kl_level": level, "kl_unbiased": True}
    fresh = Setting(table, rewards_S, 2, loss=loss)
    stale = Setting(table, rewards_S, 2, loss=loss, sampler=lambda _: old_KV, stale=True)
    free = logits_KV.clone().requires_grad_(True)
    policy_S = table.token_logps(free.log_softmax(-1)).sum(-1)
    exact = (policy_S.exp() * (policy_S - table.token_logps(ref_KV.log()).sum(-1))).sum()
    exact.backward()
    assert free.grad is not None
    for setting in (fresh, stale):
        assert expected_gradient(logits_KV, setting) == pytest.approx(free.grad, abs=1e-12)
    # The plain term is that of another divergence, on policy as off.
    loss["kl_unbiased"] = False
    assert (expected_gradient(logits_KV, stale) - free.grad).abs().max() > 0.01
