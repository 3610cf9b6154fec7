"""model/: what a run leaves for others to load, written from the master weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from trimtab.models.tree_model import TreeModel
from trimtab.training.optimiser import Optimiser


def save_model(lm: TreeModel, optimiser: Optimiser, folder: Path, dtype: str) -> None:
    """safetensors and tokenizer, from the master weights; loads with the model's transformers class."""
    target = getattr(torch, dtype)
    # Buffers that belong to the model (a router's correction) keep their dtype; parameters take the target's.
    weights = {name: tensor.detach() for name, tensor in lm.model.state_dict().items()}
    weights |= {name: p.detach().to(target) for name, p in lm.model.named_parameters()}
    weights |= {name: m.detach().to(target) for name, m in optimiser.masters.items()}
    # save_pretrained drops the second name of a tied weight; naming it here keeps the tie visible to it.
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        twin = next(n for n, p in lm.model.named_parameters() if p is parameter)
        weights[name] = weights[twin]
    temporary = folder.with_name(f".{folder.name}.partial")
    model: Any = lm.model
    model.save_pretrained(temporary, state_dict=weights)
    _restate_config(temporary / "config.json", dtype)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(temporary)
    if folder.exists():
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()
    else:
        temporary.rename(folder)


def _restate_config(file: Path, dtype: str) -> None:
    """Say what the saved weights are, not what this process computed in, or readers would round them."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dtype"] = dtype
    if "use_cache" in values:
        values["use_cache"] = True
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
