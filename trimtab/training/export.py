"""model/: what a run leaves for others to load, from the master weights; and any model written whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trimtab.errors import InputError
from trimtab.models.adapter_files import write_adapter
from trimtab.models.load import ModelConfig, load_classifier, load_model, scores
from trimtab.models.scalar_model import ABOUT, ScalarModel, read_about
from trimtab.models.shards import reshard
from trimtab.models.tree_model import TreeModel
from trimtab.parallel.world import world
from trimtab.training.optimiser import Optimiser
from trimtab.training.pieces import gathered, together


def save_model(lm: TreeModel, optimiser: Optimiser, folder: Path, dtype: str) -> None:
    """safetensors and tokenizer, from the master weights; loads with the model's transformers class.

    Of a model that learned by an adapter the adapter alone, which loads with PEFT. Every process calls this,
    and the first writes. Raises OSError or SafetensorError, of many processes OSError in all.
    """
    here = world()
    reshard(lm.model)
    learnt = [(n, m) for n, m in optimiser.masters.items() if n not in optimiser.beside]
    if lm.adapter is None:
        weights = _weights(lm.model, dict(learnt), dtype, gather=lm.spread)
    elif here.first or lm.spread:
        weights = gathered(learnt, getattr(torch, dtype))
    together(here, (lambda: _write(lm, weights, folder, dtype)) if here.first else lambda: None)


def _write(lm: TreeModel, weights: dict[str, torch.Tensor], folder: Path, dtype: str) -> None:
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    if lm.adapter is not None:
        known = lm.adapter
        write_adapter(known.peft, known.name, known.revision, weights, temporary)
    else:
        _write_whole(lm.model, weights, temporary, dtype)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(temporary)
    if isinstance(lm, ScalarModel) and lm.about:
        (temporary / ABOUT).write_text(json.dumps(lm.about, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()
    else:
        temporary.rename(folder)


def export_model(path: str, out: str, dtype: str = "float32") -> str:
    """Write the model at ``path`` (a folder or hub name) whole to ``out``, an adapter merged in fp32; a line.

    Raises InputError for what cannot be loaded, and for an ``out`` that holds something or cannot be written.
    """
    folder = Path(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out} already holds something; give a folder that is new or empty")
    config = ModelConfig(path=path, device="cpu")
    lines: list[str] = []
    model: Any
    if scores(config):
        model, tokenizer = load_classifier(config)
    else:
        lm = load_model(config)
        model, tokenizer, lines = lm.model, lm.tokenizer, lm.notes
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _write_whole(model, _weights(model, {}, dtype), temporary, dtype)
        tokenizer.save_pretrained(temporary)
        if about := read_about(path):
            (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{out}: cannot write: {getattr(error, 'strerror', None) or error}") from None
    return "; ".join([f"{out}: {type(model).__name__} in {dtype}", *lines])


def _weights(
    model: Any, masters: dict[str, nn.Parameter], dtype: str, *, gather: bool = False
) -> dict[str, torch.Tensor]:
    """Every weight in ``dtype`` by name, those of ``masters`` from there; a tied one under each of its names.

    In the first process; with ``gather`` all of them call this, since weights are spread over them.
    """
    if not world().first and not gather:
        return {}
    names: dict[int, str] = {}
    found: list[tuple[str, torch.Tensor]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # save_pretrained drops the second name of a tied weight; one tensor keeps the tie visible to it.
        first = names.setdefault(id(parameter), name)
        found.append((name, masters.get(first, parameter)))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    # Buffers that belong to the model (a router's correction) keep their dtype; parameters take the target's.
    return weights | gathered(found, getattr(torch, dtype))


def _write_whole(model: Any, weights: dict[str, torch.Tensor], folder: Path, dtype: str) -> None:
    model.save_pretrained(folder, state_dict=weights)
    _restate_config(folder / "config.json", dtype)


def _restate_config(file: Path, dtype: str) -> None:
    """Say what the saved weights are, not what this process computed in, or readers would round them."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dtype"] = dtype
    if "use_cache" in values:
        values["use_cache"] = True
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
