"""Ratios of tokens, sequences and responses, and the surrogates of the group-relative family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimtab.objectives.policy import (
    clipped_policy_loss,
    policy_ratio,
    relative_loss,
    truncated_importance_weights,
)
from trimtab.objectives.reduce import global_count, reduce_tokens

MASK = torch.tensor([[False, True, True, True], [True, True, False, False], [True, False, False, False]])
"""Unequal lengths, a response of one token, one that begins late."""
RATIOS = ["token", "sequence", "sequence_token", "response"]


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.log(torch.tensor(rows, dtype=torch.float64))


def batch() -> dict[str, Any]:
    """Log-probabilities with ratios on every side of the clips."""
    torch.manual_seed(0)
    policy = 0.4 * torch.randn(3, 4, dtype=torch.float64) - 1
    return {
        "policy_logps_NT": policy.requires_grad_(),
        "old_logps_NT": policy.detach() + 0.3 * torch.randn(3, 4, dtype=torch.float64),
        "ref_logps_NT": policy.detach() + 0.3 * torch.randn(3, 4, dtype=torch.float64),
        "advantages": torch.tensor([1.0, -1.5, 0.5], dtype=torch.float64),
        "mask_NT": MASK,
    }


# ---------------------------------------------------------------- ratios


def test_ratios_by_hand() -> None:
    # Two tokens at 1.2 and 0.9: their product is 1.08 and its root 1.0392. The arithmetic mean would be 1.05,
    # and a mean that counts the masked third token exp(0.0770/3) = 1.0260.
    gap, mask = logs([1.2, 0.9, 5.0]), torch.tensor([[True, True, False]])
    found = {level: policy_ratio(gap, torch.zeros_like(gap), mask, level)[0, :2].tolist() for level in RATIOS}  # type: ignore[arg-type]
    assert found["token"] == pytest.approx([1.2, 0.9])
    assert found["sequence"] == pytest.approx([1.0392, 1.0392], abs=5e-5)
    assert found["sequence_token"] == pytest.approx([1.0392, 1.0392], abs=5e-5)
    assert found["response"] == pytest.approx([1.08, 1.08])


def test_gradients_of_the_ratios() -> None:
    # ds/dlogπ_t = s/|y| through the mean; GSPO-token's s_t has s, at its own token alone; the product itself.
    mask = torch.tensor([[True, True]])
    wanted = {"sequence": 1.0392 / 2, "sequence_token": 1.0392, "response": 1.08}
    for level, value in wanted.items():
        gap = logs([1.2, 0.9]).requires_grad_()
        ratio = policy_ratio(gap, torch.zeros_like(gap), mask, level)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(ratio[0, 0], gap)
        assert gradient[0, 0].item() == pytest.approx(value, abs=5e-5)
        assert gradient[0, 1].item() == pytest.approx(0 if level == "sequence_token" else value, abs=5e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown ratio 'word'"):
        policy_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1).bool(), "word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown surrogate 'trpo'"):
        relative_loss(**batch(), surrogate="trpo")  # type: ignore[arg-type]


def test_importance_weights_follow_the_ratio() -> None:
    # π_old/π_sampler of 2 and 3: their product 6 is capped at 4, their root is 2.4495.
    old, mask = logs([2.0, 3.0]), torch.tensor([[True, True]])
    for level, wanted in {"token": [2, 3], "response": [4, 4], "sequence": [2.4495] * 2}.items():
        weights = truncated_importance_weights(old, torch.zeros_like(old), 4.0, mask_NT=mask, level=level)  # type: ignore[arg-type]
        assert weights[0].tolist() == pytest.approx(wanted, abs=5e-5)
    old.requires_grad_()
    for level in RATIOS:
        weights = truncated_importance_weights(old, torch.zeros_like(old), 4.0, mask_NT=mask, level=level)  # type: ignore[arg-type]
        assert not weights.requires_grad


# ---------------------------------------------------------------- surrogates


def one_response(ratios: list[float], advantage: float, **how: Any) -> tuple[float, list[float], list[bool]]:
    """The response's loss under response_mean, its gradient, and what was clipped."""
    policy = logs(ratios).requires_grad_()
    mask = torch.ones(1, len(ratios), dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss_NT, clipped, _ = relative_loss(policy, torch.zeros_like(policy), None, advantages, mask, **how)
    loss = reduce_tokens(loss_NT, mask, 1, how.get("reduction", "response_mean"))
    (gradient,) = torch.autograd.grad(loss, policy)
    return loss.item(), gradient[0].tolist(), clipped[0].tolist()


GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}


