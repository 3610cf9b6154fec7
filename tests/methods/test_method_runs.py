"""Whole runs of each method on the tiny world: what is learned, logged and left behind."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import text_logps, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trimtab import methods
from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.methods.shared import anchor, pairs
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import load_scalar_model

Make = Callable[..., Any]

COMMON = {"step", "loss", "grad_norm", "lr", "response_tokens", "epoch", "seconds"}
KEYS = {
    "sft": COMMON,
    "dpo": COMMON | {"accuracy", "chosen_reward", "rejected_reward", "reward_margin"},
    "grpo": COMMON | {"reward_mean", "reward_std", "advantage_mean", "kl", "entropy", "clip_fraction"},
    "ppo": COMMON
    | {"reward_mean", "reward_std", "advantage_mean", "kl", "entropy", "clip_fraction", "value_loss"}
    | {"value_clip_fraction", "explained_variance", "beta", "rollout_kl", "cut_off", "critic_grad_norm"},
    "reward": COMMON | {"accuracy", "chosen_reward", "rejected_reward", "reward_margin", "reward_mean"},
}


# ---------------------------------------------------------------- the run directory


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo", "reward"])
def test_run_directory_metrics_and_model(name: str, configured: Make) -> None:
    config = configured(name, train__steps=3)
    result, metrics = train(config, name)
    out = result.out
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for line in metrics:
        assert KEYS[name] <= set(line), KEYS[name] - set(line)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
    assert [m["lr"] for m in metrics] == pytest.approx([config.train.lr * k / 3 for k in (3, 2, 1)])

    again = load_config(methods.find(name).Config, out / "config.toml")
    assert again == config
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["method"] == name
    assert lineage["steps"] == 3
    assert lineage["seed"] == 0
    assert lineage["packages"]["torch"] == torch.__version__
    assert len(next(iter(lineage["data"].values()))) == 64
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000003"]
    assert not list(out.glob(".*")), "something temporary was left over"

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    if name == "reward":
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(out / "model")
        assert classifier.config.num_labels == 1
        ids = torch.tensor([tokenizer("a b c c d")["input_ids"] + [2]])
        # Within rounding: the model that was trained runs on fused kernels.
        torch.testing.assert_close(classifier(ids).logits, result.lm.model(ids).logits, rtol=0, atol=1e-5)
        start = load_scalar_model(config.model, new_head="normal").model
        assert (start(ids).logits - classifier(ids).logits).abs() > 1e-3, "nothing was trained"
        return
    loaded: Any = AutoModelForCausalLM.from_pretrained(out / "model")
    got = text_logps(loaded, tokenizer, "a b c", "c d")
    ours = text_logps(result.lm.model, result.lm.tokenizer, "a b c", "c d")
    torch.testing.assert_close(got, ours, rtol=0, atol=1e-5)
    before: Any = AutoModelForCausalLM.from_pretrained(config.model.path)
    assert (text_logps(before, tokenizer, "a b c", "c d") - ours).abs().max() > 1e-3, "nothing was trained"


def test_model_of_a_bf16_run_loads_as_the_fp32_masters(configured: Make) -> None:
    """config.json must not say bfloat16, or transformers rounds the fp32 weights when it loads them."""
    result, _ = train(configured("sft", train__steps=2, model__dtype="bfloat16"), "sft")
    assert result.lm.dtype == torch.bfloat16
    loaded: Any = AutoModelForCausalLM.from_pretrained(result.out / "model")
    assert loaded.dtype == torch.float32
    assert loaded.config.use_cache is True
    for name, master in result.state.optimiser.masters.items():
        assert torch.equal(dict(loaded.named_parameters())[name], master), name
    masters = result.state.optimiser.masters.values()
    assert any((m != m.to(torch.bfloat16).float()).any() for m in masters)


def test_save_dtype(configured: Make) -> None:
    result, _ = train(configured("sft", train__steps=1, run__save_dtype="bfloat16"), "sft")
    loaded: Any = AutoModelForCausalLM.from_pretrained(result.out / "model")
    assert loaded.dtype == torch.bfloat16


def test_checkpoints_during_a_run_and_the_time_budget(configured: Make) -> None:
    result, metrics = train(configured("sft", train__save_every=1, train__keep_checkpoints=2), "sft")
    names = sorted(p.name for p in (result.out / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]
    assert len(metrics) == 6
    result, metrics = train(configured("sft", out="short", train__time_budget_s=1e-6), "sft")
    assert metrics == []
    assert (result.out / "model" / "model.safetensors").is_file()


def test_epochs_decide_the_steps_and_every_row_is_seen(configured: Make) -> None:
    config = configured("sft", train__steps=0, train__epochs=1.5, train__batch_groups=3)
    _, metrics = train(config, "sft")
    assert len(metrics) == 4  # 1.5 · 8 rows / 3
    assert [m["epoch"] for m in metrics] == [0, 0, 1, 1]


# ---------------------------------------------------------------- what is learned


def test_sft_learns_its_demonstrations(configured: Make) -> None:
    _, metrics = train(configured("sft", train__steps=30, train__batch_groups=8), "sft")
    assert metrics[0]["loss"] > 3
    assert metrics[-1]["loss"] < 1.0
    assert metrics[0]["response_tokens"] == 3.0  # two words and the end


def test_sft_loss_is_the_mean_over_the_tokens_of_the_batch(configured: Make, tiny_model: Path) -> None:
    config = configured("sft", train__steps=1, train__batch_groups=8)
    _, metrics = train(config, "sft")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = tiny.tokenizer()
    rows = tiny.demonstrations()
    logps = torch.cat([text_logps(model, tokenizer, r["prompt"], r["completion"]) for r in rows])
    assert metrics[0]["loss"] == pytest.approx(-logps.mean().item(), abs=1e-6)


def test_sft_on_all_counts_the_prompt(configured: Make) -> None:
    config = configured("sft", train__steps=1, train__batch_groups=8, sft__loss_on="all")
    _, metrics = train(config, "sft")
    prompt_tokens = [len(r["prompt"].split()) for r in tiny.demonstrations()]
    assert metrics[0]["response_tokens"] == pytest.approx(3 + sum(prompt_tokens) / 8 - 1)


def test_dpo_learns_its_pairs(configured: Make) -> None:
    result, metrics = train(configured("dpo", train__steps=30, train__batch_groups=8), "dpo")
    first, last = metrics[0], metrics[-1]
    # Before the first update the policy is the reference: no margin, and the loss is log 2.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    assert last["loss"] < 0.4
    assert last["accuracy"] == 1.0
    assert last["chosen_reward"] > 0 > last["rejected_reward"]
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-6)
    assert json.loads((result.out / "lineage.json").read_text())["models_in_memory"] == 1


def test_dpo_reads_the_reference_once(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, int]] = []
    original = LanguageModel.token_logprobs

    def counting(self: LanguageModel, batch: Any, **keywords: Any) -> Any:
        calls.append((torch.is_grad_enabled(), batch.mask_NT.shape[0]))
        return original(self, batch, **keywords)

    monkeypatch.setattr(pairs, "settle_layout", lambda lm, requested: None)
    monkeypatch.setattr(LanguageModel, "token_logprobs", counting)
    train(configured("dpo", train__steps=4), "dpo")
    without_gradient = [responses for grad, responses in calls if not grad]
    assert sum(without_gradient) == 16, "8 pairs, each response once"
    assert [grad for grad, _ in calls] == [False] * len(without_gradient) + [True] * 4


def test_dpo_against_a_reference_of_another_folder(
    configured: Make, tmp_path: Path, tiny_model: Path
) -> None:
    other = tiny.save_model(tmp_path / "other", seed=7)
    config = configured("dpo", train__steps=1, train__batch_groups=8, dpo__reference=str(other))
    result, metrics = train(config, "dpo")
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference: Any = AutoModelForCausalLM.from_pretrained(other)
    losses = []
    for row in tiny.pairs():
        gaps = [
            float(text_logps(m, tiny.tokenizer(), row["prompt"], row[side]).sum())
            for side in ("chosen", "rejected")
            for m in (policy, reference)
        ]
        losses.append(math.log1p(math.exp(-0.1 * ((gaps[0] - gaps[1]) - (gaps[2] - gaps[3])))))
    assert metrics[0]["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert abs(metrics[0]["loss"] - math.log(2)) > 1e-3
    lineage = json.loads((result.out / "lineage.json").read_text())
    assert lineage["models_in_memory"] == 2
    assert lineage["reference"] == str(other)


def test_a_named_reference_is_gone_while_dpo_learns(
    configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, held = anchor.load_reference, list[weakref.ref[Any]]()

    def watched(*arguments: Any) -> Any:
        reference = load(*arguments)
        held.append(weakref.ref(reference.model))
        return reference

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        gc.collect()
        return {"held": float(held[0]() is not None)}

    monkeypatch.setattr(anchor, "load_reference", watched)
    other = tiny.save_model(tmp_path / "other", seed=7)
    config = configured("dpo", train__steps=1, dpo__reference=str(other))
    _, metrics = train(config, "dpo", on_eval=on_eval)
    assert [line["held"] for line in metrics] == [0.0, 0.0]


def test_dpo_reference_of_another_vocabulary_is_refused(
    configured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "VOCABULARY", [*tiny.VOCABULARY, "more"])
    other = tiny.save_model(tmp_path / "other")
    with pytest.raises(InputError, match=r"dpo\.reference: .*65 tokens, the policy 64"):
        train(configured("dpo", dpo__reference=str(other)), "dpo")


def test_dpo_without_a_reference(configured: Make, tiny_model: Path) -> None:
    config = configured("dpo", train__steps=1, train__batch_groups=8, dpo__reference_free=True)
    result, metrics = train(config, "dpo")
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    sums = [
        [float(text_logps(policy, tiny.tokenizer(), row["prompt"], row[side]).sum()) for row in tiny.pairs()]
        for side in ("chosen", "rejected")
    ]
    losses = [math.log1p(math.exp(-0.1 * (w - r))) for w, r in zip(*sums, strict=True)]
    assert metrics[0]["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert metrics[0]["chosen_reward"] == pytest.approx(0.1 * sum(sums[0]) / 8, abs=1e-5)
    assert json.loads((result.out / "lineage.json").read_text())["reference"] == "none"


def test_grpo_learns_what_is_rewarded(configured: Make, tiny_model: Path) -> None:
    config = configured("grpo", train__steps=25, train__batch_groups=8, grpo__group_size=8, grpo__beta=0.0)
    result, metrics = train(config, "grpo")
    start, end = (sum(m["reward_mean"] for m in part) / 3 for part in (metrics[:3], metrics[-3:]))
    assert start < 0.3
    assert end > 0.8
    vowels = torch.tensor([tiny.VOCABULARY.index(v) for v in "aeiou"])

    def probability(model: Any) -> float:
        with torch.no_grad():
            return float(model(torch.tensor([[6, 7, 8]])).logits[0, -1].softmax(-1)[vowels].sum())

    before: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert probability(result.lm.model) > max(0.7, 2 * probability(before))


def test_first_grpo_step_is_exactly_on_policy(configured: Make) -> None:
    """ρ = 1 exactly, so nothing clips and the loss is −mean(A) = 0; π_ref = π, so KL = 0."""
    _, metrics = train(configured("grpo", train__steps=3), "grpo")
    for line in metrics:
        assert line["clip_fraction"] == 0.0
        assert line["advantage_mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[0]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[0]["kl"] == 0.0
    assert metrics[-1]["kl"] > 0.0
    assert metrics[0]["entropy"] > 0.1
    assert metrics[0]["sampler_gap"] < 1e-5
    assert metrics[0]["grad_norm"] > 0.0


def test_later_passes_over_a_rollout_are_off_policy(configured: Make) -> None:
    config = configured(
        "grpo", train__steps=4, grpo__epochs_per_rollout=4, grpo__clip_low=0.01, grpo__clip_high=0.01
    )
    _, metrics = train(config, "grpo")
    assert metrics[0]["clip_fraction"] == 0.0
    assert max(m["clip_fraction"] for m in metrics[1:]) > 0.1
    assert len({m["reward_mean"] for m in metrics}) == 1, "one rollout served all four steps"
    assert metrics[0]["generated_tokens"] == metrics[-1]["generated_tokens"] > 0


def test_reference_is_refreshed(configured: Make) -> None:
    _, metrics = train(configured("grpo", train__steps=4, grpo__refresh_reference_every=2), "grpo")
    assert [m["kl"] > 0 for m in metrics] == [False, True, False, True]


def test_grpo_tree_and_plain_engine_and_layout_give_one_run(configured: Make) -> None:
    """Prompts of one to five tokens: the plain engine pads them on the left, the tree engine not at all."""
    runs = []
    for engine, layout in (("tree", "tree"), ("plain", "plain")):
        config = configured(
            "grpo",
            out=engine,
            train__steps=2,
            sampling__engine=engine,
            model__layout=layout,
            model__dtype="float64",
        )
        runs.append(train(config, "grpo")[1])
    for ours, theirs in zip(*runs, strict=True):
        for key in ("reward_mean", "response_tokens", "loss", "kl", "entropy", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


def test_min_new_tokens_is_corrected_and_stops_early_ends(configured: Make) -> None:
    config = configured("grpo", train__steps=2, sampling__min_new_tokens=4, sampling__stop_tokens=[6])
    _, metrics = train(config, "grpo")
    assert all(m["response_tokens"] >= 4 for m in metrics)
    assert metrics[0]["sampler_gap"] > 1e-3


def test_reward_errors_may_be_skipped(configured: Make, tmp_path: Path) -> None:
    name = tiny.write_reward(tmp_path / "some.py", "return 1 / 0 if prompt == 'a' else len(response)")
    terms = [{"name": name}]
    config = configured(
        "grpo", train__steps=2, train__batch_groups=8, reward__terms=terms, reward__on_error="skip"
    )
    result, _ = train(config, "grpo")
    assert result.state.controllers["skipped_groups"] == 2  # the one prompt "a", in each of two rollouts


# ---------------------------------------------------------------- checks on the model


def test_every_method_checks_the_head_of_the_model_it_loads(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that cannot be run apart from its trunk gives other numbers; SFT needs the check as well."""
    from trimtab.models.head import Head

    original = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda self, hidden: original(self, hidden) * 0.5)
    for layout in ("auto", "plain"):
        config = configured("sft", out=layout, train__steps=1, model__layout=layout)
        result, _ = train(config, "sft")
        assert not result.lm.chunked_head


def test_methods_have_config_and_train() -> None:
    assert {"dpo", "grpo", "ppo", "reward", "sft"} <= set(methods.names())
    for module in map(methods.find, methods.names()):
        assert issubclass(module.Config, methods.find("sft").MethodConfig)
        assert callable(module.train)
    listed = ", ".join(methods.names())
    with pytest.raises(InputError, match=f"unknown method 'ppoo': there are {listed}"):
        methods.find("ppoo")
