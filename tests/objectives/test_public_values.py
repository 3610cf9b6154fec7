"""The numbers that other libraries' own public tests state, met by ours to the digits they print.

Each test names the repository and the file that the inputs and the expected numbers come from. Where a peer's
convention differs (whitening inside GAE, no ½ in the value loss, rewards read at masked tokens), the test
converts and says so. Ours throughout: masks are True where a token counts, values stand before their token.
"""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.objectives.kl import kl_estimate
from trimtab.objectives.policy import clipped_policy_loss, relative_loss, truncated_importance_weights
from trimtab.objectives.reduce import reduce_tokens
from trimtab.objectives.value import clipped_value_loss, gae, token_rewards, whiten
from trimtab.training.kl_control import next_beta

NAN = float("nan")


def of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def all_of(like: torch.Tensor) -> torch.Tensor:
    return torch.ones(like.shape, dtype=torch.bool)


def meets(got: torch.Tensor, *rows: list[float], digits: float = 1e-4) -> None:
    """Equal to the printed rows within one unit of their last digit."""
    torch.testing.assert_close(got, of(*rows), atol=digits, rtol=0)


# Token rewards.


def test_torchtune_token_rewards() -> None:
    # pytorch/torchtune, tests/torchtune/rlhf/test_rewards.py (get_rewards_ppo).
    policy = of([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8])
    ref = of([0.2, 0.3, 0.4], [0.6, 0.7, 0.8], [0.9, 1.0, 1.1])
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rewards, kl = token_rewards(scores, policy, ref, all_of(policy), beta=0.5)
    meets(kl, [-0.1] * 3, [-0.2] * 3, [-0.3] * 3)
    meets(rewards, [0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15])


def test_verl_token_rewards_ignore_what_is_masked() -> None:
    # verl-project/verl, tests/trainer/ppo/test_kl_reward_on_cpu.py: NaN at the masked token, coefficient 0.1.
    logps, mask = of([0.0, NAN]), torch.tensor([[True, False]])
    rewards, kl = token_rewards(torch.ones(1, dtype=torch.float64), logps, logps, mask, beta=0.1)
    assert rewards.tolist() == [[1.0, 0.0]]
    assert kl[mask].mean().item() == 0.0


def test_xtuner_token_rewards() -> None:
    # InternLM/xtuner, tests/rl/test_ppo_kl_reward.py and test_gae.py (terminal rewards).
    score = torch.ones(1, dtype=torch.float64)
    policy, ref = of([0.0, -1.0, -2.0]), of([0.0, -1.5, -1.0])
    rewards, _ = token_rewards(score, policy, ref, all_of(policy), beta=0.5)
    meets(rewards, [0.0, -0.25, 1.5])  # [0, 0, 1] − 0.5·k1
    policy, ref = of([0.0, -1.0]), of([0.0, -3.0])
    _, kl = token_rewards(score, policy, ref, all_of(policy), beta=0.1)
    assert kl.mean().item() == pytest.approx(1.0, abs=1e-5)
    zeros, mask = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[False, True, True, False]])
    assert token_rewards(2.5 * score, zeros, zeros, mask, beta=1.0)[0].tolist() == [[0.0, 0.0, 2.5, 0.0]]


def test_nemo_rl_token_rewards_over_holes() -> None:
    # NVIDIA-NeMo/RL, tests/unit/algorithms/test_gae.py (public path with KL in the reward): a constant
    # log-ratio of 0.2 at coefficient 0.1 costs 0.02 at each token that counts; scores at the last of them.
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    policy = -torch.ones(3, 5, dtype=torch.float64)
    scores = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)
    rewards, _ = token_rewards(scores, policy, policy - 0.2, mask, beta=0.1)
    meets(rewards, [0, -0.02, 0, 0.98, 0], [-0.02, -0.02, -0.52, 0, 0], [0] * 5)


# Advantages and returns.


