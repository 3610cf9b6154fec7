"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

from trimtab.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Rate of optimiser step ``step`` (from 0) of ``total``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)
