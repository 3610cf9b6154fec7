"""The family's gradients against the exact policy gradient: every group of two-token responses, enumerated.

Nothing is sampled, so equalities hold to 1e-12 and each test states by how much its likely mistake misses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from theory_enumeration import Setting, Table, descend, expected_gradient
from theory_optima import OPTIMA, reverse_kl_optimum, token_level_optimum, total_variation

from trimtab.objectives.advantages import group_advantages
from trimtab.objectives.kl import kl_estimate
from trimtab.objectives.policy import relative_loss
from trimtab.objectives.reduce import global_count, reduce_tokens

REF = torch.tensor(
    [
        [0.15, 0.35, 0.3, 0.2],
        [0.25, 0.25, 0.25, 0.25],  # never reached: token 0 ends a response
        [0.1, 0.2, 0.3, 0.4],
        [0.25, 0.05, 0.5, 0.2],
        [0.4, 0.1, 0.2, 0.3],
    ],
    dtype=torch.float64,
)
TABLE = Table(REF, length=2, end=0)
REWARDS = torch.tensor(
    [0.45, 0.9, 0.2, 0.1, 0.0, 0.3, 1.0, 0.2, 0.4, 0.5, 0.6, 0.3, 0.7], dtype=torch.float64
)
LOGITS = torch.tensor(
    [
        [0.2, -0.4, 0.5, 0.1],
        [0.0, 0.0, 0.0, 0.0],
        [0.3, 0.1, -0.6, 0.2],
        [-0.2, 0.7, 0.1, 0.4],
        [0.5, -0.1, 0.3, -0.3],
    ],
    dtype=torch.float64,
)
BETA = 0.2
RLOO: dict[str, Any] = {"surrogate": "reinforce", "ratio": "response"}
SHIFT = torch.tensor([0.3, -0.2, 0.15, -0.3], dtype=torch.float64)


def exact_gradient(*, beta: float = 0.0) -> torch.Tensor:
    """∇ of E_π[r] − β·KL(π‖π_ref) with respect to the logits, from its definition."""
    logits_KV = LOGITS.clone().requires_grad_(True)
    logps_S = TABLE.token_logps(logits_KV.log_softmax(-1)).sum(-1)
    ref_S = TABLE.token_logps(REF.log()).sum(-1)
    objective = (logps_S.exp() * (REWARDS - beta * (logps_S - ref_S))).sum()
    return torch.autograd.grad(objective, logits_KV)[0]


def gradient(size: int, baseline: str, loss: dict[str, Any], **more: Any) -> torch.Tensor:
    """What ascent follows: minus the expected gradient of the loss."""
    return -expected_gradient(LOGITS, Setting(TABLE, REWARDS, size, baseline, loss, **more))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_has_the_exact_policy_gradient(size: int) -> None:
    got = gradient(size, "leave_one_out", RLOO, reduction="response_sum")
    assert apart(got, exact_gradient()) < 1e-12
    # The group's mean as baseline shrinks it; a mean over tokens weighs short answers more.
    assert apart(gradient(size, "group_mean", RLOO, reduction="response_sum"), exact_gradient()) > 0.01
    assert apart(gradient(size, "leave_one_out", {}, reduction="response_mean"), exact_gradient()) > 0.01


def test_rloo_is_exact_also_for_samples_of_an_older_policy() -> None:
    """The product of the ratios is the whole correction; each token's own ratio is not, nor is none."""
    how: dict[str, Any] = {
        "reduction": "response_sum",
        "sampler": lambda policy_KV: (policy_KV + SHIFT).log_softmax(-1),
    }
    got = gradient(2, "leave_one_out", RLOO, stale=True, **how)
    assert apart(got, exact_gradient()) < 1e-12
    token = {"surrogate": "reinforce", "ratio": "token"}
    assert apart(gradient(2, "leave_one_out", token, stale=True, **how), exact_gradient()) > 0.003
    assert apart(gradient(2, "leave_one_out", RLOO, **how), exact_gradient()) > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpo_has_the_exact_gradient_times_g_minus_one_over_g(size: int) -> None:
    # The sample's own part in the group's mean takes 1/G; the constant length is 1 here.
    got = gradient(size, "group_mean", {}, reduction="constant")
    assert apart(got, exact_gradient() * (size - 1) / size) < 1e-12
    assert apart(got, exact_gradient()) > 0.01
    # GRPO's 1/|o| points elsewhere: no multiple of the exact gradient.
    mean = gradient(size, "group_mean", {}, reduction="response_mean").flatten()
    assert float(torch.cosine_similarity(mean, exact_gradient().flatten(), dim=0)) < 0.999
    assert float(torch.cosine_similarity(got.flatten(), exact_gradient().flatten(), dim=0)) > 1 - 1e-12


