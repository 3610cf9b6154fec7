"""A value head on the policy's own trunk: what it reads, what its loss moves, and what a run leaves of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_ppo_update import BETA, disturb, groups
from tiny import saved_state, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.methods import ppo
from trimtab.methods.shared.actor_critic import Now, policy_losses
from trimtab.methods.shared.critic import load_critic, value_losses
from trimtab.methods.shared.online import accumulate
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.load import ModelConfig, load_model
from trimtab.models.roles import frozen_copy
from trimtab.models.value_head import FILE, ValueHead, load_value_head, logprobs_and_values, value_head_of
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.state import State

Make = Callable[..., Any]
TRUNK = {"critic__share": "trunk"}
Gradients = dict[str, torch.Tensor]


def plain_values(lm: Any, weight_1D: torch.Tensor, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The head's product with the trunk's hidden state before each token, by one ordinary call."""
    hidden = lm.model.model(torch.tensor([prompt + tokens]), use_cache=False).last_hidden_state[0]
    return (hidden @ weight_1D[0])[len(prompt) - 1 : -1]


@pytest.fixture
def setting(configured: Make) -> Callable[..., Any]:
    """A policy that has moved from its reference, a head that is not zeros, and an assessed rollout."""

    def make(**changed: Any) -> tuple[Any, ...]:
        options = {
            "model__dtype": "float64",
            "train__batch_groups": 4,
            "ppo__beta": BETA,
            "ppo__value_clip": 0.05,
            **TRUNK,
            **changed,
        }
        config = configured("ppo", **options)
        lm = load_model(config.model)
        reference = frozen_copy(lm)
        critic = load_critic(config.critic, config.model, lm)
        disturb(lm.model, 1, 0.02)
        disturb(critic if isinstance(critic, ValueHead) else critic.model, 3, 0.3)
        rollout = groups()
        state = new_state(config, lm, critic)
        ppo.evaluate_rollout(lm, critic, reference, rollout, config, 4096)
        ppo.assess(rollout, config, state)
        disturb(lm.model, 11, 0.02)
        return config, lm, critic, rollout, state

    return make


def new_state(config: Any, lm: Any, critic: Any) -> State:
    beside = {"value_head": critic.weight} if isinstance(critic, ValueHead) else None
    state = State(Optimiser(lm.model, config.train, torch.float64, beside=beside))
    if beside is None:
        state.others["critic"] = Optimiser(critic.model, config.train, torch.float64)
    state.controllers |= {"beta": BETA, "rollouts": 1}
    state.micro_batch_tokens = 4096
    return state


def gradients(
    setting: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tokens: int = 4096
) -> tuple[Gradients, dict[str, float]]:
    """Of the policy's optimiser in one step of ``learn``, and the metrics."""
    config, lm, critic, rollout, state = setting
    state.micro_batch_tokens = tokens
    seen: dict[int, Gradients] = {}

    def keep(self: Optimiser, lr: float) -> float:
        seen[id(self)] = {n: p.grad.clone() for n, p in self.masters.items() if p.grad is not None}
        self.clear()
        return 0.0

    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "step", keep)
        run = Run("ppo", config, config.run, config.train)
        metrics = ppo.learn(lm, critic, rollout, config, run, state, 10)
    return seen[id(state.optimiser)], metrics


# ---------------------------------------------------------------- what it reads


@pytest.mark.parametrize("layout", ["tree", "plain", "packed"])
@pytest.mark.parametrize("chunked", [True, False])
def test_one_pass_gives_what_two_would(tiny_model: Path, layout: Any, chunked: bool) -> None:
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))
    settle_layout(lm, layout)
    lm.chunked_head = chunked
    head = value_head_of(lm)
    assert not head.weight.any()
    disturb(head, 5, 0.1)
    rollout = groups()
    rollout[0].responses[0].mask = [True, False, True, True, True, True]
    batch = collate(rollout, layout=layout)
    calls: list[int] = []
    lm.trunk.register_forward_hook(lambda *_: calls.append(1))
    logps, entropy, values = logprobs_and_values(lm, head, batch, temperature=0.7, entropy=True)
    assert len(calls) == 1, "one forward pass"
    expected = lm.token_logprobs(batch, temperature=0.7, entropy=True)
    torch.testing.assert_close((logps, entropy), expected, atol=1e-6, rtol=0)
    rows = [(g.prompt_tokens, r) for g in rollout for r in g.responses]
    for (prompt, response), found, mask in zip(rows, values, batch.mask_NT, strict=True):
        theirs = plain_values(lm, head.weight, prompt, response.tokens)
        theirs = theirs[torch.tensor(response.mask or [True] * len(theirs))]
        torch.testing.assert_close(found[mask], theirs, atol=1e-5, rtol=0)
        assert not found[~mask].any()


