"""The learning rate, and any option that moves, as pure functions of the step: nothing of it needs saving."""

from __future__ import annotations

import math
from typing import Literal

from trimtab.training.config import TrainConfig

Shape = Literal["linear", "cosine"]
"""How an option goes from its value to its ``_end``."""


def run_progress(config: TrainConfig, step: int, total: int, tokens: int = 0) -> float:
    """How far the run is at optimiser step ``step`` (from 0) of ``total``: 0 at the first, 1 at the last.

    Under a token budget the share of ``tokens`` that is spent counts, if that is further.
    """
    done = step / max(total - 1, 1)
    if config.token_budget:
        done = max(done, tokens / config.token_budget)
    return min(1.0, done)


def ramp(start: float, end: float | None, progress: float, shape: Shape = "linear") -> float:
    """The value at ``progress`` (0 to 1) of an option that goes from ``start`` to ``end``; None stays.

    linear   start + (end − start)·p
    cosine   start + (end − start)·(1 − cos πp)/2          slow at both ends
    """
    if end is None:
        return start
    share = progress if shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * share


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
