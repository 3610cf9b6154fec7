"""A frozen base in 4 or 8 bits under several roles; needs bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.models.adapters import AdapterConfig
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_model
from trimtab.models.roles import frozen_copy, reference_of, scalar_on
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser

installed = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not installed, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("base")
    config: Any = families.CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size = 128, 256
    config.initializer_range = 0.08
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def quantised(
    base: Path, quantise: str, kind: str = "lora", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    options = AdapterConfig(kind=kind, rank=4, quantise=quantise)  # type: ignore[arg-type]
    return load_model(ModelConfig(path=str(base), device="cpu"), options, dtype=dtype)


CASES = [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantise", "kind"), CASES)
def test_roles_share_a_quantised_base(quantise: str, kind: str, dtype: torch.dtype, base: Path) -> None:
    lm = quantised(base, quantise, kind, dtype)
    reference, critic, snapshot = reference_of(lm), scalar_on(lm), frozen_copy(lm)
    whole: Any = lm.adapter.base  # type: ignore[union-attr]
    batch = collate(families.groups())
    with torch.no_grad():
        # Whichever tree runs first: bitsandbytes moves things about in its first pass.
        ours = [m.token_logprobs(batch)[0] for m in (snapshot, reference, lm)]
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[1], ours[2])
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    optimisers = [Optimiser(m.model, TrainConfig(), dtype) for m in (lm, critic)]
    for _ in range(3):
        loss = -lm.token_logprobs(batch)[0].sum()
        optimisers[0].backward(loss)
        assert optimisers[0].step(1e-2) > 0
        optimisers[1].backward((critic.values(batch) - 1).square().sum())
        assert optimisers[1].step(1e-2) > 0
    with torch.no_grad():
        assert lm.token_logprobs(batch)[0].sum() > ours[2].sum()
        assert torch.equal(reference.token_logprobs(batch)[0], ours[1])
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, before[name]), name
    places = {p.data_ptr() for p in whole.parameters()}
    for m in (lm, reference, critic, snapshot):
        own = [n for n, p in m.model.named_parameters() if p.data_ptr() not in places]
        assert all("lora_" in n or n.startswith("score.") for n in own)
    small = sum(p.numel() for p in whole.parameters() if not p.is_floating_point())
    linears = sum(m.in_features * m.out_features for m in whole.modules() if is_quantised(m))
    assert small == (linears // 2 if quantise == "nf4" else linears)


def is_quantised(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


@needs_library
def test_four_bits_are_what_they_say(base: Path) -> None:
    """The same numbers as a plain model whose weights are the dequantised ones."""
    from bitsandbytes.functional import dequantize_4bit

    lm = quantised(base, "nf4")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    whole: Any = lm.adapter.base  # type: ignore[union-attr]
    with torch.no_grad():
        for name, module in whole.named_modules():
            if is_quantised(module):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
        truth = plain(input_ids=torch.arange(3, 40)[None]).logits
        ours = lm.model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
    assert (ours - truth).abs().max() < 1e-4 * truth.abs().max()
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        gap = exact(input_ids=torch.arange(3, 40)[None]).logits - truth
    assert gap.abs().max() > 1e-3 * truth.abs().max()


@pytest.mark.skipif(installed, reason="bitsandbytes is installed")
def test_without_the_library(base: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.quantise = \"nf4\" needs bitsandbytes: pip install"):
        quantised(base, "nf4")


def test_int8_gives_no_weights_to_dora() -> None:
    with pytest.raises(ValueError, match="int8"):
        AdapterConfig(kind="dora", quantise="int8")