def test_the_head_stays_in_fp32(tiny_model: Path) -> None:
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="bfloat16"))
    head = value_head_of(lm)
    optimiser = Optimiser(lm.model, TrainConfig(lr=0.1), torch.bfloat16, beside={"value_head": head.weight})
    assert lm.dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32
    head.weight.data += 1e-4  # lost at once where a sum of 1 + 1e-4 is rounded to bf16
    assert logprobs_and_values(lm, head, collate(groups(), layout="tree"))[2].dtype == torch.float32
    assert optimiser.masters["value_head"] is head.weight


# ---------------------------------------------------------------- what its loss moves


@pytest.mark.usefixtures("norms_in_their_own_dtype")
def test_both_losses_and_their_sum_by_finite_differences(setting: Callable[..., Any]) -> None:
    config, lm, head, rollout, _ = setting(
        critic__coefficient=0.7, ppo__entropy_bonus=0.01, ppo__kl_in="loss"
    )
    state = new_state(config, lm, head)

    def losses(part: list[Any], batch: TreeBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps, entropy, values = logprobs_and_values(lm, head, batch, entropy=True)
        policy = policy_losses(logps, entropy, part, batch, config, Now(BETA))[0]
        value = value_losses(values, part, batch, clip=config.ppo.value_clip)[0]
        return policy + 0.7 * value, {}

    def loss() -> float:
        return accumulate(
            lm, state.optimiser, rollout, losses, max_tokens=4096, reduction="token_mean", constant=1
        )[0]

    loss()
    analytic = {n: p.grad.clone() for n, p in state.optimiser.masters.items() if p.grad is not None}
    assert "value_head" in analytic
    step, draw = 1e-6, torch.Generator().manual_seed(7)
    for name in ("value_head", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        parameter = state.optimiser.masters[name]
        way = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        found = []
        for move in (step, -2 * step, step):
            parameter.data.add_(move * way)
            found.append(loss())
        slope = (found[0] - found[1]) / (2 * step)
        assert slope == pytest.approx(float((analytic[name] * way).sum()), rel=1e-5, abs=1e-7)


@pytest.mark.usefixtures("norms_in_their_own_dtype")
def test_without_its_loss_the_policys_gradient_is_that_of_a_critic_apart(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same advantages: coefficient 0 leaves the path of an own critic, and so does ``detach``."""
    shared = setting()
    apart = setting(critic__share="none")
    for ours, theirs in zip(shared[3], apart[3], strict=True):
        for a, b in zip(ours.responses, theirs.responses, strict=True):
            b.token_advantages, b.returns, b.old_values = a.token_advantages, a.returns, a.old_values
    expected, their_metrics = gradients(apart, monkeypatch)
    shared[0].critic.coefficient = 0.0
    found, metrics = gradients(shared, monkeypatch)
    assert not found.pop("value_head").any()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=0)
    assert metrics["loss"] == pytest.approx(their_metrics["loss"], abs=1e-10)
    shared[0].critic.coefficient, shared[0].critic.detach = 0.5, True
    detached, _ = gradients(shared, monkeypatch)
    own = detached.pop("value_head")
    assert own.any()
    for name, gradient in expected.items():
        torch.testing.assert_close(detached[name], gradient, atol=1e-10, rtol=0)
    # And with its loss the trunk moves otherwise, by the coefficient times one gradient.
    shared[0].critic.detach = False
    both = gradients(shared, monkeypatch)[0]
    torch.testing.assert_close(both["value_head"], own, atol=1e-12, rtol=0)
    shared[0].critic.coefficient = 1.0
    twice = gradients(shared, monkeypatch)[0]
    for name, gradient in expected.items():
        assert (both[name] - gradient).abs().max() > 1e-4 or "embed" in name
        torch.testing.assert_close(twice[name] - gradient, 2 * (both[name] - gradient), atol=1e-9, rtol=0)


@pytest.mark.usefixtures("norms_in_their_own_dtype")
def test_micro_batches_are_the_whole(setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, metrics = gradients(setting(), monkeypatch)
    parts, theirs = gradients(setting(), monkeypatch, tokens=16)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-10, rtol=0)
    for key in ("loss", "value_loss", "value_mean", "kl"):
        assert theirs[key] == pytest.approx(metrics[key], abs=1e-10)


def test_tree_and_plain_give_one_run(configured: Make) -> None:
    runs = []
    for form in ("tree", "plain"):
        config = configured(
            "ppo",
            out=form,
            train__steps=3,
            sampling__engine=form,
            model__layout=form,
            model__dtype="float64",
            **TRUNK,
        )
        runs.append(train(config, "ppo")[1])
    for ours, theirs in zip(*runs, strict=True):
        for key in ("reward_mean", "loss", "value_loss", "value_mean", "kl", "entropy", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


def test_it_learns_what_is_rewarded(configured: Make) -> None:
    config = configured(
        "ppo",
        train__steps=40,
        train__batch_groups=8,
        ppo__samples=4,
        ppo__epochs_per_rollout=2,
        ppo__beta=0.0,
        **TRUNK,
    )
    _, metrics = train(config, "ppo")
    rewards = [line["reward_mean"] for line in metrics]
    assert sum(rewards[:4]) / 4 < 0.15
    assert sum(rewards[-4:]) / 4 > 0.4
    assert metrics[-1]["value_loss"] < metrics[0]["value_loss"] / 2
    assert "critic_grad_norm" not in metrics[0], "one optimiser has one norm"


# ---------------------------------------------------------------- warm-up, rates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_while_the_head_warms_up_nothing_else_moves(dtype: str, configured: Make, tiny_model: Path) -> None:
    """Neither by the value loss nor by weight decay, whatever the run computes in."""
    config = configured(
        "ppo",
        model__dtype=dtype,
        train__steps=4,
        train__save_every=1,
        train__keep_checkpoints=9,
        train__weight_decay=0.1,
        critic__warmup_rollouts=1,
        ppo__epochs_per_rollout=2,
        **TRUNK,
    )
    result, metrics = train(config, "ppo")
    start = load_file(tiny_model / "model.safetensors")
    for step, same in ((1, True), (2, True), (3, False)):
        saved = load_file(result.out / f"checkpoints/step-{step:08d}/tensors.safetensors")
        assert all(torch.equal(saved[f"master.{k}"], v) for k, v in start.items()) == same
        assert saved["master.value_head"].any()
    policys = {"loss", "kl", "entropy", "clip_fraction", "grad_norm", "lr"}
    assert [policys <= set(line) for line in metrics] == [False, False, True, True]
    assert not policys & set(metrics[0])
    assert metrics[0]["critic_grad_norm"] > 0
    assert saved_state(result.out, 2)["tokens"] == 0 < saved_state(result.out, 3)["tokens"]


def test_a_rate_of_its_own(configured: Make) -> None:
    """AdamW's first step is its rate: the head moves by critic.lr, the trunk by train.lr."""
    config = configured(
        "ppo", train__steps=1, train__lr=1e-4, train__save_every=1, critic__lr=0.01, ppo__beta=0.0, **TRUNK
    )
    result, metrics = train(config, "ppo")
    head = load_file(result.out / "checkpoints/step-00000001/tensors.safetensors")["master.value_head"]
    assert head.abs().max() == pytest.approx(0.01, rel=1e-3)
    assert metrics[0]["lr"] == 1e-4


# ---------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves_of_each_kind_of_critic(configured: Make) -> None:
    shared, _ = train(configured("ppo", out="shared", train__steps=2, **TRUNK), "ppo")
    model: Any = AutoModelForCausalLM.from_pretrained(shared.out / "model")
    names = load_file(shared.out / "model" / "model.safetensors").keys()
    assert not any("value" in name for name in names), "a plain causal language model"
    assert {n for n, _ in model.named_parameters()} >= set(names)
    saved = load_file(shared.out / "checkpoints/step-00000002/tensors.safetensors")
    lm = load_model(ModelConfig(path=str(shared.out / "model"), dtype="float32"))
    head = load_value_head(shared.out / "critic", lm)
    assert torch.equal(head.weight, saved["master.value_head"])
    assert head.weight.any()
    lineage = json.loads((shared.out / "lineage.json").read_text())
    assert (lineage["critic_share"], lineage["models_in_memory"]) == ("trunk", 2)

    own, _ = train(configured("ppo", out="own", train__steps=2), "ppo")
    critic: Any = AutoModelForSequenceClassification.from_pretrained(own.out / "critic")
    saved = load_file(own.out / "checkpoints/step-00000002/tensors.safetensors")
    assert torch.equal(critic.score.weight, saved["critic/master.score.weight"])

    kept, _ = train(configured("ppo", out="kept", train__steps=1, critic__save=False), "ppo")
    assert not (kept.out / "critic").exists()


def test_on_an_adapters_model(configured: Make, tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    config = configured("ppo", train__steps=3, adapter__kind="lora", adapter__rank=4, **TRUNK)
    result, metrics = train(config, "ppo")
    assert all(line["grad_norm"] > 0 for line in metrics)
    names = load_file(result.out / "model" / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    assert (result.out / "critic" / FILE).is_file()
    peft.AutoPeftModelForCausalLM.from_pretrained(result.out / "model")
    assert json.loads((result.out / "lineage.json").read_text())["models_in_memory"] == 1
    with_critic, _ = train(configured("ppo", out="own", train__steps=1, adapter__kind="lora"), "ppo")
    assert (with_critic.out / "critic" / "adapter_model.safetensors").is_file()


def test_a_head_that_is_none_or_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))
    with pytest.raises(InputError, match="not a value head"):
        load_value_head(tmp_path, lm)
    ValueHead(8, torch.float32, "cpu").save(tmp_path)
    with pytest.raises(InputError, match="width 8, the model has 16"):
        load_value_head(tmp_path, lm)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"critic__coefficient": 0.5}, 'coefficient has no effect with share = "none"'),
        ({"critic__detach": True}, 'detach has no effect with share = "none"'),
        ({**TRUNK, "critic__path": "somewhere"}, 'path has no effect with share = "trunk"'),
        ({**TRUNK, "critic__lr": 1e-3, "train__lr": 0.0}, "follows train.lr, which is 0"),
        ({"critic__share": "adapter"}, "critic.share"),
    ],
)
def test_options_without_effect_are_errors(changed: dict[str, Any], message: str, configured: Make) -> None:
    with pytest.raises(InputError, match=message):
        configured("ppo", **changed)


def test_a_checkpoint_holds_the_head_and_its_moments(configured: Make) -> None:
    """With either spoilt a resumed run goes on otherwise; the exact resume is in test_method_resume."""
    options = {"train__steps": 4, "train__save_every": 2, "train__eval_every": 1, **TRUNK}
    straight = ppo.train(configured("ppo", out="straight", **options))
    for spoilt in ("master.value_head", "exp_avg.value_head"):
        config = configured("ppo", out=spoilt, **options)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(config, on_eval=tiny.stop_at(3))
        checkpoint = Path(config.run.out) / "checkpoints/step-00000002"
        tensors = load_file(checkpoint / "tensors.safetensors")
        assert tensors[spoilt].any()
        tensors[spoilt].zero_()
        save_file(tensors, checkpoint / "tensors.safetensors")
        tiny.reseal(checkpoint)
        resumed = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
        with pytest.raises(AssertionError):
            tiny.assert_same_run(straight.out, ppo.train(resumed).out)
