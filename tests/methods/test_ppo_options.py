"""PPO's options between the reward and the loss: their order, their schedules, and what they refuse."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_ppo_update import groups
from tiny import saved_state, train

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.groups import Response
from trimtab.methods.shared.actor_critic import Now, policy_losses
from trimtab.methods.shared.ppo_options import PPOConfig
from trimtab.methods.shared.returns import SEEN, fill_returns, running_moments, shaped_rewards
from trimtab.objectives.kl import kl_estimate
from trimtab.objectives.policy import clipped_policy_loss
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.state import State

Make = Callable[..., Any]


def column(metrics: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in metrics]


def state() -> State:
    made = State(Optimiser(torch.nn.Linear(1, 1), TrainConfig(), torch.float32))
    made.controllers["beta"] = 0.1
    return made


def responses(*rewards: float, cut_off: int = -1) -> list[Response]:
    return [
        Response(tokens=[7], reward=r, finish="length" if k == cut_off else "stop")
        for k, r in enumerate(rewards)
    ]


# ---------------------------------------------------------------- the reward on its way


def test_the_order_by_hand() -> None:
    # 1, 3 and 8: mean 4, deviation √(26/2) = 3.6056; −0.8321, −0.2774, 1.1094. Held within ±0.5: −0.5,
    # −0.2774, 0.5. Less the penalty of 2 for the last: −1.5. The penalty before the clip would be lost: −0.5.
    options = PPOConfig(reward_normalise="rollout", reward_clip=0.5, missing_end_penalty=2.0)
    now = state()
    found = shaped_rewards(responses(1.0, 3.0, 8.0, cut_off=2), options, now)
    assert found.tolist() == pytest.approx([-0.5, -0.27735, -1.5], abs=1e-5)
    assert now.controllers["reward_clip_fraction"] == pytest.approx(2 / 3)
    assert not any(key.startswith(SEEN) for key in now.controllers)
    # Clipped first, as if the option were about raw rewards: 0.5 three times, which says nothing.
    raw = PPOConfig(reward_clip=0.5, missing_end_penalty=0.0)
    assert shaped_rewards(responses(1.0, 3.0, 8.0), raw, state()).tolist() == [0.5] * 3


def test_running_moments_take_in_the_rollout_first() -> None:
    options, now = PPOConfig(reward_normalise="running", missing_end_penalty=0.0), state()
    first = shaped_rewards(responses(1.0, 3.0), options, now)
    assert first.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    second = shaped_rewards(responses(5.0, 5.0), options, now)
    every = [1.0, 3.0, 5.0, 5.0]
    expected = (5.0 - statistics.fmean(every)) / statistics.stdev(every)
    assert second.tolist() == pytest.approx([expected] * 2)
    assert running_moments(now).count == 4


def test_running_moments_go_through_the_checkpoint(configured: Make) -> None:
    config = configured(
        "ppo",
        train__steps=4,
        train__save_every=2,
        ppo__epochs_per_rollout=2,
        ppo__reward_normalise="running",
        ppo__reward_clip=1.0,
    )
    result, metrics = train(config, "ppo")
    saved = saved_state(result.out, 2)
    raw = [r["reward"] for g in saved["pending"] for r in g["responses"]] if saved["pending"] else []
    assert saved["controllers"][SEEN + "count"] == 8
    last = saved_state(result.out, 4)["controllers"]
    assert last[SEEN + "count"] == 16
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["reward_running_mean"] == last[SEEN + "mean"]
    assert metrics[-1]["reward_running_std"] == pytest.approx(lineage["reward_running_std"])
    assert all(0 <= line["reward_clip_fraction"] <= 1 for line in metrics)
    assert metrics[0]["reward_mean"] != 0 or raw, "the log keeps the raw rewards"


def assessed(**options: Any) -> list[Any]:
    rollout = groups()
    draw = torch.Generator().manual_seed(2)
    for response in (r for g in rollout for r in g.responses):
        many = len(response.tokens)
        response.old_logps, response.ref_logps, response.old_values = (
            torch.randn(3, many, generator=draw).double() - 2
        ).tolist()
    fill_returns(rollout, PPOConfig(gamma=1.0, **options), state())
    return [r for g in rollout for r in g.responses]


def flat(rows: list[Any], field: str) -> torch.Tensor:
    return torch.tensor([x for r in rows for x in getattr(r, field)], dtype=torch.float64)


def test_whitening_in_full_by_scale_and_not_at_all() -> None:
    plain, full, scale = (flat(assessed(whiten=w), "token_advantages") for w in ("none", "full", "scale"))
    assert plain.mean().abs() > 0.1
    torch.testing.assert_close(full, (plain - plain.mean()) / (plain.var() + 1e-8).sqrt())
    torch.testing.assert_close(scale, full + plain.mean())
    # What the critic learns is in the reward's own unit.
    for kind in ("full", "scale"):
        torch.testing.assert_close(
            flat(assessed(whiten=kind), "returns"), flat(assessed(whiten="none"), "returns")
        )


def test_whitened_token_rewards_by_their_own_formula() -> None:
    """TRL's whiten_rewards: the KL and the reward at the end, over all tokens, the mean kept."""
    plain = assessed(whiten="none", lam=1.0, missing_end_penalty=0.0)
    rewards = []
    for r in plain:
        old, ref = torch.tensor([r.old_logps, r.ref_logps], dtype=torch.float64)
        row = -0.1 * (old - ref)
        row[-1] += r.reward
        rewards.append(row)
    every = torch.cat(rewards)
    whitened = assessed(whiten="none", lam=1.0, missing_end_penalty=0.0, whiten_rewards=True)
    for r, row in zip(whitened, rewards, strict=True):
        own = (row - every.mean()) / (every.var() + 1e-8).sqrt() + every.mean()
        expected = own.flip(0).cumsum(0).flip(0)
        assert r.returns == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimator_in_the_reward_and_the_kl_that_steers_beta(estimator: Any) -> None:
    rows = assessed(whiten="none", lam=1.0, kl_estimator=estimator, missing_end_penalty=0.0)
    for r in rows:
        old, ref = torch.tensor([r.old_logps, r.ref_logps], dtype=torch.float64)
        total = r.reward - 0.1 * float(kl_estimate(old, ref, estimator).sum())
        assert r.returns[0] == pytest.approx(total)
    # Out of the reward, the returns hold none.
    for r in assessed(whiten="none", lam=1.0, kl_in="loss", missing_end_penalty=0.0):
        assert r.returns == pytest.approx([r.reward] * len(r.tokens))