def test_torchtune_returns_and_whitened_advantages() -> None:
    # pytorch/torchtune, tests/torchtune/rlhf/test_rewards.py (estimate_advantages): γ 0.9, λ 0.95. Torchtune
    # whitens inside and its shift_mean=True ADDS the mean back: our shift_mean=False.
    rewards = values = of([0.0, 0.0, 0.0, 1.0])
    advantages, returns = gae(rewards, values, all_of(values), gamma=0.9, lam=0.95)
    expected = [0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1.0]
    meets(returns, expected)
    raw = torch.tensor(expected, dtype=torch.float64) - values
    kept = torch.tensor([[True, True, True, False]])
    for mask in (all_of(values), kept):
        chosen = raw[mask]
        whitened = (chosen - chosen.mean()) / chosen.std() + chosen.mean()
        torch.testing.assert_close(
            whiten(advantages, mask, shift_mean=False)[mask], whitened, atol=1e-4, rtol=1e-4
        )
        assert not whiten(advantages, mask, shift_mean=False)[~mask].any()


@pytest.mark.parametrize(
    ("gamma", "lam", "returns"),
    [(1.0, 1.0, [6.0, 5.0, 3.0]), (0.5, 1.0, [2.75, 3.5, 3.0]), (1.0, 0.5, [3.625, 4.25, 3.0])],
)
def test_skyrl_returns(gamma: float, lam: float, returns: list[float]) -> None:
    # NovaSky-AI/SkyRL, tests/backends/skyrl_train/utils/test_ppo_utils.py.
    rewards, values = of([1.0, 2.0, 3.0]), of([0.5, 1.0, 1.5])
    meets(gae(rewards, values, all_of(values), gamma=gamma, lam=lam)[1], returns, digits=1e-5)


def test_skyrl_whitened_advantages() -> None:
    # NovaSky-AI/SkyRL, tests/backends/skyrl_train/utils/test_ppo_utils.py (with masking). SkyRL runs through
    # the masked token and masks only the statistics, leaving 0.1768 at it; ours is 0 there. ÷n would give ±1.
    rewards, values = of([1.0, 2.0, 3.0]), of([0.5, 1.0, 1.5])
    mask = torch.tensor([[True, False, True]])
    advantages, returns = gae(rewards, values, all_of(values), gamma=1.0, lam=1.0)
    meets(returns, [6.0, 5.0, 3.0])
    meets(whiten(advantages, mask), [0.7071, 0.0, -0.7071])
    spread = advantages[mask].std()
    assert ((advantages[0, 1] - advantages[mask].mean()) / spread).item() == pytest.approx(0.1768, abs=1e-4)


