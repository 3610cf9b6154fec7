"""What a method's card says; the cards stand in ``methods.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.planning.flows import Flow
from trimtab.planning.result import PhaseName

DEFAULTS: dict[str, int] = {
    "batch_groups": 16,
    "micro_batch_tokens": 4096,
    "max_new_tokens": 256,
    "cache_mb": 2048,
    "rank": 16,
}
"""Of the options that every method shares, under [train], [sampling] and [adapter]."""
MOST_ROWS = 256
"""Responses that run at once where ``sampling.max_rows`` is 0."""

Reference = Literal["none", "once", "kept"]
"""none: there is none. once: its numbers are computed before the first step, and it is gone. kept: for the
run.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One method."""

    name: str
    """As on the command line."""
    title: str
    rollouts: bool
    """It learns from its own samples."""
    feedback: str
    """What the data hold."""
    reward_source: str
    critic: bool = False
    reference: Reference
    """With the method's defaults."""
    responses: int
    """Of a group, by default; of rankings, whose rows say how many, a usual number."""
    responses_option: str = ""
    """What sets it; empty where the data or the method do."""
    models_in_memory: int
    """Ours while training, with the method's defaults and a reward that is a function."""
    models_usual: int
    """What is usually said of it: the reference kept, and a learned reward beside."""
    best_for: str
    roles: tuple[str, ...]
    """Models that take part, a learned reward where the reward may be one."""
    phases: tuple[PhaseName, ...]
    flow: Flow
    paper: str
    scalar: bool = False
    """What learns is a model of scores."""
    divisible: bool = False
    """A group's responses may be computed in several trees."""
    entropy: bool = False
    """Computed beside every token's log-probability."""
    epochs_per_rollout: int = 1

    @property
    def section(self) -> str:
        """Of the configuration."""
        return "reward_model" if self.name == "reward" else self.name.replace("-", "_")