def test_each_reward_term_is_logged_by_its_name(configured: Make, tmp_path: Path) -> None:
    long = tiny.write_reward(tmp_path / "long.py", "return float(len(response.split()))")
    odd = tiny.write_reward(tmp_path / "odd.py", "return float(len(response.split()) % 2)")
    terms = [{"name": long, "label": "long", "weight": 0.5}, {"name": odd, "label": "odd", "weight": -2.0}]
    _, metrics = train(configured("ppo", train__steps=1, train__save_every=1, reward__terms=terms), "ppo")
    line = metrics[0]
    assert line["reward_mean"] == pytest.approx(0.5 * line["reward/long"] - 2.0 * line["reward/odd"])
    assert line["reward/long"] > 1


# ---------------------------------------------------------------- KL in the loss


def loss_of(rollout: list[Any], policy_NT: torch.Tensor, now: Now, **options: Any) -> torch.Tensor:
    class Config:
        ppo = PPOConfig(**options)

        def importance_weights(self, *_: Any) -> None:
            return None

    batch = collate(rollout, layout="plain")
    config: Any = Config()
    return policy_losses(policy_NT, torch.zeros_like(policy_NT), rollout, batch, config, now)[0]


@pytest.fixture
def rollout() -> list[Any]:
    made = groups()
    draw = torch.Generator().manual_seed(3)
    for response in (r for g in made for r in g.responses):
        many = len(response.tokens)
        response.old_logps, response.ref_logps, response.token_advantages = (
            torch.randn(3, many, generator=draw).double() - 1
        ).tolist()
    return made


