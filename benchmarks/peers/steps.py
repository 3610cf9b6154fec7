"""A Trainer that runs one step per request.

Trainer owns its loop, so the loop is held up from inside: the callback blocks where a turn ends. A
timed step is therefore one whole turn: fetching the batch, sampling, forward and backward passes,
optimiser, and whatever else the trainer does each turn.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.protocol import Channel, versions


class StepOnRequest(TrainerCallback):
    """Announces the worker when training begins, then lets one turn of the loop through per request."""

    def __init__(self, channel: Channel, **facts: Any) -> None:
        self.channel = channel
        self.facts = facts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ready: the model is loaded and wrapped, the data tokenised."""
        packages = versions("torch", "transformers", "trl", "accelerate")
        model: Any = kwargs["model"]
        size = sum(parameter.numel() for parameter in model.parameters())
        self.channel.ready(threads=torch.get_num_threads(), **packages, parameters=size, **self.facts)
        if not self.channel.wait():
            raise SystemExit(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The turn is over: report it and hold the loop until the next request."""
        self.channel.done()
        if not self.channel.wait():
            raise SystemExit(0)


def watch_loading(trainer: ModuleType, channel: Channel) -> None:
    """Have the channel told as soon as a trainer's module has loaded its first model."""
    load = trainer.create_model_from_path

    @functools.wraps(load)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        model = load(*arguments, **keywords)
        channel.loaded(model.parameters())
        return model

    trainer.create_model_from_path = watched  # type: ignore[attr-defined]


COMMON_ARGUMENTS: dict[str, Any] = {
    "output_dir": "trainer",
    "use_cpu": True,
    "bf16": True,
    "gradient_checkpointing": False,
    "max_steps": 1_000_000,
    "lr_scheduler_type": "constant",
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Loads fp32 weights, computes under bf16 autocast. Checkpointing, TRL's default, trades about 20 % of the
time (its documentation) for memory that this model does not need; our side does without it too."""
