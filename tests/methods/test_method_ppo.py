"""What the options of PPO do to a run, and how its critic and its β behave."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import saved_state, train
from transformers import AutoModelForCausalLM

from trimtab.errors import InputError

Make = Callable[..., Any]


def constant(folder: Path, reward: str = "0.0") -> list[dict[str, str]]:
    """Reward terms that give every response the same."""
    return [{"name": tiny.write_reward(folder / "constant.py", f"return {reward}"), "label": "constant"}]


def column(metrics: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in metrics]


def saved_tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step:08d}/tensors.safetensors")


def test_ppo_learns_what_is_rewarded(configured: Make) -> None:
    config = configured(
        "ppo",
        train__steps=40,
        train__batch_groups=8,
        ppo__samples=4,
        ppo__epochs_per_rollout=2,
        ppo__beta=0.0,
    )
    _, metrics = train(config, "ppo")
    rewards = column(metrics, "reward_mean")
    assert sum(rewards[:4]) / 4 < 0.3
    assert sum(rewards[-4:]) / 4 > 0.8
    assert metrics[0]["value_loss"] > 2 * metrics[-1]["value_loss"]


def test_one_rollout_serves_all_its_epochs(configured: Make) -> None:
    config = configured("ppo", train__steps=4, ppo__clip_low=0.01, ppo__clip_high=0.01)
    _, metrics = train(config, "ppo")
    assert metrics[0]["clip_fraction"] == 0.0
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert max(column(metrics[1:], "clip_fraction")) > 0.1
    for key in ("reward_mean", "generated_tokens", "rollout_kl", "explained_variance"):
        assert len(set(column(metrics, key))) == 1, key
    assert metrics[0]["advantage_mean"] == pytest.approx(0.0, abs=1e-9)  # whitened, and one step sees it all
    assert metrics[0]["sampler_gap"] < 1e-5


def test_tree_and_plain_give_one_run(configured: Make) -> None:
    runs = []
    for form in ("tree", "plain"):
        config = configured(
            "ppo", out=form, train__steps=3, sampling__engine=form, model__layout=form, model__dtype="float64"
        )
        runs.append(train(config, "ppo")[1])
    for ours, theirs in zip(*runs, strict=True):
        for key in ("reward_mean", "loss", "value_loss", "kl", "entropy", "grad_norm", "critic_grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


# ---------------------------------------------------------------- the critic


def test_a_critic_from_the_policy_starts_at_zero_with_the_policys_trunk(
    configured: Make, tiny_model: Path
) -> None:
    config = configured("ppo", train__steps=1, train__lr=0.0, critic__lr=1e-9, train__save_every=1)
    result, metrics = train(config, "ppo")
    assert metrics[0]["value_mean"] == 0.0
    tensors = saved_tensors(result.out, 1)
    start: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, weight in start.model.named_parameters():
        torch.testing.assert_close(tensors[f"critic/master.model.{name}"], weight.detach(), atol=1e-6, rtol=0)
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["critic"] == str(tiny_model)
    assert lineage["models_in_memory"] == 3


def test_a_critic_from_a_reward_model_starts_with_its_head(configured: Make, tmp_path: Path) -> None:
    rm = train(configured("reward", train__steps=4, train__batch_groups=8), "reward")[0]
    config = configured(
        "ppo", train__steps=1, critic__path=str(rm.out / "model"), critic__lr=1e-9, model__dtype="float32"
    )
    result, metrics = train(config, "ppo")
    assert metrics[0]["value_mean"] != 0.0
    ours, theirs = saved_tensors(result.out, 1), load_file(rm.out / "model" / "model.safetensors")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[f"critic/master.{name}"], weight, atol=1e-6, rtol=0)


def test_a_rate_of_its_own(configured: Make) -> None:
    """lr = 0 for the policy: what moves is the critic alone."""
    _, metrics = train(configured("ppo", train__lr=0.0, critic__lr=0.02, train__steps=8), "ppo")
    assert column(metrics, "lr") == [0.0] * 8
    assert metrics[-1]["value_loss"] < metrics[0]["value_loss"]
    assert max(column(metrics, "kl")) == pytest.approx(0.0, abs=1e-9)


def test_while_the_critic_warms_up_the_policy_is_left_alone(configured: Make, tiny_model: Path) -> None:
    config = configured(
        "ppo",
        train__steps=4,
        train__save_every=1,
        train__keep_checkpoints=9,
        critic__warmup_rollouts=1,
        ppo__epochs_per_rollout=2,
    )
    result, metrics = train(config, "ppo")
    start = load_file(tiny_model / "model.safetensors")
    for step, same in ((1, True), (2, True), (3, False)):
        saved = saved_tensors(result.out, step)
        assert all(torch.equal(saved[f"master.{k}"], v) for k, v in start.items()) == same
        assert saved["critic/master.score.weight"].any()
    policys = {"loss", "kl", "entropy", "clip_fraction", "grad_norm", "lr"}
    assert [policys <= set(line) for line in metrics] == [False, False, True, True]
    assert not policys & set(metrics[0]), "nothing is made up for a step that was not taken"
    assert column(metrics, "generated_tokens")[0] < column(metrics, "generated_tokens")[2]
    assert saved_state(result.out, 2)["tokens"] == 0 < saved_state(result.out, 3)["tokens"]


def test_the_value_clip(configured: Make) -> None:
    found = {}
    for clip in (0.0, 0.01):
        config = configured("ppo", out=str(clip), train__steps=4, critic__lr=0.05, ppo__value_clip=clip)
        found[clip] = train(config, "ppo")[1]
    assert column(found[0.0], "value_clip_fraction") == [0.0] * 4
    assert found[0.01][0]["value_clip_fraction"] == 0.0, "in a rollout's first step no value has moved"
    assert max(column(found[0.01], "value_clip_fraction")) > 0.1
    assert found[0.0][0]["value_loss"] == found[0.01][0]["value_loss"]
    # Held back, the critic fits the rollout worse, and its clipped loss is never below the plain one.
    assert found[0.01][3]["value_loss"] > found[0.0][3]["value_loss"]


@pytest.mark.parametrize("rollout", [0, 4])
def test_advantages_are_whitened_over_the_rollout(rollout: int, configured: Make) -> None:
    config = configured(
        "ppo",
        train__steps=1,
        train__batch_groups=2,
        train__save_every=1,
        train__micro_batch_tokens=16,
        ppo__rollout_groups=rollout,
        ppo__epochs_per_rollout=2,
    )
    result, metrics = train(config, "ppo")
    pending = saved_state(result.out, 1)["pending"]
    assert len(pending) == (rollout or 2)
    rows = [r["token_advantages"] for g in pending for r in g["responses"]]
    everything = torch.tensor([a for row in rows for a in row], dtype=torch.float64)
    assert float(everything.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(everything.var(correction=1)) == pytest.approx(1.0, abs=1e-6)
    shown = metrics[0]["advantage_mean"]
    # The step's own groups are a part of the rollout: theirs is 0 only where they are all of it.
    assert (abs(shown) < 1e-9) == (rollout == 0)


# ---------------------------------------------------------------- rewards


def test_the_missing_end_is_paid_by_cut_off_responses_alone(configured: Make, tmp_path: Path) -> None:
    config = configured(
        "ppo",
        train__steps=1,
        train__batch_groups=8,
        train__save_every=1,
        sampling__max_new_tokens=3,
        sampling__stop_tokens=list(range(6, 26)),
        reward__terms=constant(tmp_path, "0.25"),
        ppo__samples=4,
        ppo__epochs_per_rollout=2,
        ppo__missing_end_penalty=3.0,
        ppo__gamma=1.0,
        ppo__lam=1.0,
        ppo__beta=0.0,
        ppo__whiten="none",
    )
    result, metrics = train(config, "ppo")
    responses = [r for g in saved_state(result.out, 1)["pending"] for r in g["responses"]]
    kinds = {r["finish"] for r in responses}
    assert kinds == {"stop", "length"}, "both were meant to occur"
    for r in responses:
        # γ = λ = 1 without KL: every token's return is the response's reward.
        assert r["returns"] == pytest.approx([0.25 - 3.0 * (r["finish"] == "length")] * len(r["tokens"]))
        assert r["reward"] == 0.25
    assert metrics[0]["reward_mean"] == 0.25
    assert metrics[0]["reward/constant"] == 0.25
    assert metrics[0]["cut_off"] == sum(r["finish"] == "length" for r in responses) / len(responses)


@pytest.mark.parametrize("samples", [1, 3])
def test_equal_rewards_are_counted_and_harmless(samples: int, configured: Make, tmp_path: Path) -> None:
    config = configured("ppo", train__steps=8, reward__terms=constant(tmp_path, "0.5"), ppo__samples=samples)
    _, metrics = train(config, "ppo")
    assert column(metrics, "groups_without_contrast") == [1.0] * 8
    assert column(metrics, "reward_std") == [0.0] * 8
    assert all(math.isfinite(value) for line in metrics for value in line.values())


def test_without_any_reward_nothing_moves(configured: Make, tmp_path: Path, tiny_model: Path) -> None:
    """No reward, no KL, no penalty: every advantage is exactly 0, whitened too."""
    config = configured(
        "ppo", train__steps=3, reward__terms=constant(tmp_path), ppo__beta=0.0, ppo__missing_end_penalty=0.0
    )
    result, metrics = train(config, "ppo")
    assert column(metrics, "grad_norm") == [0.0] * 3
    assert column(metrics, "explained_variance") == [0.0] * 3
    for name, weight in load_file(tiny_model / "model.safetensors").items():
        assert torch.equal(dict(result.lm.model.named_parameters())[name], weight)


def test_one_sample_a_prompt_is_held_against_the_other_prompts(configured: Make) -> None:
    """A lone response has no spread in its group; the metric must not say that nothing can be learned."""
    config = configured("ppo", train__steps=1, train__batch_groups=8, train__save_every=1, ppo__samples=1)
    result, metrics = train(config, "ppo")
    rewards = [r["reward"] for g in saved_state(result.out, 1)["pending"] for r in g["responses"]]
    assert len(rewards) == 8
    assert metrics[0]["reward_std"] == pytest.approx(float(torch.tensor(rewards).std(correction=0)), abs=1e-6)
    assert metrics[0]["reward_std"] > 0
    assert metrics[0]["groups_without_contrast"] == 0.0


def test_the_entropy_bonus_raises_the_entropy(configured: Make, tmp_path: Path) -> None:
    """With nothing else to learn, the bonus alone moves the policy, and towards more entropy."""
    config = configured(
        "ppo",
        train__steps=12,
        reward__terms=constant(tmp_path),
        ppo__beta=0.0,
        ppo__missing_end_penalty=0.0,
        ppo__entropy_bonus=0.1,
    )
    _, metrics = train(config, "ppo")
    assert metrics[-1]["entropy"] > metrics[0]["entropy"] + 0.2


def test_skipped_groups_shorten_a_rollout(configured: Make, tmp_path: Path) -> None:
    name = tiny.write_reward(tmp_path / "some.py", "return 1 / 0 if prompt == 'a' else len(response)")
    config = configured(
        "ppo", train__steps=4, train__batch_groups=8, reward__terms=[{"name": name}], reward__on_error="skip"
    )
    result, metrics = train(config, "ppo")
    assert json.loads((result.out / "lineage.json").read_text())["skipped_groups"] == 1
    assert len(metrics) == 4


def test_a_learned_reward_is_sampled_against(configured: Make, tmp_path: Path) -> None:
    rm = train(configured("reward", train__steps=4, train__batch_groups=8), "reward")[0]
    terms = [
        {"name": "reward_model", "label": "learned", "args": {"path": str(rm.out / "model"), "device": "cpu"}}
    ]
    result, metrics = train(configured("ppo", train__steps=2, reward__terms=terms), "ppo")
    assert metrics[0]["reward/learned"] == metrics[0]["reward_mean"] != 0
    assert metrics[0]["reward_model_truncated"] == 0.0
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["models_in_memory"] == 4
    assert lineage["rewards"] == ["reward_model"]
    assert not any("as text" in line for line in lineage["lines"]), "one tokenizer, one template"


# ---------------------------------------------------------------- β


CONTROL = {"train__steps": 6, "ppo__epochs_per_rollout": 1, "ppo__beta": 0.1, "ppo__kl_target": 0.01}


def test_adaptive_control_moves_beta(configured: Make) -> None:
    config = configured("ppo", **CONTROL, ppo__kl_control="adaptive", ppo__kl_horizon=40)
    _, metrics = train(config, "ppo")
    betas, kls = column(metrics, "beta"), column(metrics, "rollout_kl")
    assert betas[0] == 0.1
    for k in range(5):
        error = max(-0.2, min(0.2, kls[k] / 0.01 - 1))
        assert betas[k + 1] == pytest.approx(betas[k] * (1 + error * 8 / 40))
    assert betas[1] < betas[0], "no KL before the first step"
    assert betas[-1] > betas[1], "and more than its target later"


def test_linear_control_answers_a_spike_and_forgets_it(configured: Make) -> None:
    config = configured("ppo", **CONTROL, ppo__kl_control="linear", ppo__kl_slope=0.5)
    result, metrics = train(config, "ppo")
    betas, kls = column(metrics, "beta"), column(metrics, "rollout_kl")
    expected = [0.1 * min(1 + 0.5 * max(kl / 0.01 - 1, 0), 10) for kl in kls]
    assert betas == pytest.approx([0.1, *expected[:-1]])
    assert max(betas) > 0.1
    assert json.loads((result.out / "lineage.json").read_text())["beta"] == pytest.approx(expected[-1])


def test_fixed_beta_stays(configured: Make) -> None:
    _, metrics = train(configured("ppo", train__steps=3, ppo__beta=0.1), "ppo")
    assert column(metrics, "beta") == [0.1] * 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ppo__kl_target": 0.2}, 'kl_target has no effect with kl_control = "fixed"'),
        ({"ppo__kl_horizon": 5}, 'kl_horizon has no effect with kl_control = "fixed"'),
        ({"ppo__kl_control": "adaptive", "ppo__kl_slope": 2.0}, "kl_slope has no effect"),
        ({"ppo__kl_control": "linear", "ppo__kl_horizon": 5}, "kl_horizon has no effect"),
        ({"ppo__kl_control": "linear", "ppo__beta": 0.0}, "needs beta above 0"),
        ({"ppo__importance": "never", "ppo__importance_cap": 3.0}, "importance_cap has no effect"),
        ({"ppo__importance": "never", "sampling__top_p": 0.9}, 'importance = "never" with top_k'),
        ({"sampling__temperature": 0.0}, "explores nothing"),
        ({"ppo__rollout_groups": 6}, "must be a multiple of train.batch_groups"),
        ({"ppo__group_size": 4}, "unknown key 'ppo.group_size'"),
        ({"critic__outputs": 1}, "unknown key 'critic.outputs'"),
    ],
)
def test_options_without_effect_are_errors(changed: dict[str, Any], message: str, configured: Make) -> None:
    with pytest.raises(InputError, match=message):
        configured("ppo", **changed)


def test_a_critic_with_another_tokenizer(
    configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = [*tiny.VOCABULARY[:10], tiny.VOCABULARY[11], tiny.VOCABULARY[10], *tiny.VOCABULARY[12:]]
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "VOCABULARY", swapped)
        other = tiny.save_reward_model(tmp_path / "other")
    wrong = configured("ppo", critic__path=str(other))
    with pytest.raises(InputError, match=r"^critic\.path: .*other has another tokenizer than the policy"):
        train(wrong, "ppo")
    # A tokenizer that was named for the policy says nothing of the critic's.
    named = configured("ppo", critic__path=str(other), model__tokenizer=wrong.model.path)
    with pytest.raises(InputError, match=r"^critic\.path: .*other has another tokenizer"):
        train(named, "ppo")


def test_a_critic_of_several_outputs_or_of_none(configured: Make, tmp_path: Path) -> None:
    several = tiny.save_reward_model(tmp_path / "several", num_labels=3)
    with pytest.raises(InputError, match=r"^critic\.path: .*several gives 3 scores; a critic has one value"):
        train(configured("ppo", critic__path=str(several)), "ppo")
    with pytest.raises(InputError, match=r"^critic\.path: .*nowhere: no such folder"):
        train(configured("ppo", critic__path=str(tmp_path / "nowhere")), "ppo")
