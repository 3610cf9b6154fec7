"""Faults that give a wrong number and no error: each shown without its guard, and gone with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from trimtab.data.collate import collate, in_each_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import ModelConfig, load_model, wrap
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser


@torch.no_grad()
def error(lm: LanguageModel) -> float:
    """Largest gap between the tree's log-probabilities and the model's own."""
    groups = families.groups()
    return float((lm.token_logprobs(collate(groups))[0] - families.direct_logprobs(lm, groups)).abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_boolean_mask_given_to_the_eager_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added to the scores as 0 and 1, so that everything sees everything."""
    lm = families.tiny(family, "eager")
    assert error(lm) < 1e-5
    monkeypatch.setattr(LanguageModel, "_for_kernel", lambda self, allowed: allowed)
    assert error(lm) > 0.1
    probes = probe_groups(lm.vocab_size)
    line = choose_layout(lm, in_each_layout(probes))
    assert lm.layout == "plain"
    assert line is not None
    assert "differ" in line


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_reading_the_heads_weight(family: str) -> None:
    """Logit scaling and soft-capping are the model's code, not its weight."""
    lm = families.tiny(family)
    ids = torch.tensor([families.tokens(12, random.Random(0))])
    with torch.no_grad():
        truth = lm.model(input_ids=ids).logits[0].log_softmax(-1)
        hidden = lm.head.trunk(input_ids=ids).last_hidden_state[0]
        ours = lm.head(hidden).log_softmax(-1)
        read = F.linear(hidden, lm.model.lm_head.weight).log_softmax(-1)  # type: ignore[union-attr, arg-type]
    assert (ours - truth).abs().max() < 1e-5
    assert (read - truth).abs().max() > 0.1


def test_reading_the_heads_weight_past_an_adapter() -> None:
    """LoRA on the head: its weight alone gives other logits and the adapter no gradient."""
    peft = pytest.importorskip("peft")
    lm = families.tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, lm.model)
    adapter = [p for name, p in lm.model.named_parameters() if "lora_" in name]
    groups = families.groups()
    logps, _ = lm.token_logprobs(collate(groups))
    assert (logps.detach() - families.direct_logprobs(lm, groups)).abs().max() < 1e-5
    gradients = torch.autograd.grad(logps.sum(), adapter)
    assert all(g.abs().max() > 1e-3 for g in gradients)
    with torch.no_grad():
        hidden = lm.head.trunk(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0]
        read = F.linear(hidden, lm.model.lm_head.weight)  # type: ignore[union-attr, arg-type]
        assert (read - lm.head(hidden)).abs().max() > 0.1


def test_dropout_in_a_policy_forward() -> None:
    """GPT-2 drops a tenth by default: the ratio of a policy to itself would not be 1."""
    lm = wrap(AutoModelForCausalLM.from_config(families.CONFIGS["gpt2"]()).train(), None)
    batch = collate(families.groups())

    def ratio() -> torch.Tensor:
        old, new = (lm.token_logprobs(batch)[0][batch.mask_NT] for _ in range(2))
        return torch.exp(new - old)

    assert torch.equal(ratio(), torch.ones_like(ratio()))
    lm.model.train()
    assert (ratio() - 1).abs().mean() > 0.1


@pytest.fixture
def bf16_checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """The shared tiny model as most are published: in bf16."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    for file in tiny_model.glob("token*"):
        (tmp_path / "bf16" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "bf16"


def test_loading_follows_the_checkpoints_dtype(bf16_checkpoint: Path) -> None:
    """At lr 1e-6 most updates of a bf16 weight vanish, so what is trained must not be bf16."""
    assert AutoModelForCausalLM.from_pretrained(bf16_checkpoint).dtype == torch.bfloat16
    for dtype in ("auto", "bfloat16", "float32"):
        lm = load_model(ModelConfig(path=str(bf16_checkpoint), dtype=dtype))
        assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    optimiser = Optimiser(lm.model, TrainConfig(), torch.bfloat16)
    assert {m.dtype for m in optimiser.masters.values()} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_small_updates_reach_fp32_masters_and_vanish_in_bf16() -> None:
    lm = families.tiny("llama")
    optimiser = Optimiser(lm.model, TrainConfig(grad_clip=0), torch.bfloat16)
    before = {name: m.detach().clone() for name, m in optimiser.masters.items()}
    naive = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    batch = collate(families.groups())
    for _ in range(3):
        optimiser.backward(-lm.token_logprobs(batch)[0].sum())
        optimiser.step(1e-6)
    moved = torch.cat([(m != before[n]).flatten() for n, m in optimiser.masters.items()])
    # All but the embeddings of tokens that do not occur.
    assert moved.float().mean() > 0.9
    # The same three steps of 1e-6 taken on the bf16 weights themselves leave nearly all where they were.
    stuck = torch.cat([((p - 1e-6 - 1e-6 - 1e-6) == p).flatten() for p in naive.values()])
    assert stuck.float().mean() > 0.95


def test_casting_buffers_with_the_weights() -> None:
    """``model.to(bfloat16)`` rounds the rotary frequencies, and with them every position."""
    lm = families.tiny("llama")
    lm.cast(torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    model: Any = lm.model
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    whole: Any = families.tiny("llama").model.to(torch.bfloat16)
    assert whole.model.rotary_emb.inv_freq.dtype == torch.bfloat16

    # Nothing else rounded, 200 tokens in: the log-probabilities move far beyond fp32's own error.
    ids = torch.tensor([families.tokens(200, random.Random(0))])
    exact: Any = families.tiny("llama").model
    rounded: Any = families.tiny("llama").model
    buffer = rounded.model.rotary_emb.inv_freq
    buffer.copy_(buffer.bfloat16().float())
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (exact, rounded))
    assert (a - b).abs().max() > 0.01


def test_a_bf16_model_still_agrees_with_itself_across_layouts() -> None:
    lm = families.tiny("llama")
    lm.cast(torch.bfloat16)
    assert 1e-6 < error(lm) < 5e-2