def test_gspo_clips_a_response_as_a_whole() -> None:
    # s = √1.08 = 1.0392 is above 1.0004: with A = 1 flat for both tokens, though the second's own ratio is
    # 0.9. Token by token (GRPO with these clips) the second would still be pushed: gradient [0, −0.45].
    loss, gradient, clipped = one_response([1.2, 0.9], 1.0, **GSPO)
    assert loss == pytest.approx(-1.0004)
    assert (gradient, clipped) == ([0.0, 0.0], [True, True])
    assert one_response([1.2, 0.9], 1.0, clip_low=3e-4, clip_high=4e-4)[1] == pytest.approx([0.0, -0.45])
    # With A = −1 it is not clipped: loss s, gradient s/|y| on each token.
    loss, gradient, clipped = one_response([1.2, 0.9], -1.0, **GSPO)
    assert loss == pytest.approx(1.0392, abs=5e-5)
    assert gradient == pytest.approx([0.5196, 0.5196], abs=5e-5)
    assert clipped == [False, False]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratios", [[1.2, 0.9], [0.9, 0.95, 0.99], [1.0001, 1.0002]])
def test_gspo_token_is_gspo_where_all_tokens_have_one_advantage(
    ratios: list[float], advantage: float
) -> None:
    whole = one_response(ratios, advantage, **GSPO)
    tokens = one_response(ratios, advantage, **(GSPO | {"ratio": "sequence_token"}))
    assert tokens[0] == pytest.approx(whole[0], abs=1e-12)
    assert tokens[1] == pytest.approx(whole[1], abs=1e-12)
    assert tokens[2] == whole[2]


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    # ρ = 6 is held at 5: −5·2·log 6 = −17.9176 and gradient −10. PPO's clip would give no gradient at all, an
    # unbounded weight −12, a weight that is not detached −5·2 − … no bound either.
    how = {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0}
    loss, gradient, clipped = one_response([6.0], 2.0, **how)
    assert loss == pytest.approx(-17.9176, abs=5e-5)
    assert gradient == pytest.approx([-10.0])
    assert clipped == [True]
    # No lower bound: ρ = 0.1 weighs 0.1, also with a negative advantage.
    assert one_response([0.1], -2.0, **how)[1:] == (pytest.approx([0.2]), [False])
    assert one_response([0.1], -2.0, **(how | {"clip_low": 0.2}))[1:] == (pytest.approx([1.6]), [True])


def test_reinforce_is_the_ratio_as_it_is() -> None:
    loss, gradient, clipped = one_response([3.0], 2.0, surrogate="reinforce")
    assert (loss, gradient, clipped) == (pytest.approx(-6.0), pytest.approx([-6.0]), [False])


