"""Folders that others made: weights only from safetensors, code of theirs not at all."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trap import Trap

from trimtab.errors import InputError
from trimtab.models.load import ModelConfig, load_classifier, load_model, load_scalar_model, load_tokenizer

INDEX = "model.safetensors.index.json"
LOADERS = [load_model, load_scalar_model, load_classifier]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def refused(folder: Path, load: Callable[..., Any] = load_model, **options: Any) -> str:
    """The one line that the folder is refused with."""
    with pytest.raises(InputError) as caught:
        load(ModelConfig(path=str(folder), dtype="float32", **options))
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def pickled(folder: Path, trap: Trap, name: str = "pytorch_model.bin") -> Path:
    torch.save({"lm_head.weight": trap}, folder / name)
    return folder / name


def test_the_trap_works(tmp_path: Path) -> None:
    file = pickled(tmp_path, Trap(tmp_path / "made"))
    torch.load(file, weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_with_a_pickle_only(folder: Path, trap: Trap, load: Callable[..., Any]) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder, trap)
    assert "no .safetensors file; pickles are not loaded" in refused(folder, load)


def test_where_there_are_both_the_pickle_is_left_alone(folder: Path, trap: Trap) -> None:
    pickled(folder, trap)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    lm = load_model(ModelConfig(path=str(folder), dtype="float32"))
    saved = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(lm.model.get_input_embeddings().weight, saved)


def test_a_stray_safetensors_file_does_not_let_the_pickle_in(folder: Path, trap: Trap) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    pickled(folder, trap)
    refused(folder)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_under_the_name_of_safetensors(folder: Path, trap: Trap, protocol: int) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(trap, protocol))
    refused(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name", ["evil.bin", "../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors"]
)
def test_an_index_that_leads_elsewhere(folder: Path, trap: Trap, name: str, load: Callable[..., Any]) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    pickled(folder, trap, "evil.bin")
    places = {"model.embed_tokens.weight": name, "lm_head.weight": "model-1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert "no .safetensors file of this folder" in refused(folder, load)


@pytest.mark.parametrize(
    "text", ['{"weight_map": []}', "[]", "3", '{"weight_map": {"a": 3}}', "[" * 100_000, "{"]
)
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(text)
    refused(folder)


def test_an_honest_index_is_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = load_file(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    load_model(ModelConfig(path=str(folder), dtype="float32"))


def with_code(folder: Path, trace: Path, **values: Any) -> None:
    """config.json names classes of a file that, imported, makes the trace."""
    (folder / "modeling_evil.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nraise ImportError('enough')\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
        "AutoModelForSequenceClassification": "modeling_evil.EvilModel",
    }
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("load", LOADERS)
def test_code_that_comes_with_a_model_is_not_run(folder: Path, trace: Path, load: Callable[..., Any]) -> None:
    with_code(folder, trace, model_type="evil")
    assert "custom code" in refused(folder, load)


def test_a_known_architecture_needs_none_of_its_code(folder: Path, trace: Path) -> None:
    with_code(folder, trace)
    assert (
        type(load_model(ModelConfig(path=str(folder), dtype="float32")).model).__name__ == "LlamaForCausalLM"
    )


def test_the_code_is_live_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would prove nothing."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(folder, tmp_path / "made", model_type="evil")
    with contextlib.suppress(InputError):  # as the file wants it: nothing of it stays in this process
        load_model(ModelConfig(path=str(folder), dtype="float32", trust_remote_code=True))
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:f"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
    ],
)
def test_kernels_from_a_hub_are_code(folder: Path, values: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    assert "code from a hub" in refused(folder)


def test_a_tokenizer_with_code_and_pickles(folder: Path, trap: Trap, trace: Path) -> None:
    for name in ("tokenizer.pkl", "vocab.pkl", "tokenizer.bin"):
        (folder / name).write_bytes(pickle.dumps(trap))
    (folder / "tokenization_evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    for name in ("EvilTokenizer", settings.get("tokenizer_class")):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
        with contextlib.suppress(InputError):
            load_tokenizer(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("kept", [True, False])
def test_an_adapter_is_read_from_safetensors_only(
    folder: Path, tmp_path: Path, trap: Trap, kept: bool
) -> None:
    """Where PEFT itself would fall back to the pickle."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        adapter
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(folder)})
    )
    pickled(adapter, trap, "adapter_model.bin")
    if kept:
        load_model(ModelConfig(path=str(adapter), dtype="float32"))
        return
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter)