@pytest.mark.parametrize(("estimator", "by"), [("k2", "k2"), ("k3", "k3"), ("auto", "k2")])
def test_kl_in_the_loss_is_added_to_the_surrogate(estimator: str, by: Any, rollout: list[Any]) -> None:
    batch = collate(rollout, layout="plain")
    old, ref, advantages = (
        batch.padded([getattr(r, f) for g in rollout for r in g.responses])
        for f in ("old_logps", "ref_logps", "token_advantages")
    )
    policy = (old + 0.05).masked_fill(~batch.mask_NT, 0.0)
    found = loss_of(rollout, policy, Now(0.3), kl_in="loss", kl_estimator=estimator)
    plain, _ = clipped_policy_loss(policy, old, advantages)
    expected = plain + 0.3 * kl_estimate(policy, ref, by)
    torch.testing.assert_close(found[batch.mask_NT], expected[batch.mask_NT])
    # With the KL in the reward, the loss has none.
    bare = loss_of(rollout, policy, Now(0.3))
    torch.testing.assert_close(bare[batch.mask_NT], plain[batch.mask_NT])


def test_the_kl_of_a_whole_response_in_the_loss_by_hand() -> None:
    # log π/π_ref = 0.2 and 0.3 at two counted tokens, 9 at one that is masked: k2 of the sum is 0.125, at the
    # first token; of the tokens apart 0.02 + 0.045 = 0.065, with the masked one 45.1.
    response = Response(tokens=[5, 6, 7], mask=[True, False, True], sampler_logps=[-1.0, -1.0])
    response.old_logps, response.ref_logps, response.token_advantages = [-1.0, -1.0], [-1.2, -1.3], [0.0, 0.0]
    group = groups()[0]
    group.responses = [response]
    policy = torch.tensor([[-1.0, 8.0, -1.0]], dtype=torch.float64)
    found = loss_of([group], policy, Now(1.0), kl_in="loss", kl_level="sequence")
    assert found[0].tolist() == pytest.approx([0.125, 0.0, 0.0])
    apart = loss_of([group], policy, Now(1.0), kl_in="loss")
    assert apart[0].tolist() == pytest.approx([0.02, 0.0, 0.045])


def test_a_kl_in_the_loss_holds_a_run_back(configured: Make) -> None:
    common = {"train__steps": 12, "ppo__epochs_per_rollout": 2, "ppo__kl_in": "loss"}
    kl = {}
    for beta in (1e-6, 2.0):
        _, metrics = train(configured("ppo", out=str(beta), ppo__beta=beta, **common), "ppo")
        kl[beta] = metrics[-1]["kl"]
    assert kl[2.0] < kl[1e-6] / 2


# ---------------------------------------------------------------- schedules


def test_beta_goes_from_start_to_end_over_the_run(configured: Make) -> None:
    common = {"train__steps": 6, "ppo__epochs_per_rollout": 2, "ppo__beta": 0.4, "ppo__beta_end": 0.0}
    found = {}
    for shape in ("linear", "cosine"):
        result, metrics = train(configured("ppo", out=shape, ppo__beta_shape=shape, **common), "ppo")
        found[shape] = column(metrics, "beta")
        assert json.loads((result.out / "lineage.json").read_text())["beta"] == pytest.approx(
            found[shape][-1]
        )
    # A rollout keeps the β that its token rewards were made with; steps 0, 2 and 4 of 5 begin one.
    assert found["linear"] == pytest.approx([0.4, 0.4, 0.24, 0.24, 0.08, 0.08])
    halves = [0.4 * (1 + math.cos(math.pi * p)) / 2 for p in (0.0, 0.0, 0.4, 0.4, 0.8, 0.8)]
    assert found["cosine"] == pytest.approx(halves)