def test_verl_advantages_skip_observations() -> None:
    # verl-project/verl, tests/trainer/ppo/test_core_algos_on_cpu.py (multi-turn): it states no numbers, only
    # that the values at masked positions, and their number, change nothing, for any γ and λ.
    rewards = of([0, 0, 0.1, 0.1, 0.1, 0, 0, 0.1, 1.0, 0, 0])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]]).bool()
    one = of([-70.0, 0.3, 4, 5, 6, -12.0, 0.8, 7, 9, 0, 0])
    two = of([0.9, 44.0, 4, 5, 6, 0.2, 63.0, 7, 9, 0, 0])
    for gamma, lam in ((0.3, 0.8), (1.0, 0.0), (0.9, 1.0)):
        for a, b in zip(
            gae(rewards, one, mask, gamma=gamma, lam=lam),
            gae(rewards, two, mask, gamma=gamma, lam=lam),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_nemo_rl_advantages() -> None:
    # NVIDIA-NeMo/RL, tests/unit/algorithms/test_ppo.py: λ = 0 with the reward 5 at the end; and a hole whose
    # value is 999 against the same tokens without it, γ 0.99, at that library's default λ 0.95.
    values = of([1.0, 2.0, 3.0])
    advantages, _ = gae(of([0.0, 0.0, 5.0]), values, all_of(values), gamma=1.0, lam=0.0)
    meets(advantages, [1.0, 1.0, 2.0])
    mask = torch.tensor([[True, True, False, True, True]])
    holed, _ = gae(of([0, 0, 0, 0, 1.0]), of([0.1, 0.2, 999.0, 0.4, 0.5]), mask, gamma=0.99, lam=0.95)
    closed, _ = gae(of([0, 0, 0, 1.0]), of([0.1, 0.2, 0.4, 0.5]), mask[:, mask[0]], gamma=0.99, lam=0.95)
    assert torch.equal(holed[mask], closed[0])
    assert holed[0, 2] == 0


def test_xtuner_advantages() -> None:
    # InternLM/xtuner, tests/rl/test_gae.py. It packs trajectories in one row; ours stand in rows of their
    # own.
    mask = torch.tensor([[True, False, True, False, True]])
    advantages, _ = gae(of([0, 0, 0, 0, 1.0]), of([0.1, 7.0, 0.2, 8.0, 0.3]), mask, gamma=1.0, lam=1.0)
    meets(advantages, [0.9, 0.0, 0.8, 0.0, 0.7])
    meets(gae(of([1.0]), of([0.4]), all_of(of([1.0])), gamma=1.0, lam=1.0)[0], [0.6])
    values = of([0.1, 0.2, 0.3])
    meets(gae(of([0, 0, 1.0]), values, all_of(values), gamma=1.0, lam=1.0)[1], [1.0, 1.0, 1.0])
    rewards = of([0.0, 0.0], [0.0, 1.0])
    advantages, _ = gae(rewards, torch.zeros_like(rewards), all_of(rewards), gamma=1.0, lam=1.0)
    meets(advantages, [0.0, 0.0], [1.0, 1.0])


def test_miles_advantages() -> None:
    # radixark/miles, tests/fast/backends/training_utils/test_ppo_gae_masks.py: a masked tail with end value
    # 0; the carry over gaps of 1 and 5; and the terminal reward (10) at the last token that counts, γ = λ =
    # 0.
    mask = torch.tensor([[True, True, False, False]])
    advantages, returns = gae(of([0, 3.0, 0, 0]), of([1.0, 2.0, 9.0, 9.0]), mask, gamma=0.9, lam=1.0)
    meets(advantages, [1.7, 1.0, 0.0, 0.0])
    meets(returns, [2.7, 3.0, 0.0, 0.0])
    for gap in (1, 5):
        rewards = torch.zeros(1, 2 + gap, dtype=torch.float64)
        rewards[0, -1] = 2.0
        ends = torch.zeros_like(rewards).bool()
        ends[0, [0, -1]] = True
        advantages, _ = gae(rewards, torch.zeros_like(rewards), ends, gamma=0.9, lam=0.5)
        meets(advantages[ends][None], [0.9, 2.0])
    mask = torch.tensor([[True, True, True, False, False]])
    rewards, values = of([0.1, 0.2, 10.3, 7.0, 7.0]), of([0.5, -0.2, 0.3, 0.9, 0.9])
    meets(gae(rewards, values, mask, gamma=0.0, lam=0.0)[0], [-0.4, 0.4, 10.0, 0.0, 0.0])


# Whitening.


def test_trl_and_torchtune_divide_by_n_minus_1() -> None:
    # huggingface/trl, tests/test_core.py (masked_var of 2, 3 among 1 2 3 4 is torch's own, 0.5) and
    # pytorch/torchtune, tests/torchtune/rlhf/test_rewards.py (masked_var of 1, 2, 3 among 1…5 is 1).
    mask = torch.tensor([[False, True, True, False]])
    root = math.sqrt(0.5)
    meets(whiten(of([1.0, 2.0, 3.0, 4.0]), mask), [0.0, -0.5 / root, 0.5 / root, 0.0])
    mask = torch.tensor([[True, True, True, False, False]])
    meets(whiten(of([1.0, 2.0, 3.0, 4.0, 5.0]), mask), [-1.0, 0.0, 1.0, 0.0, 0.0])


def test_xtuner_divides_by_n() -> None:
    # InternLM/xtuner, tests/rl/test_gae.py: 1 and 3 (and a masked 1000) become −1 and 1 with the population's
    # standard deviation; ours, of a sample, is √2 times that.
    got = whiten(of([1.0, 3.0, 1000.0]), torch.tensor([[True, True, False]]))
    meets(math.sqrt(2) * got, [-1.0, 1.0, 0.0])


# The value loss.


def test_xtuner_value_loss() -> None:
    # InternLM/xtuner, tests/rl/test_value_loss.py: V 0, V_old 1, R 0, clip 0.2 is 0.32; unclipped, V 2 with
    # weight 0.5, and 99 with weight 0, is 1.
    loss, clipped = clipped_value_loss(of([0.0]), of([1.0]), of([0.0]), clip=0.2)
    assert (loss.item(), clipped.item()) == (pytest.approx(0.32), True)
    values, mask = of([2.0, 99.0]), torch.tensor([[True, False]])
    loss, _ = clipped_value_loss(values, values, of([0.0, 0.0]), clip=math.inf)
    assert reduce_tokens(0.5 * loss, mask, 1, "token_mean").item() == pytest.approx(1.0)


def test_nemo_rl_value_loss() -> None:
    # NVIDIA-NeMo/RL, tests/unit/algorithms/test_ppo.py (MseValueLossFn): 0 at a perfect prediction; the error
    # of V 1 and R 0 is 1 (½ with its prefactor, which is ours); clipping never makes the loss smaller.
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    assert not clipped_value_loss(returns, returns, returns, clip=math.inf)[0].any()
    ones = torch.ones(2, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [False] * 4])
    loss, _ = clipped_value_loss(ones, 0 * ones, 0 * ones, clip=math.inf)
    assert 2 * reduce_tokens(loss, mask, 4, "token_mean").item() == 1.0
    held, free = (clipped_value_loss(values, old, returns, clip=c)[0] for c in (0.2, math.inf))
    assert (held >= free).all()
    assert (held > free).any()


