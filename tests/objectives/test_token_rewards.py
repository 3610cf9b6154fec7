"""Token rewards: the KL at every token, the response's reward at its last."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.value import gae, token_rewards

NAN = float("nan")


def of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


REWARDS = torch.tensor([2.0], dtype=torch.float64)
FULL = torch.ones(1, 3, dtype=torch.bool)


def test_token_rewards_by_hand() -> None:
    # log π − log π_ref = 0.5, −1 and 0; β = 0.1; reward 2: −0.05, +0.1, 2. The KL with the wrong sign (reward
    # PLUS β·KL) would be +0.05, −0.1, 2; the reward spread over the tokens 0.617, 0.767, 0.667.
    rewards, kl = token_rewards(REWARDS, of([-1.0, -2.0, -0.5]), of([-1.5, -1.0, -0.5]), FULL, beta=0.1)
    assert rewards[0].tolist() == pytest.approx([-0.05, 0.1, 2.0])
    assert kl[0].tolist() == pytest.approx([0.5, -1.0, 0.0])


def test_a_token_that_the_policy_likes_better_costs() -> None:
    # The sign: raising log π lowers the token's reward, by β for each nat.
    low, _ = token_rewards(REWARDS, of([-1.0, -1.0, -1.0]), of([-1.0, -1.0, -1.0]), FULL, beta=0.3)
    high, _ = token_rewards(REWARDS, of([0.0, -1.0, -1.0]), of([-1.0, -1.0, -1.0]), FULL, beta=0.3)
    assert (high - low)[0].tolist() == pytest.approx([-0.3, 0.0, 0.0])


def test_the_reward_is_at_the_last_counted_token() -> None:
    # Lengths 3, 2 and 1, a hole, a late start, nothing. Placed in the last column, it would be lost five
    # times.
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    logps = torch.zeros(6, 4, dtype=torch.float64)
    rewards, _ = token_rewards(
        torch.arange(1.0, 7.0, dtype=torch.float64), logps, logps, mask.bool(), beta=1.0
    )
    assert rewards.tolist() == [
        [0.0, 0.0, 1.0, 0.0],
        [0.0, 2.0, 0.0, 0.0],
        [3.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 4.0, 0.0],
        [0.0, 0.0, 0.0, 5.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_uncounted_tokens_are_zero_and_never_read() -> None:
    mask = torch.tensor([[True, False, True, False]])
    policy, ref = of([-1.0, NAN, -2.0, 0.0]), of([-1.5, -1.0, -2.5, -float("inf")])
    rewards, kl = token_rewards(REWARDS, policy, ref, mask, beta=0.2)
    assert rewards[0].tolist() == pytest.approx([-0.1, 0.0, 1.9, 0.0])
    assert kl[0].tolist() == pytest.approx([0.5, 0.0, 0.5, 0.0])


def test_the_sum_is_the_penalised_reward_of_the_response() -> None:
    # Σ_t r_t = r(x, y) − β·log(π(y)/π_ref(y)), and with γ = λ = 1 and no critic that is the first advantage.
    generator = torch.Generator().manual_seed(0)
    policy, ref = -torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [4]])
    scores = torch.randn(4, generator=generator, dtype=torch.float64)
    rewards, _ = token_rewards(scores, policy, ref, mask, beta=0.7)
    expected = scores - 0.7 * ((policy - ref) * mask).sum(-1)
    torch.testing.assert_close(rewards.sum(-1), expected)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages[:, 0], expected)


def test_without_a_reference_there_is_no_kl() -> None:
    rewards, kl = token_rewards(REWARDS, of([-1.0, -2.0, -0.5]), None, FULL, beta=0.0)
    assert rewards[0].tolist() == [0.0, 0.0, 2.0]
    assert not kl.any()
    with pytest.raises(ValueError, match="no reference"):
        token_rewards(REWARDS, of([-1.0, -2.0, -0.5]), None, FULL, beta=0.1)


def test_beta_0_still_shows_the_kl() -> None:
    rewards, kl = token_rewards(REWARDS, of([-1.0, -2.0, -0.5]), of([-1.5, -1.0, -0.5]), FULL, beta=0.0)
    assert rewards[0].tolist() == [0.0, 0.0, 2.0]
    assert kl[0].tolist() == [0.5, -1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_rewards_keep_the_dtype_and_carry_no_gradient(dtype: torch.dtype) -> None:
    policy = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    for got in token_rewards(REWARDS.to(dtype), policy, policy - 1, FULL, beta=0.1):
        assert got.dtype == dtype
        assert not got.requires_grad
