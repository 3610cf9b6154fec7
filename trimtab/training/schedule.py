"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

from trimtab.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int, tokens: int = 0) -> float:
    """Rate of optimiser step ``step`` (from 0) of ``total``.

    Under a token budget the rate falls with the share of ``tokens`` that is spent, if that is further.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    if config.token_budget:
        progress = min(1.0, max(progress, tokens / config.token_budget))
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)
