"""How every command starts a training run: planned first, refused where it cannot fit, then trained.

The plan needs no weights. It is said in the run's log, kept in its ``lineage.json`` and held there against
the peak that was measured. A run for which no plan can be made runs as it would without one.

Of several processes each plans, since what planning reads of the data serves its run; the first one decides
for all, going by the process that has the least memory free.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from trimtab import methods
from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result
from trimtab.models.load import device_of
from trimtab.parallel.same import same_run
from trimtab.parallel.world import world
from trimtab.planning.advice import Advice, advise, changed, flattened
from trimtab.planning.devices import Device, calibrated, find_device
from trimtab.planning.plan import plan as plan_of
from trimtab.planning.result import MARGIN, Plan, within_budget
from trimtab.studies.job import job_of
from trimtab.studies.job_data import forget_sample
from trimtab.studies.job_processes import on_processes
from trimtab.studies.launch_words import Ahead, lines_of, record, refusal
from trimtab.training.memory import available_bytes, resident_mb, trim


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
    or written (in all of its processes alike), and for all that the method refuses.
    """
    module = methods.find(name)
    # Before anything is told between processes that an option decides on.
    same_run(name, config, device_of(config.model), {"--force": force})
    try:
        ahead = look_ahead(name, config)
        refused, halved = ("", "") if force else _decided(name, config, ahead, stage, swept)
        if refused:
            raise InputError(refused)
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


def _decided(
    name: str, config: MethodConfig, ahead: Ahead, stage: str, swept: Collection[str]
) -> tuple[str, str]:
    """Why the run is refused, or what is done about one that does not fit; the same in all processes."""
    refused, halved = world().found_first(lambda: _refused_or_halved(name, config, ahead, stage, swept))
    return refused, halved


def _refused_or_halved(
    name: str, config: MethodConfig, ahead: Ahead, stage: str, swept: Collection[str]
) -> tuple[str, str]:
    plan = ahead.plan
    if plan is None or not ahead.short:
        return "", ""
    advice: Advice | None
    without = ""
    try:
        advice = advice_for(name, config, plan)
        if _halves(config, advice):
            return "", "micro-batches will be halved where memory runs out"
        if clash := [option for option in advice.overrides if option in swept]:
            if advice.fits:
                given = flattened(config)
                named = [option for option in clash if option != "train.lr"]  # an adapter's; takes no memory
                without = " and ".join(f"take {given[one]} out of the sweep of {one}" for one in named)
            advice = advice_for(name, config, plan, swept)
    except Exception:  # what is known of the run itself is enough to refuse it
        advice = None
    return refusal(name, plan, advice, stage, without=without), ""


def look_ahead(name: str, config: MethodConfig) -> Ahead:
    """The plan of a run on this machine as it is now. Raises nothing: the run says better what is wrong."""
    began, held_mb = time.perf_counter(), 0.0
    plan, why, free = None, "", None
    try:
        trim()  # what an earlier run of this process has freed is free for this one
        held_mb = resident_mb()
        free = free_bytes(device_of(config.model))
    except Exception as error:  # planning must not end a run that works
        why = _told(error)
    # Outside of what may fail in one process alone: all take part.
    known = [found for found in world().gather(free) if found is not None]
    if not why:
        try:
            plan = plan_run(name, config, min(known, default=None))
        except Exception as error:
            why = _told(error)
    return Ahead(plan, why, time.perf_counter() - began, held_mb)


def _told(error: Exception) -> str:
    told = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:300]


def plan_run(name: str, config: MethodConfig, available: float | None) -> Plan:
    """The plan of a method's run. Raises InputError for what cannot be planned."""
    job, facts, warnings = job_of(name, config)
    on, here = device_of(config.model), world()
    job, more = on_processes(job, config, here.size, available)
    facts |= more
    plan = plan_of(
        job,
        device=this_device(on, config.train.threads),
        available=available,
        title=f"{name} of {config.model.path}",
        facts=facts,
        warnings=tuple(warnings),
    )
    return within_budget(plan, config.train.time_budget_s, int(job.steps))


def this_device(device: str, threads: int = 0) -> Device | None:
    """The device of a run as the planner knows it: measured (``trimtab plan --calibrate``), or a card's."""
    here = world()
    if not device.startswith("cuda"):
        found = calibrated(threads)
        # Processes of one machine: what they send does not leave it.
        return found if found is None or here.alone else replace(found, node_devices=here.local_size)
    try:
        return find_device(torch.cuda.get_device_name(torch.device(device)))
    except InputError:
        return None


def free_bytes(device: str) -> float | None:
    """What one process of a run may take on a device now; None where nobody tells.

    Processes of one machine share its main memory.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return float(free)
    found = available_bytes()
    return None if found is None else float(found) / world().local_size


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


def _halves(config: MethodConfig, advice: Advice) -> bool:
    """On a GPU an allocation that fails is made good by smaller micro-batches, if they are all that it takes.

    On a CPU none fails: the system ends the process.
    """
    alone = {"train.micro_batch_tokens"}
    return advice.fits and set(advice.overrides) == alone and device_of(config.model).startswith("cuda")
