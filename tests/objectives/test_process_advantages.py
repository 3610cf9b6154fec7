"""Advantages of steps, statistics over the rollout, and DAPO's punishment of length."""

from __future__ import annotations

import pytest
import torch

from trimtab.objectives.advantages import group_advantages, overlong_punishment, process_advantages


def table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- process supervision


def test_steps_by_hand() -> None:
    # Step rewards 1, 3 | 2 and nothing: mean 2, population deviation √(2/3) = 0.8165, so r̃ = −1.2247 and
    # 1.2247 | 0. The first response's steps end at tokens 1 and 3: tokens 0 and 1 have the sum 0 of both, 2
    # and 3 the last one's 1.2247, 4 nothing. Earlier steps alone (the wrong way round) would give −1.2247.
    rewards = table([[1.0, 3.0], [2.0, 99.0]])
    ends = torch.tensor([[1, 3], [4, 0]])
    steps = torch.tensor([[True, True], [True, False]])
    got = process_advantages(rewards, ends, steps, 5, eps=0.0)
    assert got[0].tolist() == pytest.approx([0.0, 0.0, 1.2247, 1.2247, 0.0], abs=5e-5)
    assert got[1].tolist() == pytest.approx([0.0] * 5, abs=1e-12)
    # The sample deviation (÷2) is 1; without a scale the differences stay.
    for scale in ("std_unbiased", "none"):
        got = process_advantages(rewards, ends, steps, 5, scale=scale, eps=0.0)
        assert got[0].tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0, 0.0], abs=1e-12)


def test_the_mean_is_over_steps_not_over_responses() -> None:
    # 3, 3, 3 | 0: the steps' mean is 2.25; the mean of the responses' means would be 1.5.
    rewards, steps = table([[3.0] * 3, [0.0] * 3]), torch.tensor([[True] * 3, [True, False, False]])
    got = process_advantages(rewards, torch.tensor([[0, 1, 2]] * 2), steps, 3, scale="none")
    assert got[0].tolist() == pytest.approx([2.25, 1.5, 0.75])
    assert got[1].tolist() == pytest.approx([-2.25, 0.0, 0.0])


@pytest.mark.parametrize("scale", ["none", "std", "std_unbiased"])
def test_one_step_at_the_end_is_outcome_supervision(scale: str) -> None:
    rewards = table([[0.2], [0.9], [0.4], [0.4]])
    lengths = [3, 1, 2, 4]
    ends = torch.tensor([[length - 1] for length in lengths])
    got = process_advantages(rewards, ends, torch.ones(4, 1).bool(), 4, scale=scale)  # type: ignore[arg-type]
    outcome = group_advantages(rewards.T, scale=scale)[0]  # type: ignore[arg-type]
    for row, advantage, length in zip(got.tolist(), outcome.tolist(), lengths, strict=True):
        assert row == pytest.approx([advantage] * length + [0.0] * (4 - length), abs=1e-12)


def test_equal_steps_have_no_advantage() -> None:
    rewards = torch.full((2, 3), 1000.1)
    got = process_advantages(rewards, torch.tensor([[0, 1, 2]] * 2), torch.ones(2, 3).bool(), 3)
    assert not got.any()


def test_what_steps_cannot_do_is_refused() -> None:
    one = torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="at least two"):
        process_advantages(torch.zeros(2, 1), torch.zeros(2, 1).long(), one, 2)
    with pytest.raises(ValueError, match="not 'batch_std'"):
        process_advantages(torch.zeros(2, 1), torch.zeros(2, 1).long(), ~one | one, 2, scale="batch_std")


# ---------------------------------------------------------------- over the rollout


def test_scales_over_the_batch_by_hand() -> None:
    # Groups 0, 2 and 10, 16: advantages ∓1 and ∓3, whose deviation is √5 = 2.2361; that of the rewards, whose
    # mean is 7, is √((49 + 25 + 9 + 81)/4) = 6.4031. Within their groups both would be ∓1.
    rewards = table([[0.0, 2.0], [10.0, 16.0]])
    advantages = group_advantages(rewards, scale="batch_std", eps=0.0)
    assert advantages.flatten().tolist() == pytest.approx([-0.4472, 0.4472, -1.3416, 1.3416], abs=5e-5)
    advantages = group_advantages(rewards, scale="batch_reward_std", eps=0.0)
    assert advantages.flatten().tolist() == pytest.approx([-0.1562, 0.1562, -0.4685, 0.4685], abs=5e-5)
    # ÷3 and not ÷4 under the root: 7.3937.
    advantages = group_advantages(rewards, scale="batch_reward_std_unbiased", eps=0.0)
    assert advantages.flatten().tolist() == pytest.approx([-0.1353, 0.1353, -0.4058, 0.4058], abs=5e-5)


def test_the_mean_of_the_batch_as_a_baseline() -> None:
    # REINFORCE++: (r − 7)/6.4031. Both answers to the harder prompt count as bad ones.
    rewards = table([[0.0, 2.0], [10.0, 16.0]])
    got = group_advantages(rewards, baseline="batch_mean", scale="batch_std", eps=0.0)
    assert got.flatten().tolist() == pytest.approx([-1.0932, -0.7809, 0.4685, 1.4056], abs=5e-5)
    assert got.mean().item() == pytest.approx(0, abs=1e-12)
    assert got.std(correction=0).item() == pytest.approx(1)
    assert group_advantages(rewards, baseline="batch_mean", scale="none")[0].tolist() == [-7.0, -5.0]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("scale", ["none", "batch_std", "batch_reward_std", "batch_reward_std_unbiased"])
def test_a_batch_of_equal_rewards_has_no_advantage(baseline: str, scale: str) -> None:
    got = group_advantages(torch.full((3, 3), 1000.1), baseline=baseline, scale=scale)  # type: ignore[arg-type]
    assert not got.any()


# ---------------------------------------------------------------- length


def test_overlong_punishment_by_hand() -> None:
    # Limit 20, buffer 4: free up to 16, then a quarter a token, −1 at the limit and beyond.
    lengths = torch.tensor([1, 15, 16, 17, 18, 19, 20, 25], dtype=torch.float64)
    assert overlong_punishment(lengths, 20, 4).tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1]
    # The paper's: 20,480 with a buffer of 4,096.
    assert overlong_punishment(table([[18432.0]]), 20480, 4096).item() == -0.5


@pytest.mark.parametrize("buffer", [0, 21])
def test_a_buffer_outside_the_limit_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        overlong_punishment(torch.ones(1), 20, buffer)
