"""State: everything that changes in a run, in one place, saved atomically and restored bit for bit.

What never changes (configuration, data, the initial model) is found again from the run directory. The
sampling noise and the data order are pure functions of the seed and of ``position`` and ``step``.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.training.optimiser import Optimiser

FORMAT = 1


@dataclass
class State:
    """All that changes. A method adds what it needs to ``controllers``, ``pending`` and ``extra``."""

    optimiser: Optimiser
    step: int = 0
    """Optimiser steps done."""
    position: int = 0
    """Groups drawn from the data stream."""
    tokens: int = 0
    """Prompt and response tokens trained on: padding not counted, a prompt once for all its responses."""
    others: dict[str, Optimiser] = field(default_factory=dict)
    """Optimisers of further models that learn, by role ("critic")."""
    controllers: dict[str, float] = field(default_factory=dict)
    """Numbers that a method adapts (a KL coefficient, the step of the last reference refresh)."""
    pending: list[Group] = field(default_factory=list)
    """Sampled and scored groups still to be learned from, in order."""
    ahead: list[Group] = field(default_factory=list)
    """The rollout after them, where it was sampled while they were learned from."""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors, such as a reference that was refreshed during the run."""
    seconds: float = 0.0
    """Wall time spent so far, over all sittings."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Choices that bit-exact repetition needs again: threads, compute dtype."""

    def save(self, folder: Path, keep: int) -> Path:
        """Write ``folder/step-N`` by temporary name, sync, rename; then drop all but the newest ``keep``."""
        target = folder / self.folder_name(self.step)
        temporary = folder / f".{target.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {**self.optimiser.tensors(), **{f"extra.{k}": v for k, v in self.extra.items()}}
        for role, optimiser in self.others.items():
            tensors |= {f"{role}/{k}": v for k, v in optimiser.tensors().items()}
        tensors["rng.torch"] = torch.get_rng_state()
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors")
        plain = {
            "format": FORMAT,
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "controllers": self.controllers,
            "pending": [group.to_dict() for group in self.pending],
            "ahead": [group.to_dict() for group in self.ahead],
            "seconds": self.seconds,
            "environment": self.environment,
        }
        (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return target

    @staticmethod
    def folder_name(step: int) -> str:
        """The name of the checkpoint taken after ``step`` updates."""
        return f"step-{step:08d}"

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint's contents. Raises InputError for one that is damaged or does not fit."""
        try:
            plain = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(checkpoint / "tensors.safetensors")
            if plain["format"] != FORMAT:
                raise InputError(f"{checkpoint}: format {plain['format']} is not the {FORMAT} read here")
            pending = [Group.from_dict(group) for group in plain["pending"]]
            ahead = [Group.from_dict(group) for group in plain.get("ahead", [])]
            noise = tensors.pop("rng.torch")
            self.step, self.position = plain["step"], plain["position"]
            self.tokens = plain["tokens"]
            self.controllers, self.seconds = plain["controllers"], plain["seconds"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"{checkpoint}: damaged checkpoint ({error}); remove it and resume again"
            ) from None
        torch.set_rng_state(noise)
        for role, optimiser in self.others.items():
            prefix = f"{role}/"
            optimiser.load_tensors(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        self.optimiser.load_tensors(tensors)
        self.extra = {k[6:]: v for k, v in tensors.items() if k.startswith("extra.")}
        self.pending, self.ahead = pending, ahead


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def saved_environment(folder: Path) -> dict[str, Any]:
    """The newest checkpoint's ``environment``, read before the model is built; {} without a checkpoint."""
    found = checkpoints(folder)
    if not found:
        return {}
    try:
        return json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{found[-1]}: damaged checkpoint ({error}); remove it and resume again") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
