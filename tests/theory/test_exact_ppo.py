"""PPO on policies whose every answer is enumerated: the real token rewards, GAE, loss and reduction.

What the policy gradient is in expectation, with a critic that is right or wrong, and where it comes to rest,
by where the KL is and which estimator it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from theory_enumeration import Table
from theory_optima import (
    forward_kl_optimum,
    reverse_kl_optimum,
    token_level_optimum,
    total_variation,
)

from trimtab.objectives.kl import kl_loss
from trimtab.objectives.policy import clipped_policy_loss
from trimtab.objectives.reduce import global_count, reduce_tokens
from trimtab.objectives.value import gae, token_rewards

REF = torch.tensor(
    [[0.2, 0.5, 0.3], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64
)
"""State 0 is the start, 1 + a follows token a; token 0 ends, so state 1 is never reached."""
TABLE = Table(REF, length=2, end=0)
REWARDS = torch.tensor([0.4, 0.2, 1.0, 0.0, 0.5, 0.9, 0.1], dtype=torch.float64)
"""Of the answers: "", "a", "a a", "a b", "b", "b a", "b b"."""
BETA = 0.3
POLICY = torch.tensor(
    [[0.0, 0.3, -0.4], [0.0, 0.0, 0.0], [0.5, -0.2, 0.4], [-0.6, 0.1, 0.3]], dtype=torch.float64
)
"""Logits that are no optimum of anything."""


def exact_values(policy_KV: torch.Tensor, rewards_ST: torch.Tensor) -> torch.Tensor:
    """V(s) under the policy, ``[K]``, from the token rewards of every answer: one step back at a time."""
    values_K = torch.zeros(len(policy_KV), dtype=torch.float64)
    probs_KV = policy_KV.exp()
    first_V = torch.zeros(probs_KV.shape[1], dtype=torch.float64)
    for s, answer in enumerate(TABLE.answers):
        if len(answer) == 2:
            values_K[1 + answer[0]] += probs_KV[1 + answer[0], answer[1]] * rewards_ST[s, 1]
        first_V[answer[0]] = rewards_ST[s, 0]
    for a in range(len(first_V)):
        values_K[0] += probs_KV[0, a] * (first_V[a] + (values_K[1 + a] if a else 0.0))
    return values_K


def gradient(
    logits_KV: torch.Tensor,
    *,
    lam: float = 1.0,
    value_error: float = 0.0,
    kl_in: str = "reward",
    estimator: str = "k1",
    level: str = "token",
    rewards_S: torch.Tensor = REWARDS,
    beta: float = BETA,
) -> torch.Tensor:
    """∇ of the expected loss at these logits, ``[K, V]``, the critic exact but for an error of each state."""
    logits_KV = logits_KV.detach().requires_grad_(True)
    policy_KV = logits_KV.log_softmax(-1)
    policy_ST, ref_ST = TABLE.token_logps(policy_KV), TABLE.token_logps(REF.log())
    mask_ST = TABLE.mask_ST
    in_reward = kl_in == "reward"
    how: Any = {"beta": beta if in_reward else 0.0, "estimator": estimator if in_reward else "k1"}
    rewards_ST, _ = token_rewards(rewards_S, policy_ST.detach(), ref_ST, mask_ST, **how)
    values_K = exact_values(policy_KV.detach(), rewards_ST)
    values_K = values_K + value_error * torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    values_ST = values_K[TABLE.states_ST]
    advantages_ST, _ = gae(rewards_ST, values_ST, mask_ST, gamma=1.0, lam=lam)
    loss_ST, clipped_ST = clipped_policy_loss(policy_ST, policy_ST.detach(), advantages_ST)
    assert not clipped_ST.any()
    if not in_reward:
        kl_how: Any = {"estimator": estimator, "level": level}
        loss_ST = loss_ST + beta * kl_loss(policy_ST, ref_ST, mask_ST, **kl_how)
    chance_S = policy_ST.detach().sum(-1).exp()
    count = global_count([mask_ST], "response_sum")
    reduce_tokens(loss_ST, mask_ST, count, "response_sum", weights_N=chance_S * len(chance_S)).backward()
    assert logits_KV.grad is not None
    return logits_KV.grad


def of_objective(logits_KV: torch.Tensor, value: Callable[[torch.Tensor, torch.Tensor], Any]) -> torch.Tensor:
    """∇ of −value(π(y), log π(y) − log π_ref(y)) over whole answers, by autograd."""
    logits_KV = logits_KV.detach().requires_grad_(True)
    logps_S = TABLE.token_logps(logits_KV.log_softmax(-1)).sum(-1)
    (-value(logps_S.exp(), logps_S - TABLE.token_logps(REF.log()).sum(-1))).backward()
    assert logits_KV.grad is not None
    return logits_KV.grad


def sequence_objective(probs_S: torch.Tensor, d_S: torch.Tensor) -> torch.Tensor:
    """E[r] − β·KL(π‖π_ref)."""
    return (probs_S * (REWARDS - BETA * d_S)).sum()


# ---------------------------------------------------------------- GAE


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_with_the_exact_critic_every_lambda_has_the_exact_policy_gradient(lam: float) -> None:
    exact = of_objective(POLICY, sequence_objective)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(gradient(POLICY, lam=lam), exact, atol=1e-12, rtol=0)


def test_a_critic_that_errs_biases_every_lambda_but_1() -> None:
    exact = of_objective(POLICY, sequence_objective)
    apart = [
        float((gradient(POLICY, lam=lam, value_error=0.3) - exact).abs().max())
        for lam in (0.0, 0.5, 0.95, 1.0)
    ]
    assert apart[3] < 1e-12, "a baseline that does not know the action changes no expectation"
    assert apart[0] > 2 * apart[1] > 10 * apart[2] * 2 > 1e-3, "the bias falls with λ"


# ---------------------------------------------------------------- where it comes to rest


def descend(**how: Any) -> torch.Tensor:
    """The answers' probabilities where the gradient is gone."""
    logits_KV = REF.log()
    for _ in range(4000):
        probs_KV = logits_KV.softmax(-1)
        often_KV = TABLE.visits(probs_KV)[:, None] * probs_KV
        move_KV = gradient(logits_KV, **how) / often_KV.clamp(min=1e-12)
        logits_KV = logits_KV - move_KV
        if float(move_KV.abs().max()) < 1e-9:
            return TABLE.probabilities(logits_KV.softmax(-1))
    raise AssertionError("still moving")


