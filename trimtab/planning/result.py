"""What a plan says: bytes by phase, role and kind; operations, bytes moved and seconds by phase."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from trimtab.planning.numbers import Number, largest

PhaseName = Literal["loading", "sampling", "scoring", "training", "update"]
PHASES: dict[PhaseName, str] = {
    "loading": "the models are read",
    "sampling": "the policy answers",
    "scoring": "rewards, and log-probabilities and values without gradient",
    "training": "forward and backward",
    "update": "the optimiser's step",
}
KINDS = (
    *("weights", "master weights", "gradients", "optimiser", "adapter", "activations", "logits"),
    *("cache", "gathered layer", "workspace", "file", "allocator", "framework"),
)
"""What memory is held for, in the order in which bars are stacked. weights: those computed with."""
MARGIN = 0.15
"""How far a peak may lie from its plan at worst (benchmarks/plan)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind that one role holds, on one device."""

    role: str
    """policy, reference, critic, reward model, snapshot; "" for what belongs to nobody."""
    kind: str
    """One of KINDS."""
    bytes: Number


@dataclass(frozen=True, slots=True)
class Phase:
    """What is in memory at the fullest moment of a phase."""

    name: PhaseName
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> Number:
        """All of it."""
        return sum((part.bytes for part in self.parts), 0)

    @property
    def needed(self) -> Number:
        """Without the pages of a mapped file, which the system takes back where memory is short."""
        return sum((part.bytes for part in self.parts if part.kind != "file"), 0)


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one device, above what the process holds after its imports."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Number:
        """Bytes of the fullest phase."""
        return largest(*(phase.bytes for phase in self.phases))

    @property
    def needed(self) -> Number:
        """What a device has to have, at the least: see ``Phase.needed``."""
        return largest(*(phase.needed for phase in self.phases))

    @property
    def fullest(self) -> Phase:
        """The phase with the peak. Numbers only."""
        return max(self.phases, key=lambda phase: phase.bytes)


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase of one optimiser step computes; of a rollout, its share a step."""

    phase: str
    """One of PHASES, or "reference once" for what an offline method computes before its first step."""
    flops: Number
    """Floating-point operations, a multiplication and an addition counting two."""
    bytes: Number
    """Read and written from memory."""
    seconds: Number
    bound: Literal["compute", "memory", "link", "overhead"] = "compute"
    """What limits it."""


@dataclass(frozen=True, slots=True)
class Time:
    """Of the whole run."""

    device: str
    works: tuple[Work, ...]
    step_s: Number
    """Seconds of an optimiser step, rollouts shared out."""
    once_s: Number
    """Loading, and the reference's pass of an offline method."""
    run_s: Number
    tokens: Number
    """Prompt and response tokens that the policy learns from, in the whole run."""
    generated_tokens: Number
    devices: Number = 1
    price_per_hour: float | None = None
    """Of one device, in whatever currency it was given in."""
    cost: Number | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: will it fit, how long will it take."""

    title: str
    memory: Memory
    time: Time | None = None
    available: float | None = None
    """Bytes that the device has for this run; None where nobody knows."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the plan took to be so: model, parameters, that learn, layout, lengths, models in memory, …"""
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """None where what the device has is not known."""
        return None if self.available is None else bool(self.memory.needed <= self.available)

    def to_dict(self) -> dict[str, Any]:
        """JSON: bytes as whole numbers, null for what is not known."""
        time = self.time
        return {
            "format": 1,
            "title": self.title,
            "peak_bytes": round(self.memory.peak),
            "available_bytes": None if self.available is None else round(self.available),
            "fits": self.fits,
            "fullest_phase": self.memory.fullest.name,
            "phases": [
                {
                    "phase": phase.name,
                    "bytes": round(phase.bytes),
                    "parts": [{"role": p.role, "kind": p.kind, "bytes": round(p.bytes)} for p in phase.parts],
                }
                for phase in self.memory.phases
            ],
            "time": None
            if time is None
            else {
                "device": time.device,
                "devices": time.devices,
                "step_s": float(time.step_s),
                "once_s": float(time.once_s),
                "run_s": float(time.run_s),
                "tokens": round(time.tokens),
                "generated_tokens": round(time.generated_tokens),
                "price_per_hour": time.price_per_hour,
                "cost": None if time.cost is None else float(time.cost),
                "phases": [
                    {
                        "phase": w.phase,
                        "flops": float(w.flops),
                        "bytes": float(w.bytes),
                        "seconds": float(w.seconds),
                        "bound": w.bound,
                    }
                    for w in time.works
                ],
            },
            "facts": self.facts,
            "warnings": list(self.warnings),
        }


def within_budget(plan: Plan, seconds: float, steps: int) -> Plan:
    """The plan of a run of ``steps`` steps that ``train.time_budget_s`` ends, and its facts saying so.

    Loading counts in the budget, and the step in which it is spent is finished. ``seconds`` 0 is none.
    """
    time = plan.time
    if not seconds or time is None or not time.step_s:
        return plan
    taken = min(steps, max(1, math.ceil((seconds - float(time.once_s)) / float(time.step_s))))
    if taken == steps:
        return plan
    share, run_s = taken / steps, float(time.once_s) + taken * float(time.step_s)
    return dataclasses.replace(
        plan,
        time=dataclasses.replace(
            time,
            run_s=run_s,
            tokens=share * time.tokens,
            generated_tokens=share * time.generated_tokens,
            cost=None if time.cost is None else time.cost * run_s / time.run_s,
        ),
        facts={**plan.facts, "steps": taken, "ended_by": f"train.time_budget_s, {seconds:,.0f} s"},
    )
