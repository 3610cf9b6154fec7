"""Whole runs with adapters: every method and kind, resume, references, and what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import comparable, stop_at, text_logps, train

from trimtab import methods
from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.methods.ppo import Config as PPO
from trimtab.methods.shared.critic import CriticConfig, load_critic
from trimtab.models.adapters import AdapterConfig
from trimtab.models.load import ModelConfig, load_model
from trimtab.training.metrics import read_metrics

peft = pytest.importorskip("peft")
Make = Callable[..., Any]
ADAPTER: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 4}
SMALL = {"sft": {}, "dpo": {}, "reward": {}, "grpo": {"grpo__group_size": 3}, "ppo": {}}


def lines(out: Path) -> str:
    return " | ".join(json.loads((out / "lineage.json").read_text())["lines"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_method_learns_by_every_kind(name: str, kind: str, configured: Make, tiny_model: Path) -> None:
    """What it leaves loads with PEFT alone; the base's file and the base in memory are what they were."""
    config = configured(name, **{**ADAPTER, "adapter__kind": kind}, **SMALL[name], train__steps=3)
    result, metrics = train(config, name)
    assert len([m for m in metrics if "grad_norm" in m]) == 3
    assert all(m["grad_norm"] > 0 for m in metrics if "grad_norm" in m)
    adapter = result.lm.adapter
    assert adapter is not None
    before = load_file(tiny_model / "model.safetensors")
    base = dict(adapter.base.named_parameters())
    assert all(torch.equal(base[key], tensor) for key, tensor in before.items())
    model = result.out / "model"
    assert not (model / "config.json").exists()
    assert all(t.any() for key, t in tensors(model).items() if "lora_B" in key)
    config = json.loads((model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    if name == "reward":
        theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
    else:
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(7, 20)[None]
    with torch.no_grad():
        ours, alone = (m(input_ids=ids, use_cache=False).logits for m in (result.lm.model, theirs.eval()))
    assert (ours - alone).abs().max() < 1e-4


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"adapter__kind": "dora"}),
    ("dpo", {}),
    ("grpo", {"train__batch_groups": 2, "grpo__rollout_groups": 4, "grpo__refresh_reference_every": 3}),
    ("grpo", {"grpo__overlap": True}),
    ("ppo", {"train__batch_groups": 2, "ppo__rollout_groups": 4, "ppo__epochs_per_rollout": 2}),
    ("ppo", {"ppo__epochs_per_rollout": 2, "critic__share": "trunk", "critic__lr": 0.05}),
    ("reward", {}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "changed"), CASES)
def test_resume_is_bit_exact(name: str, changed: dict[str, Any], dtype: str, configured: Make) -> None:
    module = methods.find(name)
    options = {**ADAPTER, "train__save_every": 3, "train__eval_every": 1, "model__dtype": dtype, **changed}
    straight = module.train(configured(name, out="straight", **options))
    with pytest.raises(KeyboardInterrupt):
        module.train(configured(name, out="stopped", **options), on_eval=stop_at(5))
    resumed = module.train(configured(name, out="stopped", run__resume=True, **options))
    metrics = [comparable(read_metrics(run.out / "metrics.jsonl")) for run in (straight, resumed)]
    assert metrics[0] == metrics[1]
    last = "checkpoints/step-00000006/tensors.safetensors"
    for file in (last, "model/adapter_model.safetensors"):
        ours, theirs = (load_file(run.out / file) for run in (straight, resumed))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), file
    # A checkpoint holds what learns, and no base.
    assert not any("base_layer" in key or "embed_tokens" in key for key in load_file(straight.out / last))


@pytest.fixture
def sft_adapter(configured: Make) -> Path:
    """Of a short SFT run, far enough from its base to be told from it."""
    result, _ = train(configured("sft", **ADAPTER, train__lr=0.05), "sft")
    return result.out / "model"


@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_the_reference_is_where_the_run_began(
    name: str, configured: Make, sft_adapter: Path, tiny_model: Path
) -> None:
    """Begun from an SFT adapter the first KL is 0; against the base alone it would not be."""
    config = configured(
        name, model__path=str(sft_adapter), adapter__kind="lora", **SMALL[name], train__steps=1
    )
    result, metrics = train(config, name)
    if name == "dpo":
        assert metrics[-1]["loss"] == pytest.approx(0.6931, abs=1e-4)
    else:
        assert metrics[-1]["rollout_kl" if name == "ppo" else "kl"] == pytest.approx(0, abs=1e-6)
    assert "goes on" in lines(result.out)
    # The run's own configuration has the adapter's options: it can be begun again from there.
    assert config.adapter.rank == 4
    again = load_config(type(config), result.out / "config.toml", {"run.out": str(result.out) + "2"})
    train(again, name)
    # The number that the base alone would give.
    tokenizer = tiny.tokenizer()
    began = load_model(ModelConfig(path=str(sft_adapter))).model
    base = load_model(ModelConfig(path=str(tiny_model))).model
    gap = text_logps(began, tokenizer, "a b", "c") - text_logps(base, tokenizer, "a b", "c")
    assert gap.abs().max() > 0.1


