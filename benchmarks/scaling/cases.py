"""What docs/scaling.md plans: methods, models, devices, by the options of ``trimtab plan`` without a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimtab.planning.devices import find_device
from trimtab.planning.job import Job
from trimtab.planning.plan import plan
from trimtab.planning.quick import quick_job
from trimtab.planning.quick_config import QuickConfig
from trimtab.planning.result import Plan

GIB = 2**30
MODELS = {
    "0.5B": "Qwen/Qwen2.5-0.5B",
    "1.5B": "Qwen/Qwen2.5-1.5B",
    "3B": "Qwen/Qwen2.5-3B",
    "7B": "Qwen/Qwen2.5-7B",
    "14B": "Qwen/Qwen2.5-14B",
    "32B": "Qwen/Qwen2.5-32B",
    "70B": "meta-llama/Llama-3.1-70B",
}
"""Name on the page → card."""
COUNTS = (1, 8, 64)
"""Devices side by side on the page."""
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": 512, "response": 512, "groups": 256},
    "dpo": {"prompt": 512, "response": 512, "groups": 128},
    "grpo": {"prompt": 512, "response": 1024, "groups": 64, "responses": 8},
    "ppo": {"prompt": 512, "response": 512, "groups": 128},
}
"""Of each method: lengths in tokens, prompts or pairs of an optimiser step, answers to each."""
SAMPLED = {"cache_mb": 16384, "max_rows": 512}
"""Of the two that sample: room for keys and values on a device of 80 GB."""
COMMON = {"engine": "gpu", "micro_batch_tokens": 8192}
LEARNS: dict[str, dict[str, Any]] = {"all weights": {}, "LoRA": {"adapter": "lora", "rank": 16}}
AGAIN: dict[str, Any] = {"recompute": "all"}
LADDER: tuple[dict[str, Any], ...] = ({}, AGAIN, AGAIN | {"cache_mb": 2048})
"""What is tried in turn until it fits; the last of methods that sample."""
SAMPLES = ("grpo", "ppo")
MARGIN = 1.15
"""So much more than planned a run may hold (docs/plan-accuracy.md)."""


@dataclass(frozen=True, slots=True)
class Found:
    """A case, as it fits best: with the first step of the ladder that fits, else the last."""

    plan: Plan
    job: Job
    letters: str
    """R replicated, S sharded; c computed again in the backward pass; k a cache of 2 GiB to sample with;
    l layers gathered for each token that is drawn."""

    @property
    def fits(self) -> bool:
        """Into what the device has in all, if the plan is right."""
        return bool(self.plan.fits)

    @property
    def barely(self) -> bool:
        """It fits, and would not if the peak came out higher by as much as a plan may be wrong."""
        return self.fits and bool(MARGIN * self.plan.memory.needed > (self.plan.available or 0))

    @property
    def gib(self) -> float:
        """The peak of one device."""
        return float(self.plan.memory.needed) / GIB

    @property
    def step_s(self) -> float:
        """Seconds of an optimiser step, with its share of a rollout."""
        assert self.plan.time is not None
        return float(self.plan.time.step_s)


def options_of(method: str, size: str, learns: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """As ``trimtab plan`` takes them."""
    options = {"method": method, "model": MODELS[size], **COMMON, **METHODS[method], **LEARNS[learns]}
    if method in SAMPLES:
        options |= SAMPLED
    if method == "ppo":
        options |= {"reward_model": MODELS[size], "reward_dtype": "bfloat16"}
    return options | dict(more)


@cache
def _planned(method: str, size: str, learns: str, card: str, more: tuple[tuple[str, Any], ...]) -> Found:
    device = find_device(card)
    memory = device.memory_gib * GIB
    config = QuickConfig(**options_of(method, size, learns, dict(more)))
    job = quick_job(config, available=memory)
    letters = "" if job.devices == 1 else "S" if job.shard else "R"
    letters += "c" if job.recompute == "all" else ""
    letters += "k" if more and dict(more).get("cache_mb") == 2048 else ""
    letters += "l" if job.shard and job.sampling is not None and job.gather == "layers" else ""
    return Found(plan(job, device=device, available=memory), job, letters)


def planned(method: str, size: str, learns: str, card: str, **more: Any) -> Found:
    """The plan with these options beside the page's own."""
    return _planned(method, size, learns, card, tuple(sorted(more.items())))


def best(method: str, size: str, learns: str, card: str, devices: int, **more: Any) -> Found:
    """With the first step of LADDER that fits, else with the last; sharded where "auto" finds no room."""
    ways: list[dict[str, Any]] = [{}, {"weights": "shard"}]
    found = None
    for way in ways if devices > 1 and "weights" not in more else ways[:1]:
        for options in LADDER if method in SAMPLES else LADDER[:-1]:
            found = planned(method, size, learns, card, devices=devices, **options, **way, **more)
            if found.fits:
                return found
    assert found is not None
    return found
