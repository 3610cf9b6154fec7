"""Loading and saving: errors in one line, and models that come back as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.models.fused import unfuse
from trimtab.models.load import ModelConfig, load_model, resolve
from trimtab.models.roles import frozen_copy
from trimtab.models.scratch import ScratchConfig, make_model, train_tokenizer
from trimtab.training.config import TrainConfig
from trimtab.training.export import save_model
from trimtab.training.optimiser import Optimiser


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the shared tiny model that a test may damage."""
    shutil.copytree(tiny_model, tmp_path / "copy")
    return tmp_path / "copy"


def refused(path: Path | str, **options: str) -> str:
    """The one line with which loading fails."""
    with pytest.raises(InputError) as caught:
        load_model(ModelConfig(path=str(path), **options))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("model.")
    return line


def test_a_missing_folder_below_one_that_is_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``runs/nothing`` would pass for a name on the hub."""

    def asked(*given: object, **more: object) -> None:
        raise AssertionError("the hub was asked")

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trimtab.models.load.read_adapter", asked)
    with pytest.raises(
        InputError, match=r"^model.path: runs/nothing: no such folder, though there is a folder"
    ):
        resolve(ModelConfig(path="runs/nothing"))
    with pytest.raises(AssertionError, match="the hub was asked"):
        resolve(ModelConfig(path="owner/nothing"))


def test_a_missing_folder(tmp_path: Path) -> None:
    line = refused(tmp_path / "nowhere")
    assert "nowhere" in line
    assert "no such folder" in line


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path)


def test_no_safetensors(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "safetensors" in refused(folder)


def test_only_a_pickle(folder: Path) -> None:
    """Even a sound one is not opened: reading a pickle runs what it holds."""
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    assert "pickles are not loaded" in refused(folder)


def test_a_truncated_file(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot load" in refused(folder)


def test_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder)


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refused(folder).startswith("model.tokenizer")


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    """transformers draws what is missing at random and goes on: the tuned model would be another."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = next(n for n in weights if "down_proj" in n)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder)
    assert name in refused(folder)


def test_a_trunk_saved_without_its_head(tmp_path: Path, tiny_model: Path) -> None:
    lm = families.tiny("mistral")
    lm.model.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "trunk")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "trunk")
    assert "lm_head.weight" in refused(tmp_path / "trunk")


def test_no_causal_lm(tmp_path: Path, tiny_model: Path) -> None:
    config = T5Config(vocab_size=64, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "t5")
    assert "cannot load" in refused(tmp_path / "t5")


def test_options_that_cannot_be_met(folder: Path) -> None:
    assert refused(folder, chat_template="nowhere.jinja").startswith("model.chat_template")
    assert refused(folder, device="cuda:99").startswith("model.device")


def test_a_chat_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    lm = load_model(ModelConfig(path=str(folder), chat_template=str(tmp_path / "mine.jinja")))
    assert lm.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_kernel_is_the_one_asked_for(folder: Path, attention: str) -> None:
    lm = load_model(ModelConfig(path=str(folder), attention=attention))
    assert lm.config._attn_implementation == attention


def test_float64_is_loaded_as_float64(folder: Path) -> None:
    assert load_model(ModelConfig(path=str(folder), dtype="float64")).dtype == torch.float64


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_saved_model_comes_back(family: str, dtype: str, tmp_path: Path) -> None:
    """After a step, computed in bf16 on fp32 masters; tied and untied embeddings, experts."""
    lm = families.tiny(family)
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight  # type: ignore[operator]
    assert tied == (family in ("gemma2", "gpt2"))
    optimiser = Optimiser(lm.model, TrainConfig(), torch.bfloat16)
    optimiser.backward(-lm.token_logprobs(collate(families.groups()))[0].sum())
    optimiser.step(1e-3)
    save_model(lm, optimiser, tmp_path / "model", dtype)

    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert back.dtype == getattr(torch, dtype)
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight) == tied
    assert json.loads((tmp_path / "model" / "config.json").read_text()).get("use_cache", True) is True
    named = dict(back.named_parameters())
    for name, master in optimiser.masters.items():
        assert torch.equal(named[name], master.to(getattr(torch, dtype))), name
    # The run's own model, its masters put in its place, computes the same.
    for name, parameter in lm.model.named_parameters():
        parameter.data = optimiser.masters[name].detach().to(getattr(torch, dtype))
    lm.config._attn_implementation = "eager"
    unfuse(lm.model)
    assert torch.equal(logits(back), logits(lm.model))


def test_a_tensor_that_is_no_parameter_is_saved_too(tmp_path: Path) -> None:
    """DeepSeek's routers keep a correction in a buffer; a model without it chooses other experts."""
    lm = families.tiny("deepseek")
    correction = next(b for n, b in lm.model.named_buffers() if n.endswith("e_score_correction_bias"))
    correction.copy_(torch.tensor([3.0, -3.0, 3.0, -3.0]))
    save_model(lm, Optimiser(lm.model, TrainConfig(), torch.float32), tmp_path / "model", "float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unfuse(lm.model)
    assert (logits(back) - logits(lm.model)).abs().max() < 1e-6


def test_saving_over_a_saved_model_replaces_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        lm = families.tiny("llama", seed=seed)
        save_model(lm, Optimiser(lm.model, TrainConfig(), torch.float32), tmp_path / "model", "float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unfuse(lm.model)
    assert torch.equal(logits(back), logits(lm.model))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_frozen_copy_neither_learns_nor_moves_with_its_original() -> None:
    lm = families.tiny("llama")
    lm.layout, lm.chunked_head = "plain", False
    twin = frozen_copy(lm)
    assert (twin.layout, twin.chunked_head) == ("plain", False)
    before = logits(twin.model)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(twin.model), before)
    assert not any(p.requires_grad for p in twin.model.parameters())


def test_a_model_from_scratch_loads_and_its_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    config = ScratchConfig(vocab_size=270, hidden_size=16, layers=1, heads=2, kv_heads=1, context=32)
    texts = ["all the news that fits", "häßlich 🙂\n\ttabs"]
    lm = load_model(ModelConfig(path=str(make_model(tmp_path / "new", config, texts, seed=0))))
    for text in [*texts, " leading", "trailing ", "日本"]:
        assert lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert lm.context == 32
    first = {n: p.clone() for n, p in lm.model.named_parameters()}
    make_model(tmp_path / "again", config, texts, seed=0)
    again = load_model(ModelConfig(path=str(tmp_path / "again")))
    assert all(torch.equal(p, first[n]) for n, p in again.model.named_parameters())


def test_scratch_needs_text_and_fitting_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        make_model(tmp_path / "new", ScratchConfig(), [], seed=0)
    with pytest.raises(ValueError, match="heads must divide"):
        ScratchConfig(hidden_size=30, heads=4)
    assert train_tokenizer(["aa bb"], 265).pad_token_id == 0