def test_a_scale_of_the_groups_deviation_bends_the_gradient() -> None:
    """What Dr. GRPO leaves out: groups of little contrast weigh as much as others."""
    table, size = TABLE, 2
    logits_KV = LOGITS.clone().requires_grad_(True)
    logps_S = table.token_logps(logits_KV.log_softmax(-1)).sum(-1)
    drawn_MG = torch.cartesian_prod(*[torch.arange(len(REWARDS))] * size)
    chance_M = logps_S.detach()[drawn_MG].sum(-1).exp()
    advantages_MG = group_advantages(REWARDS[drawn_MG], scale="std")
    objective = (chance_M[:, None] * advantages_MG * logps_S[drawn_MG]).sum() / size
    (bent,) = torch.autograd.grad(objective, logits_KV)
    assert float(torch.cosine_similarity(bent.flatten(), exact_gradient().flatten(), dim=0)) < 0.99


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_on_policy_every_surrogate_is_reinforce(surrogate: str) -> None:
    reinforce = gradient(2, "group_mean", {"surrogate": "reinforce"})
    assert apart(gradient(2, "group_mean", {"surrogate": surrogate}), reinforce) < 1e-12


@pytest.mark.parametrize("ratio", ["sequence_token", "response"])
def test_on_policy_every_ratio_is_the_tokens(ratio: str) -> None:
    how: dict[str, Any] = {"reduction": "response_sum"}
    assert (
        apart(gradient(2, "group_mean", {"ratio": ratio}, **how), gradient(2, "group_mean", {}, **how))
        < 1e-12
    )


def test_gspo_on_policy_is_grpo() -> None:
    """Both divide by the length: s has the gradient of the mean."""
    how: dict[str, Any] = {"reduction": "response_mean"}
    gspo = gradient(2, "group_mean", {"ratio": "sequence"}, **how)
    assert apart(gspo, gradient(2, "group_mean", {}, **how)) < 1e-12
    # And with a sum over its tokens (LUSPO) it is Dr. GRPO's.
    luspo = gradient(2, "group_mean", {"ratio": "sequence"}, reduction="response_sum")
    assert apart(luspo, exact_gradient() / 2) < 1e-12


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token", "response"])
def test_gspo_is_grpo_on_responses_of_one_token(ratio: str) -> None:
    """Also off policy, clips and all."""
    torch.manual_seed(0)
    old = torch.randn(40, 1, dtype=torch.float64)
    advantages = torch.randn(40, dtype=torch.float64)
    mask = torch.ones(40, 1, dtype=torch.bool)
    found = []
    for level in ("token", ratio):
        policy = (old + 0.3 * torch.randn(40, 1, generator=torch.Generator().manual_seed(1))).requires_grad_()
        loss_NT, clipped, _ = relative_loss(policy, old, None, advantages, mask, ratio=level)  # type: ignore[arg-type]
        loss = reduce_tokens(loss_NT, mask, global_count([mask], "response_mean"), "response_mean")
        found.append((loss, torch.autograd.grad(loss, policy)[0], clipped))
    assert 0 < int(found[0][2].sum()) < 40
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the KL in the reward


def penalised(baseline: str, loss: dict[str, Any], reduction: str) -> Setting:
    setting = Setting(TABLE, REWARDS, 2, baseline, loss, reduction=reduction)  # type: ignore[arg-type]
    setting.penalty = lambda policy_, ref_: BETA * kl_estimate(policy_, ref_, "k1")
    return setting


def test_rloo_with_the_kl_in_the_reward_has_the_exact_regularised_gradient() -> None:
    got = -expected_gradient(LOGITS, penalised("leave_one_out", RLOO, "response_sum"))
    assert apart(got, exact_gradient(beta=BETA)) < 1e-12
    assert apart(got, exact_gradient()) > 0.01


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_the_kl_in_the_reward_reaches_the_sequences_optimum(baseline: str) -> None:
    """π_ref·exp(r/β)/Z over whole responses, at β itself whatever the baseline."""
    policy = TABLE.probabilities(descend(penalised(baseline, RLOO, "response_sum")))
    ref_S = TABLE.probabilities(REF)
    assert total_variation(policy, reverse_kl_optimum(ref_S, REWARDS, BETA)) < 0.001
    # Not the token-level optimum, not β·G/(G − 1), not the other divergence.
    rewards = dict(zip(TABLE.answers, REWARDS.tolist(), strict=True))
    token = token_level_optimum(REF, rewards, BETA, OPTIMA["k2"])
    assert total_variation(policy, token) > 0.02
    assert total_variation(policy, reverse_kl_optimum(ref_S, REWARDS, 2 * BETA)) > 0.05
    assert total_variation(policy, OPTIMA["k3"](ref_S, REWARDS, BETA)) > 0.05
