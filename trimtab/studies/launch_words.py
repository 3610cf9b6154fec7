"""What is said and kept of the plan of a run: lines of its log, a refusal, its lineage's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.planning.advice import Advice
from trimtab.planning.look import duration, kinds_of, size
from trimtab.planning.result import MARGIN, Phase, Plan

SHOWN = 0.05
"""Kinds of memory with less than this share of the peak are not named in the log."""
LIMITS = "the limits of the configuration"
"""What lengths are where neither data nor a tokenizer are there to say."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was found before a run: its plan, or why there is none."""

    plan: Plan | None
    why: str = ""
    seconds: float = 0.0
    """What planning took."""
    held_mb: float = 0.0
    """MiB that this process held before: what planning reads serves the run, and is the run's."""

    @property
    def short(self) -> bool:
        """More than MARGIN above what is free: it cannot fit, even if the plan is that much too high."""
        plan = self.plan
        return (
            plan is not None
            and plan.available is not None
            and plan.memory.needed > (1 + MARGIN) * plan.available
        )

    @property
    def near(self) -> bool:
        """Whether it fits is within the plan's error."""
        return self.plan is not None and not self.short and nothing_to_spare(self.plan)


def refusal(name: str, plan: Plan, advice: Advice | None, stage: str = "", *, without: str = "") -> str:
    """One line: what it would take, what there is, and what to change.

    ``without``: which value of a sweep to leave out instead.
    """
    assert plan.available is not None
    free = f"{size(plan.available)} are free"
    line = f"{name}: cannot fit: {_peak(plan)}, and {free}{_for_each(plan)}{_guessed(plan)}"
    ways = [without] if without else []
    if advice is not None and advice.fits:
        then = size(float(advice.plan.memory.needed))
        spare = ", with nothing to spare" if nothing_to_spare(advice.plan) else ""
        ways.append(f"add {advice.options(stage)} (then {then}{spare})")
    if ways:
        return f"{line}; {', or '.join(ways)}, or --force to go on all the same"
    told = "" if advice is None else f"; {advice.otherwise}"
    return f"{line}{told}; --force goes on all the same"


def _for_each(plan: Plan) -> str:
    """Of several processes, whose figures these are."""
    count = plan.facts.get("processes", 1)
    return "" if count == 1 else f" for each of {count} processes"


def _guessed(plan: Plan) -> str:
    """Where lengths were not read from the data, why the plan may be far too high."""
    if plan.facts.get("lengths") != LIMITS:
        return ""
    told = next((warning for warning in plan.warnings if LIMITS in warning), f"lengths are {LIMITS}")
    return f" ({told})"


def lines_of(
    ahead: Ahead, *, forced: bool = False, halved: str = "", without: tuple[str, ...] = ()
) -> list[str]:
    """What the run's log says of its plan; no warning that begins with one of ``without``."""
    plan = ahead.plan
    if plan is None:
        return [f"no plan: {ahead.why}"]
    free = "" if plan.available is None else f", {size(plan.available)} free"
    lines = [f"plan: {_peak(plan)}{free}{_for_each(plan)}{_clock(plan)}"]
    lines += [f"plan: {warning}" for warning in plan.warnings if not warning.startswith(without)][:1]
    if forced:
        lines.append("plan: that does not fit; going on, since --force was given")
    elif halved:
        lines.append(f"plan: that does not fit at once; {halved}")
    elif ahead.near:
        told = (
            f"it fits with nothing to spare, and the peak may come out {MARGIN:.0%} higher"
            if plan.fits
            else f"it fits only if the peak comes out lower, as it may by {MARGIN:.0%}; trimtab plan says "
            "what to change"
        )
        lines.append(f"plan: a near miss: {told}")
    return lines


def _peak(plan: Plan) -> str:
    """ "2.1 GiB at most (training: activations 1.2 GiB, weights 300 MiB)"."""
    fullest = plan.memory.fullest
    kinds = sorted(kinds_of(fullest).items(), key=lambda one: -one[1])
    shown = [f"{kind} {size(held)}" for kind, held in kinds if held >= SHOWN * float(fullest.bytes)]
    return f"{size(float(plan.memory.peak))} at most ({fullest.name}: {', '.join(shown)})"


def _clock(plan: Plan) -> str:
    if plan.time is None:
        return ""
    return f"; about {duration(float(plan.time.step_s))} a step, {duration(float(plan.time.run_s))} in all"


def record(ahead: Ahead, *, forced: bool = False) -> dict[str, Any] | None:
    """The plan as ``lineage.json`` has it, in MiB and seconds; None without one."""
    plan = ahead.plan
    if plan is None:
        return None
    fullest = plan.memory.fullest
    return {
        "peak_mb": float(plan.memory.peak) / 2**20,
        "available_mb": None if plan.available is None else plan.available / 2**20,
        "fits": plan.fits,
        "forced": forced,
        "phase": fullest.name,
        "parts": _parts(fullest),
        "framework_mb": sum(_mb(part.bytes) for part in fullest.parts if part.kind == "framework"),
        "phases_mb": {phase.name: _mb(phase.bytes) for phase in plan.memory.phases},
        "step_s": None if plan.time is None else float(plan.time.step_s),
        "run_s": None if plan.time is None else float(plan.time.run_s),
        "device": None if plan.time is None else plan.time.device,
        "warnings": list(plan.warnings),
        **{key: plan.facts[key] for key in ("processes", "weights", "samples_from") if key in plan.facts},
        "planned_in_s": ahead.seconds,
        "held_before_mb": ahead.held_mb,
    }


def _parts(phase: Phase) -> Mapping[str, float]:
    """MiB by "policy: weights" and the like."""
    parts: dict[str, float] = {}
    for part in phase.parts:
        name = f"{part.role}: {part.kind}" if part.role else part.kind
        parts[name] = parts.get(name, 0.0) + _mb(part.bytes)
    return {name: held for name, held in parts.items() if held}


def _mb(count: Any) -> float:
    return float(count) / 2**20


def nothing_to_spare(plan: Plan) -> bool:
    """It would not fit if the peak came out higher by MARGIN."""
    return plan.available is not None and bool((1 + MARGIN) * plan.memory.needed > plan.available)
