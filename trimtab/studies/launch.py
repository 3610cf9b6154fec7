"""How every command starts a training run: planned first, refused where it cannot fit, then trained.

The plan needs no weights. It is said in the run's log, kept in its ``lineage.json`` and held there against
the peak that was measured. A run for which no plan can be made runs as it would without one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trimtab import methods
from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result
from trimtab.models.load import device_of
from trimtab.planning.advice import Advice, advise, changed, flattened
from trimtab.planning.devices import Device, calibrated, find_device
from trimtab.planning.look import duration, kinds_of, size
from trimtab.planning.plan import plan as plan_of
from trimtab.planning.result import MARGIN, Phase, Plan, within_budget
from trimtab.studies.job import job_of
from trimtab.studies.job_data import forget_sample
from trimtab.training.memory import available_bytes, resident_mb, trim

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
        return self.plan is not None and not self.short and _nothing_to_spare(self.plan)


def train(
    name: str,
    config: MethodConfig,
    *,
    on_eval: OnEval | None = None,
    force: bool = False,
    stage: str = "",
    swept: Collection[str] = (),
) -> Result:
    """Plan the run, then train by the method ``name``; ``force`` trains what does not fit too.

    ``stage``: where its options stand in a study's file (``stages.dpo``); ``swept``: those that a sweep
    varies, which cannot be set there. Raises InputError for a run that cannot fit, before anything is loaded
    or written, and for all that the method refuses.
    """
    module = methods.find(name)
    try:
        ahead = look_ahead(name, config)
        halved = "" if force else _halved_or_refused(name, config, ahead, stage, swept)
    finally:
        forget_sample()
    forced = ahead.short and force
    # What reading the data has to say, the run says itself.
    files = tuple(source.path for source in config.data.sources)
    lines = lines_of(ahead, forced=forced, halved=halved, without=files)
    config.run.planned(record(ahead, forced=forced), tuple(lines))
    try:
        result: Result = module.train(config, on_eval=on_eval)
        return result
    finally:
        config.run.planned(None)


def _halved_or_refused(
    name: str, config: MethodConfig, ahead: Ahead, stage: str, swept: Collection[str]
) -> str:
    """What is done about a run that does not fit, if anything. Raises InputError where nothing can be."""
    plan = ahead.plan
    if plan is None or not ahead.short:
        return ""
    advice: Advice | None
    without = ""
    try:
        advice = advice_for(name, config, plan)
        if _halves(config, advice):
            return "micro-batches will be halved where memory runs out"
        if clash := [option for option in advice.overrides if option in swept]:
            if advice.fits:
                given = flattened(config)
                named = [option for option in clash if option != "train.lr"]  # an adapter's; takes no memory
                without = " and ".join(f"take {given[one]} out of the sweep of {one}" for one in named)
            advice = advice_for(name, config, plan, swept)
    except Exception:  # what is known of the run itself is enough to refuse it
        advice = None
    raise InputError(refusal(name, plan, advice, stage, without=without))


def look_ahead(name: str, config: MethodConfig) -> Ahead:
    """The plan of a run on this machine as it is now. Raises nothing: the run says better what is wrong."""
    began, held_mb = time.perf_counter(), 0.0
    plan, why = None, ""
    try:
        trim()  # what an earlier run of this process has freed is free for this one
        held_mb = resident_mb()
        plan = plan_run(name, config, free_bytes(device_of(config.model)))
    except Exception as error:  # planning must not end a run that works
        told = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        why = " ".join(told.split())[:300]
    return Ahead(plan, why, time.perf_counter() - began, held_mb)


def plan_run(name: str, config: MethodConfig, available: float | None) -> Plan:
    """The plan of a method's run. Raises InputError for what cannot be planned."""
    job, facts, warnings = job_of(name, config)
    plan = plan_of(
        job,
        device=this_device(device_of(config.model), config.train.threads),
        available=available,
        title=f"{name} of {config.model.path}",
        facts=facts,
        warnings=tuple(warnings),
    )
    return within_budget(plan, config.train.time_budget_s, int(job.steps))


def this_device(device: str, threads: int = 0) -> Device | None:
    """The device of a run as the planner knows it: measured (``trimtab plan --calibrate``), or a card's."""
    if not device.startswith("cuda"):
        return calibrated(threads)
    try:
        return find_device(torch.cuda.get_device_name(torch.device(device)))
    except InputError:
        return None


def free_bytes(device: str) -> float | None:
    """What a run may take on a device now; None where nobody tells."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return float(free)
    found = available_bytes()
    return None if found is None else float(found)


def advice_for(name: str, config: MethodConfig, plan: Plan, swept: Collection[str] = ()) -> Advice:
    """What to change so that the run fits: with the plan's error to spare, or else just.

    No option among ``swept`` is changed.
    """
    assert plan.available is not None
    given = flattened(config)
    # No lever changes how long the data may be, but one goes by it.
    given = {key: value for key, value in given.items() if key not in swept or key == "data.max_tokens"}

    def replan(options: dict[str, Any]) -> Plan:
        return plan_run(name, changed(config, options), plan.available) if options else plan

    found = advise(replan, given, plan.available / (1 + MARGIN))
    return found if found.fits else advise(replan, given, plan.available)


def _nothing_to_spare(plan: Plan) -> bool:
    """It would not fit if the peak came out higher by MARGIN."""
    return plan.available is not None and bool((1 + MARGIN) * plan.memory.needed > plan.available)


def _halves(config: MethodConfig, advice: Advice) -> bool:
    """On a GPU an allocation that fails is made good by smaller micro-batches, if they are all that it takes.

    On a CPU none fails: the system ends the process.
    """
    alone = {"train.micro_batch_tokens"}
    return advice.fits and set(advice.overrides) == alone and device_of(config.model).startswith("cuda")


def refusal(name: str, plan: Plan, advice: Advice | None, stage: str = "", *, without: str = "") -> str:
    """One line: what it would take, what there is, and what to change.

    ``without``: which value of a sweep to leave out instead.
    """
    assert plan.available is not None
    line = f"{name}: cannot fit: {_peak(plan)}, and {size(plan.available)} are free{_guessed(plan)}"
    ways = [without] if without else []
    if advice is not None and advice.fits:
        then = size(float(advice.plan.memory.needed))
        spare = ", with nothing to spare" if _nothing_to_spare(advice.plan) else ""
        ways.append(f"add {advice.options(stage)} (then {then}{spare})")
    if ways:
        return f"{line}; {', or '.join(ways)}, or --force to go on all the same"
    told = "" if advice is None else f"; {advice.otherwise}"
    return f"{line}{told}; --force goes on all the same"


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
    lines = [f"plan: {_peak(plan)}{free}{_clock(plan)}"]
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