def test_torchtune_value_loss_falls_towards_the_return() -> None:
    # pytorch/torchtune, tests/torchtune/rlhf/loss/test_ppo_loss.py: an order, no numbers.
    returns, near, far = of([1.0, 1.0, 1.0]), of([0.9, 1.0, 1.1]), of([0.5, 1.5, 2.0])
    losses = [clipped_value_loss(v, near, returns, clip=0.2)[0].mean().item() for v in (near, far)]
    assert losses[0] < losses[1]


# The policy loss and its KL.


def test_torchtune_policy_loss() -> None:
    # pytorch/torchtune, tests/torchtune/rlhf/loss/test_ppo_loss.py: ε 0.2, A 1, ratio e: −1.2. Its tests for
    # the ratios 1/e and e^0.1 print 0.8 and +1.105 with a relative tolerance of 1e6, which accepts anything;
    # the objective it implements, and ours, is −min(r, clip r) = −0.3679 and −1.1052.
    old = of([0.5, 0.8, 1.2])
    for shift, expected in ((1.0, -1.2), (-1.0, -math.exp(-1)), (0.1, -math.exp(0.1))):
        loss, _ = clipped_policy_loss(old + shift, old, torch.ones_like(old))
        assert loss.mean().item() == pytest.approx(expected, abs=1e-4)


def test_verl_policy_loss_without_dual_clip() -> None:
    # verl-project/verl, tests/trainer/ppo/test_standard_ppo_on_cpu.py: ratio 10, A −1: 10 (3 with a dual
    # clip).
    loss, clipped = clipped_policy_loss(of([math.log(10.0)]), of([0.0]), of([-1.0]))
    assert (loss.item(), clipped.item()) == (pytest.approx(10.0), False)