def test_a_response_is_one_term_on_its_first_counted_token() -> None:
    policy = logs([7.0, 1.2, 0.9])
    mask = torch.tensor([[False, True, True]])
    advantages = torch.tensor([2.0], dtype=torch.float64)
    loss, *_ = relative_loss(
        policy, torch.zeros_like(policy), None, advantages, mask, surrogate="reinforce", ratio="response"
    )
    # 1.2·0.9·2 once; on every token it would be counted twice, and the masked token's 7 not at all.
    assert loss[0].tolist() == pytest.approx([0.0, -2.16, 0.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (2.0, -1.0, 2.0, 2.0),
        (4.0, -1.0, 3.0, 0.0),  # without the dual clip 4 and 4
        (4.0, 1.0, -1.2, 0.0),  # a positive advantage has its own clip: not −3
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    got = one_response([ratio], advantage, dual_clip=3.0)
    assert got[0] == pytest.approx(loss)
    assert got[1] == pytest.approx([gradient])
    assert got[2] == [gradient == 0.0]
    policy, old = logs([ratio]), torch.zeros(1, 1, dtype=torch.float64)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    assert clipped_policy_loss(policy, old, advantages, dual_clip=3.0)[0].item() == pytest.approx(loss)


def test_dual_clip_is_a_cap_on_the_ratio() -> None:
    """INTELLECT-2's (2025) two-sided clip, min(ρ, δ) before PPO's, is the same thing."""
    ratio = torch.linspace(0.05, 6, 200, dtype=torch.float64)[None]
    old = torch.zeros_like(ratio)
    for advantage in (-1.3, 0.7):
        advantages = torch.full((1, 1), advantage, dtype=torch.float64)
        ours = clipped_policy_loss(ratio.log(), old, advantages, clip_high=0.28, dual_clip=4.0)[0]
        theirs = clipped_policy_loss(ratio.clamp(max=4).log(), old, advantages, clip_high=0.28)[0]
        torch.testing.assert_close(ours, theirs)


def test_advantages_of_tokens() -> None:
    given = batch()
    spread = given["advantages"][:, None].expand(3, 4)
    for ratio in ("token", "sequence_token"):
        plain = relative_loss(**given, beta=0.1, ratio=ratio)
        same = relative_loss(**(given | {"advantages": spread}), beta=0.1, ratio=ratio)
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    own = torch.tensor([[1.0, 2.0, -3.0, 0.0]] * 3, dtype=torch.float64)
    loss, *_ = relative_loss(
        **(given | {"advantages": own, "old_logps_NT": given["policy_logps_NT"].detach()})
    )
    torch.testing.assert_close(loss.detach(), -own * MASK)


# ---------------------------------------------------------------- all of them


CASES = [("clip", ratio) for ratio in RATIOS] + [("reinforce", ratio) for ratio in RATIOS]
CASES += [("cispo", "token")]


@pytest.mark.parametrize(("surrogate", "ratio"), CASES)
def test_sign_of_the_gradient(surrogate: str, ratio: str) -> None:
    given = batch()
    given["old_logps_NT"] = given["policy_logps_NT"].detach()
    loss, *_ = relative_loss(**given, surrogate=surrogate, ratio=ratio)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss.sum(), given["policy_logps_NT"])
    # Descent raises what has a positive advantage, on policy by A alone on each token.
    torch.testing.assert_close(gradient, -given["advantages"][:, None] * MASK)


@pytest.mark.parametrize(("surrogate", "ratio"), CASES)
def test_masked_tokens_change_nothing(surrogate: str, ratio: str) -> None:
    def run(junk: float) -> list[torch.Tensor]:
        given = {
            name: value.detach().masked_fill(~MASK, junk) if value.dim() == 2 and name != "mask_NT" else value
            for name, value in batch().items()
        }
        given["policy_logps_NT"].requires_grad_()
        how: dict[str, Any] = {"surrogate": surrogate, "ratio": ratio, "beta": 0.2, "dual_clip": 0.0}
        out = relative_loss(**given, **how)
        return [*out, *torch.autograd.grad(out[0].sum(), given["policy_logps_NT"])]

    for quiet, loud in zip(run(0.0), run(-3.0), strict=True):
        assert torch.equal(quiet, loud)
        assert not quiet[~MASK].any()


@pytest.mark.parametrize("reduction", ["token_mean", "response_mean", "response_sum", "constant"])
@pytest.mark.parametrize(("surrogate", "ratio"), CASES)
def test_micro_batches_are_the_whole(surrogate: str, ratio: str, reduction: Any) -> None:
    given = batch()
    how: dict[str, Any] = {"surrogate": surrogate, "ratio": ratio, "beta": 0.2}
    count = global_count([MASK], reduction, constant=7)
    whole = reduce_tokens(relative_loss(**given, **how)[0], MASK, count, reduction)
    (together,) = torch.autograd.grad(whole, given["policy_logps_NT"])
    apart, parts = torch.zeros_like(together), 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        cut = {name: value[rows] for name, value in given.items()}
        part = reduce_tokens(relative_loss(**cut, **how)[0], MASK[rows], count, reduction)
        apart += torch.autograd.grad(part, given["policy_logps_NT"])[0]
        parts += part.item()
    assert parts == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("surrogate", ["clip", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "sequence", "response"])
def test_gradcheck(surrogate: str, ratio: str) -> None:
    given = batch()

    def loss(policy: torch.Tensor) -> torch.Tensor:
        how: dict[str, Any] = {"surrogate": surrogate, "ratio": ratio, "beta": 0.2, "kl_level": "sequence"}
        return relative_loss(**(given | {"policy_logps_NT": policy}), **how)[0]

    assert torch.autograd.gradcheck(loss, (given["policy_logps_NT"],))


def test_gradients_behind_a_stopped_one() -> None:
    """What finite differences cannot see, as formulas: −w·A for CISPO, −s·A for GSPO-token."""
    given = batch()
    policy, old, advantages = given["policy_logps_NT"], given["old_logps_NT"], given["advantages"][:, None]
    loss, *_ = relative_loss(**given, surrogate="cispo", clip_low=0.1, clip_high=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    weights = torch.exp(policy.detach() - old).clamp(0.9, 1.1)
    torch.testing.assert_close(gradient, -weights * advantages * MASK)
    loss, *_ = relative_loss(**given, surrogate="reinforce", ratio="sequence_token")
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    means = [(policy.detach() - old)[n][MASK[n]].mean().exp().item() for n in range(3)]
    torch.testing.assert_close(
        gradient, -torch.tensor(means, dtype=torch.float64)[:, None] * advantages * MASK
    )


def test_tokens_of_long_answers_weigh_as_much_as_others_under_token_mean() -> None:
    """DAPO's second part: gradients 1/Σ|o| each, where GRPO's are 1/(N·|o_i|)."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    policy = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = {}
    for reduction in ("token_mean", "response_mean"):
        loss_NT, *_ = relative_loss(policy, policy.detach(), None, advantages, mask)
        loss = reduce_tokens(loss_NT, mask, global_count([mask], reduction), reduction)
        (gradient,) = torch.autograd.grad(loss, policy)
        found[reduction] = (loss.item(), *gradient[:, 0].tolist())
    assert found["token_mean"] == pytest.approx((0.5, -0.25, 0.25))
    assert found["response_mean"] == pytest.approx((0.0, -1 / 2, 1 / 6))
    assert math.isclose(found["token_mean"][0], -(1 * 1 - 3 * 1) / 4)
