"""The options of a training run that every method shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from trimtab.config import Section

Tracker = Literal["tensorboard", "wandb"]
"""What can draw a run's curves beside metrics.jsonl."""


class TrainConfig(Section):
    """Optimisation."""

    steps: int = Field(0, ge=0, description="optimiser steps; 0 derives them from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the training groups when steps is 0")
    batch_groups: int = Field(16, ge=1, description="groups (prompts, pairs) in one optimiser step")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="tokens computed at once, padding counted; changes memory, never the gradient",
    )
    activation_mb: int = Field(
        0,
        ge=0,
        description="MiB of activations to keep for the backward pass; layers beyond it are computed again, "
        "which changes no number; 0 keeps all",
    )
    kernels: Literal["auto", "on", "off"] = Field(
        "auto", description="fused kernels compiled for this CPU; auto measures whether they pay"
    )
    lr: float = Field(1e-6, ge=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the rate falls after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    final_lr: float = Field(0.0, ge=0, le=1, description="rate at the last step, as a share of lr")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")
    max_skipped: int = Field(
        5, ge=0, description="steps in a row that may be skipped for a loss or gradient that is not finite"
    )
    seed: int = Field(0, ge=0, description="of the data order, the sampling noise and new weights")
    threads: int = Field(0, ge=0, le=4096, description="CPU threads; 0 takes what the machine offers")
    time_budget_s: float = Field(0.0, ge=0, description="stop after this many seconds; 0 does not limit")
    token_budget: int = Field(
        0,
        ge=0,
        description="stop once the policy was trained on this many prompt and response tokens; 0 no limit",
    )
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves at the end only")
    save_in_background: bool = Field(
        True, description="write checkpoints while training goes on, where memory has room for a copy"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay on disk")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of this step stay too; 0 none")
    keep_best: str = Field(
        "", description='metric whose best checkpoint stays too: "accuracy", or "-loss" where lower is better'
    )
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0 evaluates at start and end")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.schedule == "constant" and self.final_lr:
            raise ValueError('final_lr has no effect with schedule = "constant"')
        if self.steps and self.epochs != 1.0:
            raise ValueError("epochs has no effect with steps; remove one")
        if self.token_budget and not self.steps and self.epochs != 1.0:
            raise ValueError("epochs has no effect with token_budget; remove one")
        if self.steps and self.warmup_steps > self.steps:
            raise ValueError("warmup_steps is larger than steps")
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ValueError("keep_every must be a multiple of save_every")
        if self.keep_best and not self.save_every:
            raise ValueError("keep_best has no effect without save_every")
        return self


class RunConfig(Section):
    """Where the run lives."""

    out: str = Field("runs/run", description="run directory")
    resume: bool = Field(
        False, description="go on from the newest whole checkpoint, or begin where there is none; also auto"
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the weights in model/"
    )
    parent: str = Field("", description="run directory that this run starts from, for the lineage")
    trackers: list[Tracker] = Field(
        [], description="where the metrics also go: tensorboard (tensorboard/ in out), wandb"
    )
    tracker_project: str = Field(
        "", description="project of Weights & Biases that the run belongs to; empty is trimtab"
    )
    _plan: dict[str, Any] | None = PrivateAttr(None)
    _plan_lines: tuple[str, ...] = PrivateAttr(())

    @property
    def plan(self) -> dict[str, Any] | None:
        """What this run's memory and time were planned to be, for its lineage; no option, in no file."""
        return self._plan

    @property
    def plan_lines(self) -> tuple[str, ...]:
        """What its log says of the plan."""
        return self._plan_lines

    def planned(self, plan: dict[str, Any] | None, lines: tuple[str, ...] = ()) -> None:
        """Hand the run that follows its plan; None takes it away again."""
        self._plan, self._plan_lines = plan, lines

    @model_validator(mode="after")
    def _trackers(self) -> RunConfig:
        if twice := next((name for name in self.trackers if self.trackers.count(name) > 1), None):
            raise ValueError(f"trackers: {twice} is there twice; once is enough")
        if self.tracker_project and "wandb" not in self.trackers:
            raise ValueError('tracker_project has no effect without "wandb" in trackers; remove it')
        return self

    @field_validator("resume", mode="wrap")
    @classmethod
    def _auto(cls, value: object, read: Callable[[object], bool]) -> bool:
        try:
            return read(True if value == "auto" else value)
        except ValidationError:
            raise ValueError('takes true, false or "auto"') from None