BY_ANSWER = dict(zip(TABLE.answers, REWARDS.tolist(), strict=True))
REF_S = TABLE.probabilities(REF)


def test_k1_in_the_reward_and_k2_of_the_sequence_in_the_loss_have_one_optimum() -> None:
    whole = reverse_kl_optimum(REF_S, REWARDS, BETA)
    token = token_level_optimum(REF, BY_ANSWER, BETA, reverse_kl_optimum)
    assert total_variation(whole, token) > 0.02
    in_reward = descend(kl_in="reward", estimator="k1")
    in_loss = descend(kl_in="loss", estimator="k2", level="sequence")
    assert total_variation(in_reward, whole) < 1e-6
    assert total_variation(in_loss, whole) < 1e-6


@pytest.mark.parametrize(("estimator", "optimum"), [("k2", reverse_kl_optimum), ("k3", forward_kl_optimum)])
def test_a_kl_of_tokens_in_the_loss_drops_that_of_later_tokens(estimator: str, optimum: Any) -> None:
    found = descend(kl_in="loss", estimator=estimator)
    assert total_variation(found, token_level_optimum(REF, BY_ANSWER, BETA, optimum)) < 1e-6
    assert total_variation(found, optimum(REF_S, REWARDS, BETA)) > 0.01


# ---------------------------------------------------------------- k2 and k3 inside the reward


def one_token(logits_V: torch.Tensor, estimator: str) -> torch.Tensor:
    """∇ of the expected loss of answers of one token without any reward: the KL's part alone, over β."""
    logits_V = logits_V.detach().requires_grad_(True)
    policy_V1 = logits_V.log_softmax(-1)[:, None]
    ref_V1, mask_V1 = REF[0].log()[:, None], torch.ones(3, 1, dtype=torch.bool)
    nothing = torch.zeros(3, dtype=torch.float64)
    how: Any = {"beta": 1.0, "estimator": estimator}
    rewards_V1, _ = token_rewards(nothing, policy_V1.detach(), ref_V1, mask_V1, **how)
    (-policy_V1.detach().exp() * rewards_V1 * policy_V1).sum().backward()
    assert logits_V.grad is not None
    return logits_V.grad


STATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": lambda p, d: (p * d).sum(),
    "k2": lambda p, d: (p * (d.square() / 2 - d)).sum(),
    "k3": lambda p, d: (p * d).sum() + (REF[0] * d).sum(),
}
"""What the estimator inside the reward descends: KL; E[d²/2] − KL; KL(π‖π_ref) − KL(π_ref‖π)."""


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_an_estimator_in_the_reward_descends(estimator: str) -> None:
    logits_V = POLICY[2].clone().requires_grad_(True)
    logps_V = logits_V.log_softmax(-1)
    STATED[estimator](logps_V.exp(), logps_V - REF[0].log()).backward()
    assert logits_V.grad is not None
    torch.testing.assert_close(one_token(POLICY[2], estimator), logits_V.grad, atol=1e-12, rtol=0)


def test_k2_and_k3_in_the_reward_are_flat_around_the_reference() -> None:
    way = torch.tensor([0.5, -0.2, -0.3], dtype=torch.float64)
    near = {k: [float(one_token(REF[0].log() + e * way, k).norm()) for e in (0.1, 0.01)] for k in STATED}
    # A tenth of the way: a tenth of k1's pull is left, a hundredth of the others'.
    assert near["k1"][0] / near["k1"][1] == pytest.approx(10, rel=0.1)
    assert near["k2"][0] / near["k2"][1] == pytest.approx(100, rel=0.2)
    assert near["k3"][0] / near["k3"][1] == pytest.approx(100, rel=0.2)


def test_k2_and_k3_in_the_reward_push_a_rare_answer_further_down() -> None:
    low = REF[0].log() + torch.tensor([-1.0, 0.1, 0.2], dtype=torch.float64)
    assert one_token(low, "k1")[0] < 0, "descent raises what has fallen below its reference"
    assert one_token(low, "k2")[0] > 0
    assert one_token(low, "k3")[0] > 0
