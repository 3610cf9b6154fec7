"""A model that never learns is read in the dtype that it computes in: the same numbers, half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab.methods.shared.anchor import load_reference
from trimtab.models import load
from trimtab.models.load import ModelConfig, load_classifier, load_model, load_scalar_model
from trimtab.rewards.models import build_reward_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 48, "eos_token_id": 2}


@pytest.fixture
def read_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What transformers was asked for, load by load."""
    asked: list[torch.dtype] = []
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        real = auto.from_pretrained

        def seen(*arguments: Any, real: Any = real, **named: Any) -> Any:
            asked.append(named["dtype"])
            return real(*arguments, **named)

        monkeypatch.setattr(
            load, auto.__name__, type(auto.__name__, (), {"from_pretrained": staticmethod(seen)})
        )
    return asked


def tensors(model: Any) -> dict[str, torch.Tensor]:
    # Gemma's scale of embeddings is rounded to their dtype where it is used.
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.to(torch.bfloat16) if name.endswith("embed_scale") else t for name, t in named.items()}


def same(found: Any, expected: Any) -> bool:
    ours, theirs = tensors(found), tensors(expected)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gpt_neox"])
def test_rounding_while_reading_gives_the_same_model(
    family: str, tmp_path: Path, read_in: list[torch.dtype]
) -> None:
    """Rotary frequencies too, which stay in fp32."""
    torch.manual_seed(0)
    sizes = GPT2 if family == "gpt2" else SIZES
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    made.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    wide = load_model(config)
    wide.cast(torch.bfloat16)
    read_in.clear()
    found = load_model(config, dtype=torch.bfloat16, frozen=True)
    assert read_in == [torch.bfloat16]
    assert same(found.model, wide.model)
    assert all(p.requires_grad for p in wide.model.parameters())
    assert not any(p.requires_grad for p in found.model.parameters())


def test_a_named_reference_is_read_in_the_policys_dtype(
    tiny_model: Path, tmp_path: Path, read_in: list[torch.dtype], configured: Any
) -> None:
    other = tiny.save_model(tmp_path / "other", seed=7)
    policy = load_model(ModelConfig(path=str(tiny_model)))
    policy.cast(torch.bfloat16)
    read_in.clear()
    reference = load_reference(configured("dpo"), policy, str(other), "dpo.reference")
    assert read_in == [torch.bfloat16], "fp32 would be three times the memory for a while"
    wide = load_model(ModelConfig(path=str(other)))
    wide.cast(torch.bfloat16)
    assert all(
        torch.equal(p, q) for p, q in zip(reference.model.parameters(), wide.model.parameters(), strict=True)
    )


def test_a_reward_model_is_read_in_its_own(tmp_path: Path, read_in: list[torch.dtype]) -> None:
    folder = str(tiny.save_reward_model(tmp_path / "rm"))
    wide, _ = load_classifier(ModelConfig(path=folder))
    for parameter in wide.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    read_in.clear()
    found = build_reward_model({"path": folder, "dtype": "bfloat16"})
    assert read_in == [torch.bfloat16]
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), wide.parameters(), strict=True))
    assert found.notes == [], "its layout and where it reads are checked as before"
    build_reward_model({"path": folder})
    assert read_in[1:] == [torch.float32]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_scalar_model_takes_no_gradient(dtype: torch.dtype | None, tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny.save_reward_model(tmp_path / "rm")))
    found = load_scalar_model(config, dtype=dtype, frozen=True)
    assert not any(p.requires_grad for p in found.model.parameters())
    assert found.dtype == (dtype or torch.float32)


def test_an_adapter_is_merged_before_the_sum_is_rounded(
    configured: Any, tmp_path: Path, read_in: list[torch.dtype]
) -> None:
    first = configured("sft", adapter__kind="lora", adapter__rank=2, train__steps=1)
    tiny.train(first, "sft")
    config = ModelConfig(path=str(Path(first.run.out) / "model"))
    wide = load_model(config)
    wide.cast(torch.bfloat16)
    read_in.clear()
    found = load_model(config, dtype=torch.bfloat16, frozen=True).model
    assert same(found, wide.model)
    assert not any(p.requires_grad for p in found.parameters()), "merging made its weights learn"
    assert read_in == [torch.float32]
