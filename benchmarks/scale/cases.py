"""What is run: five methods, whole and with LoRA, in four ways. No torch: the command reads this file."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "qwen2 82M"
"""Of ``benchmarks.plan.cases.MODELS``."""
STEPS = 4
"""Optimiser steps of a run; the first is not counted."""
RUNS = 3
"""Times that each case is run in each way."""
TOKENS = 7680
"""Of a step, whatever the method."""

METHODS: dict[str, dict[str, str]] = {
    "sft": {"train.batch_groups": "24"},
    "reward": {"train.batch_groups": "20"},
    "dpo": {"train.batch_groups": "20"},
    "grpo": {"train.batch_groups": "10"},
    "ppo": {"train.batch_groups": "24", "ppo.epochs_per_rollout": "1"},
}
"""Method → its options here beside those of ``benchmarks.plan.cases.METHODS``.

A step's ``TOKENS`` are two full micro-batches for one process and one for each of two. One
epoch a rollout, so that every step of PPO samples too.
"""
ADAPTERS: dict[str, dict[str, str]] = {"all weights": {}, "LoRA": {"adapter.kind": "lora"}}


@dataclass(frozen=True, slots=True)
class Way:
    """How many processes, with how many threads each, and how these hold the weights."""

    name: str
    processes: int
    threads: int
    weights: str = "replicate"


ALONE = Way("1 process", 1, 1)
WAYS = (
    ALONE,
    Way("1 process, 2 threads", 1, 2),
    Way("2 processes, replicate", 2, 1),
    Way("2 processes, shard", 2, 1, "shard"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration."""

    method: str
    adapter: str

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        return f"{self.method}, {self.adapter}"

    def options(self, way: Way, steps: int = STEPS) -> dict[str, str]:
        """Dotted options of the run in this way."""
        own = METHODS[self.method] | ADAPTERS[self.adapter] | {"train.steps": str(steps)}
        return own if way.processes == 1 else own | {"parallel.weights": way.weights}


CASES = tuple(Case(method, adapter) for adapter in ADAPTERS for method in METHODS)