def test_both_clips_go_to_their_share(configured: Make) -> None:
    config = configured(
        "ppo",
        train__steps=5,
        ppo__clip_low=0.2,
        ppo__clip_high=0.3,
        ppo__clip_end=0.5,
        ppo__epochs_per_rollout=1,
    )
    _, metrics = train(config, "ppo")
    assert column(metrics, "clip_low") == pytest.approx([0.2, 0.175, 0.15, 0.125, 0.1])
    assert column(metrics, "clip_high") == pytest.approx([0.3, 0.2625, 0.225, 0.1875, 0.15])


def test_a_narrower_clip_takes_more_gradient(rollout: list[Any]) -> None:
    batch = collate(rollout, layout="plain")
    old = batch.padded([r.old_logps for g in rollout for r in g.responses])
    policy = (old + 0.15).masked_fill(~batch.mask_NT, 0.0).requires_grad_(True)
    kept = []
    for clips in (1.0, 0.5, 0.0):
        (grad,) = torch.autograd.grad(loss_of(rollout, policy, Now(0.0, clips)).sum(), policy)
        kept.append(int((grad != 0).sum()))
    # ρ = 1.16: inside 1.2, outside 1.1 for positive advantages; a negative one keeps its gradient.
    assert kept[0] == int(batch.mask_NT.sum()) > kept[1] == kept[2] > 0


def test_the_dual_clip(rollout: list[Any]) -> None:
    batch = collate(rollout, layout="plain")
    old, advantages = (
        batch.padded([getattr(r, f) for g in rollout for r in g.responses])
        for f in ("old_logps", "token_advantages")
    )
    policy = (old + 1.5).masked_fill(~batch.mask_NT, 0.0).requires_grad_(True)
    (grad,) = torch.autograd.grad(loss_of(rollout, policy, Now(0.0), dual_clip=3.0).sum(), policy)
    assert not grad[batch.mask_NT].any(), "ρ = 4.5 is past both clips, whatever the advantage's sign"
    (grad,) = torch.autograd.grad(loss_of(rollout, policy, Now(0.0)).sum(), policy)
    torch.testing.assert_close(grad[batch.mask_NT] != 0, (advantages < 0)[batch.mask_NT])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta_end": 0.1, "kl_control": "adaptive"}, 'beta_end has no effect with kl_control = "adaptive"'),
        ({"beta_end": 0.1, "kl_control": "linear"}, 'beta_end has no effect with kl_control = "linear"'),
        ({"beta_shape": "cosine"}, "beta_shape has no effect without beta_end"),
        ({"clip_shape": "cosine"}, "clip_shape has no effect without clip_end"),
        ({"beta": 0.0, "kl_in": "loss"}, "kl_in has no effect with beta = 0"),
        ({"beta": 0.0, "kl_estimator": "k3"}, "kl_estimator has no effect with beta = 0"),
        ({"kl_level": "sequence"}, 'kl_level has no effect with kl_in = "reward"'),
        ({"kl_in": "loss", "kl_estimator": "k1"}, 'kl_estimator = "k1" has no gradient'),
        ({"dual_clip": 1.1}, "dual_clip = 1.1 must be above 1 \\+ clip_high"),
        ({"dual_clip": 1.4, "clip_end": 3.0}, "dual_clip = 1.4 must be above"),
        ({"whiten": True}, "whiten"),
        ({"whiten": "rollout"}, "whiten"),
        ({"reward_normalise": "batch"}, "reward_normalise"),
        ({"reward_clip": -1.0}, "reward_clip"),
    ],
)
def test_contradictions_are_errors(changed: dict[str, Any], message: str, configured: Make) -> None:
    with pytest.raises(InputError, match=message) as caught:
        configured("ppo", **{f"ppo__{key}": value for key, value in changed.items()})
    assert "\n" not in str(caught.value)


def test_beta_may_begin_at_0_where_it_ends_above(configured: Make) -> None:
    config = configured("ppo", ppo__beta=0.0, ppo__beta_end=0.2, ppo__kl_in="loss", train__steps=3)
    _, metrics = train(config, "ppo")
    assert metrics[0]["beta"] == 0.0