def test_full_training_of_a_merged_adapter(configured: Make, sft_adapter: Path) -> None:
    result, _ = train(configured("dpo", model__path=str(sft_adapter), train__steps=1), "dpo")
    assert result.lm.adapter is None
    assert (result.out / "model" / "model.safetensors").is_file()
    assert "merged into its base" in lines(result.out)


@pytest.fixture
def reward_adapter(configured: Make) -> Path:
    result, _ = train(configured("reward", **ADAPTER, train__steps=3, train__lr=0.05), "reward")
    return result.out / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_with_four_roles_on_one_base(configured: Make, reward_adapter: Path, dtype: str) -> None:
    config = configured(
        "ppo",
        **ADAPTER,
        model__dtype=dtype,
        critic__path=str(reward_adapter),
        reward__terms=[{"name": "reward_model", "args": {"path": str(reward_adapter)}}],
        train__steps=3,
    )
    result, metrics = train(config, "ppo")
    assert all(m["grad_norm"] > 0 and m["critic_grad_norm"] > 0 for m in metrics if "grad_norm" in m)
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["models_in_memory"] == 1
    said = lines(result.out)
    assert "policy, reference, critic and reward model share one base" in said
    assert f"computing in {dtype}" in said


def test_without_adapters_ppo_holds_four(configured: Make, reward_adapter: Path) -> None:
    terms = [{"name": "reward_model", "args": {"path": str(reward_adapter)}}]
    result, _ = train(configured("ppo", reward__terms=terms, train__steps=1), "ppo")
    assert json.loads((result.out / "lineage.json").read_text())["models_in_memory"] == 4


def test_what_a_critic_starts_from(
    configured: Make, reward_adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(tiny_model), dtype="float32")
    lm = load_model(model, AdapterConfig(kind="rslora", rank=2, targets=["q_proj", "lm_head"]))
    base = next(lm.adapter.base.parameters())  # type: ignore[union-attr]

    def critic(path: str) -> Any:
        return load_critic(CriticConfig(path=path), model, lm, seed=1)

    own, taken = critic(""), critic(str(reward_adapter))
    assert next(own.trunk.parameters()) is base
    assert next(taken.trunk.parameters()) is base
    # A new one is like the policy's, but for the head it does not have; the other goes on as it was saved.
    assert (own.adapter.config.kind, own.adapter.config.targets) == ("rslora", ["q_proj"])
    assert not own.head.weight.any()
    assert taken.adapter.config.rank == 4
    head = tensors(reward_adapter)["base_model.model.score.weight"]
    assert torch.equal(taken.head.weight, head)
    assert taken.head.weight.requires_grad
    whole = tiny.save_reward_model(tmp_path / "rm", seed=1)
    apart = critic(str(whole))
    assert next(apart.trunk.parameters()) is not base
    assert apart.adapter is not None
    assert not next(apart.trunk.parameters()).requires_grad
    assert apart.head.weight.requires_grad


def test_a_snapshot_and_a_refreshed_reference_share_the_base(configured: Make) -> None:
    result, _ = train(
        configured("grpo", **ADAPTER, grpo__overlap=True, grpo__refresh_reference_every=2, train__steps=3),
        "grpo",
    )
    assert json.loads((result.out / "lineage.json").read_text())["models_in_memory"] == 1
    extra = [k for k in result.state.extra if k.startswith("reference.")]
    assert extra
    assert all("lora_" in key for key in extra)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adapter__rank": 8}, "adapter.rank = 8"),
        ({"adapter__targets": ["nothing"]}, "adapter.targets"),
        ({"adapter__kind": "dora"}, "adapter.kind"),
    ],
)
def test_bad_options_leave_no_run(
    changed: dict[str, Any], said: str, configured: Make, sft_adapter: Path
) -> None:
    config = configured("dpo", **{**ADAPTER, **changed}, model__path=str(sft_adapter))
    with pytest.raises(InputError, match=said):
        train(config, "dpo")
    assert not Path(config.run.out, "config.toml").exists()


def test_a_section_of_every_method() -> None:
    assert all("adapter" in methods.find(name).Config.model_fields for name in methods.names())
    assert PPO.model_fields["adapter"].annotation is AdapterConfig
