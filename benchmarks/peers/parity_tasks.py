"""What the peers' side of the parity cases share: the task file, common arguments, the curves."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.protocol import versions

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


@dataclass(frozen=True, slots=True)
class Task:
    """A case as its file has it."""

    folder: Path
    trainer: str
    model: str
    reward: str
    """Folder of a model with a head of one score: PPO's critic."""
    lr: float
    steps: int
    options: dict[str, Any]
    """The trainer's configuration, over :func:`arguments`."""
    batches: list[list[dict[str, Any]]]
    """Per step (sampling trainers: per rollout) the rows, in order."""
    epochs: int
    minibatches: int
    responses: int
    new_tokens: int


def arguments(task: Task, **more: Any) -> dict[str, Any]:
    """What every trainer is given: fp32, the optimiser of our defaults, a number logged each step."""
    return {
        "output_dir": str(task.folder / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": task.steps,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


def curves_of(trainer: Any) -> dict[str, list[float]]:
    """Loss and gradient norm (before clipping) of every step, as the trainer logged them."""
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {name: [float(row[name]) for row in rows] for name in ("loss", "grad_norm")}


def facts() -> dict[str, Any]:
    """Threads and packages."""
    return {"threads": torch.get_num_threads(), **versions("torch", "transformers", "trl", "accelerate")}


def run_tasks(run: Callable[[Task], dict[str, list[float]]], files: list[str]) -> None:
    """Run every task and write ``peer.json`` beside its file; a failure is written there too."""
    for name in files:
        file = Path(name)
        task = Task(folder=file.parent, **json.loads(file.read_text()))
        found: dict[str, Any]
        try:
            found = {"curves": run(task), "facts": facts()}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        (file.parent / "peer.json").write_text(json.dumps(found))