OLD = of([-1.0, -1.0, -1.0])
NEW = of([-1.69315, -1.0, -0.59453])
ADVANTAGES = of([1.0, -1.0, 2.0])


def test_nemo_rl_policy_loss() -> None:
    # NVIDIA-NeMo/RL, tests/unit/algorithms/test_loss_functions.py: ratios 0.5, 1, 1.5; mean −0.6333.
    loss, _ = clipped_policy_loss(NEW, OLD, ADVANTAGES)
    meets(loss, [-0.5, 1.0, -2.4], digits=1e-3)
    assert loss.mean().item() == pytest.approx(-0.6333, abs=1e-4)


def test_nemo_rl_importance_weighted_policy_loss_and_kl() -> None:
    # The same file: weights π_old/π_sampler 0.6065, 1.6487, 0.8187 give −0.2065; its KL (k3, 0.3069 0 0.0721)
    # is weighted by π/π_sampler instead of π_old/π_sampler, so the two parts are met one by one.
    weights = truncated_importance_weights(OLD, of([-0.5, -1.5, -0.8]), cap=math.inf)
    meets(weights, [0.6065, 1.6487, 0.8187])
    loss, _ = clipped_policy_loss(NEW, OLD, ADVANTAGES)
    assert (weights * loss).mean().item() == pytest.approx(-0.2065, abs=1e-4)
    kl = kl_estimate(NEW, OLD, "k3")
    meets(kl, [0.3069, 0.0, 0.0721])
    assert ((NEW - of([-0.5, -1.5, -0.8])).exp() * kl).mean().item() == pytest.approx(0.060543, abs=1e-5)


def test_nemo_rl_kl_penalty() -> None:
    # The same file: advantages 0, β 0.1, k3 = 0.368, 0, 0.718, mean 0.362, loss 0.0362.
    policy, ref = of([0.0, -1.0, -2.0]), of([-1.0, -1.0, -1.0])
    nothing = torch.zeros(1, dtype=torch.float64)
    loss, _, kl = relative_loss(policy, torch.zeros_like(policy), ref, nothing, all_of(policy), beta=0.1)
    meets(kl, [0.368, 0.0, 0.718], digits=1e-3)
    assert loss.mean().item() == pytest.approx(0.0362, abs=1e-4)


# Control of β.


def test_skyrl_kl_control() -> None:
    # NovaSky-AI/SkyRL, tests/backends/skyrl_train/utils/test_ppo_utils.py: 0.2 becomes 0.2·1.02; fixed stays
    # 0.1.
    got = next_beta(0.2, 0.2, kind="adaptive", start=0.2, target=0.1, horizon=100, items=10)
    assert got == pytest.approx(0.2 * 1.02, rel=1e-5)
    assert next_beta(0.1, 1.0, kind="fixed", start=0.1, target=0.1, horizon=100, items=10) == 0.1


def test_verl_kl_control_resumes() -> None:
    # verl-project/verl, tests/trainer/ppo/test_adaptive_kl_checkpoint_on_cpu.py: from 0.1, target 1, horizon
    # 10 000, resumed after two of these four rollouts.
    seen = [(1.7, 128), (0.2, 64), (1.4, 256), (0.5, 32)]

    def follow(beta: float, part: list[tuple[float, int]]) -> float:
        for kl, items in part:
            beta = next_beta(beta, kl, kind="adaptive", start=0.1, target=1.0, horizon=10_000, items=items)
        return beta

    assert follow(follow(0.1, seen[:2]), seen[2:]) == follow(0.1, seen)
    # Every error is clipped: 0.1·(1 + 0.2·0.0128)·(1 − 0.2·0.0064)·(1 + 0.2·0.0256)·(1 − 0.2·0.0032).
    assert follow(0.1, seen) == pytest.approx(0.1 * 1.00256 * 0.99872 * 1.00512 * 0.99936)
