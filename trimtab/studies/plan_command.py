"""What ``trimtab plan`` does: plans of a file or of a model, and what is printed and written."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab import methods
from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.planning.look import printable
from trimtab.planning.result import MARGIN, Plan, within_budget
from trimtab.studies.plan_place import Place, PlanSettings, measure_here, place_of, place_of_run

if TYPE_CHECKING:
    from trimtab.methods.shared.setup import MethodConfig
    from trimtab.planning.advice import Advice
    from trimtab.planning.job import Job
    from trimtab.planning.quick_config import QuickConfig


def method_names(text: str) -> list[str]:
    """``all``, or names with commas between them. Raises InputError with the nearest names."""
    known = methods.names()
    if text.strip().lower() == "all":
        from trimtab.planning.methods import CARDS as METHODS

        return list(METHODS)
    # As planning.methods.find_card takes them: DPO, Dr_GRPO.
    names = list(dict.fromkeys(name.strip().replace("_", "-").lower() for name in text.split(",")))
    if "" in names:
        raise InputError(
            f"trimtab plan: {text!r} has an empty name between commas: methods are as in dpo,kto"
        )
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}, and all"
            raise InputError(f"trimtab plan: {name!r} is no method; {hint}")
    return names


def plan_nothing(settings: PlanSettings) -> int:
    """``trimtab plan --calibrate``: this machine is measured and the measurement kept."""
    if not settings.calibrate:
        raise InputError("trimtab plan: give a method (or all), then CONFIG.toml or --model; see --help")
    for name, value in dataclasses.asdict(settings).items():
        if name not in ("calibrate", "advise") and value is not None:
            raise InputError(f"trimtab plan: --{name} has no effect on --calibrate alone: give a method")
    device = measure_here()
    speeds = f"{device.float32 * 1000:,.0f} GFLOP/s in float32"
    if device.bfloat16 is not None:
        speeds += f", {device.bfloat16 * 1000:,.0f} in bfloat16"
    print(f"{device.name}: {speeds}, {device.bandwidth:,.1f} GB/s; kept for every plan of this machine")
    return 0


def plan_file(name: str, file: str, overrides: dict[str, Any], settings: PlanSettings) -> int:
    """The plan of the run that ``trimtab NAME FILE`` would start; 1 where it does not fit."""
    from trimtab.planning.advice import changed, configuration, flattened
    from trimtab.studies.job import job_of
    from trimtab.studies.job_processes import on_processes

    config: MethodConfig = load_config(methods.find(name).Config, file, overrides)
    place = place_of_run(settings, config)
    there: dict[str, Any] = {}
    if settings.device is not None:  # not what this machine has: "auto" must not look
        there = {"model.device": "cuda" if place.device.engine == "gpu" else "cpu"}

    def planned(options: Mapping[str, Any]) -> Plan:
        job, facts, warnings = job_of(name, changed(config, {**options, **there}))
        count = place.devices or 1
        if count > config.train.batch_groups:
            raise InputError(
                f"--devices must be {config.train.batch_groups} or fewer, train.batch_groups: each computes "
                "groups of its own"
            )
        job, more = on_processes(job, changed(config, options), count, place.available)
        plan = _plan(job, place, f"{name} of {file}", {**facts, **more}, warnings)
        return within_budget(plan, config.train.time_budget_s, int(job.steps))

    plan = planned({})
    advice = _advice(planned, flattened(config), plan, settings)
    _say(plan, advice, settings)
    if settings.write is not None:
        if advice is None:
            print(f"{settings.write} was not written: nothing is to be changed", file=sys.stderr)
        else:
            _write(settings.write, configuration(config, advice.overrides))
    return 1 if plan.fits is False else 0


def plan_models(names: list[str], options: dict[str, Any], settings: PlanSettings) -> int:
    """Plans from options alone: one method in full, or several, a row each; 1 where none fits."""
    if settings.write is not None:
        raise InputError("trimtab plan: --write needs a CONFIG.toml that it can change")
    place = place_of(settings)
    if len(names) == 1:
        return _one_model(names[0], options, place, settings)
    plans: dict[str, Plan] = {}
    failed: dict[str, InputError] = {}
    for name in names:
        try:
            plans[name] = _quick_plan(name, _heeded(name, options, names), place)
        except InputError as error:
            failed[name] = error
    if not plans:
        raise next(iter(failed.values()))
    _say_several(plans, {name: str(error) for name, error in failed.items()}, place, options, settings)
    return 1 if all(plan.fits is False for plan in plans.values()) else 0


def _heeded(name: str, options: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Without what only others of the methods take notice of; what none does is left in, and refused."""
    from trimtab.planning.quick_config import idle_in

    idle = {key for key in options if idle_in(name, key) and not all(idle_in(one, key) for one in names)}
    return {key: value for key, value in options.items() if key not in idle}


def _one_model(name: str, options: dict[str, Any], place: Place, settings: PlanSettings) -> int:
    from trimtab.planning.advice import flattened

    config = _quick_config(name, options, place)

    def planned(more: Mapping[str, Any]) -> Plan:
        return _quick_plan(name, {**options, **more}, place)

    plan = planned({})
    advice = _advice(planned, flattened(config), plan, settings)
    _say(plan, advice, settings)
    return 1 if plan.fits is False else 0


def _quick_config(name: str, options: Mapping[str, Any], place: Place) -> QuickConfig:
    """The options of a plan without a file, with the device's engine and number. Raises InputError."""
    from trimtab.planning.quick_config import QuickConfig

    given = {**options, "method": name}
    if place.devices is not None:
        given.setdefault("devices", place.devices)
    given.setdefault("engine", place.device.engine)
    return load_config(QuickConfig, None, given)


def _quick_plan(name: str, options: Mapping[str, Any], place: Place) -> Plan:
    from trimtab.planning.quick import quick_facts, quick_job

    config = _quick_config(name, options, place)
    job = quick_job(config, available=place.available)
    return _plan(job, place, f"{name} of {job.model.name}", quick_facts(config, job), ())


def _plan(job: Job, place: Place, title: str, facts: dict[str, Any], warnings: Any) -> Plan:
    """The planner, with what the place adds."""
    from trimtab.planning.plan import plan

    return plan(
        job,
        device=place.device,
        available=place.available,
        price_per_hour=place.price,
        title=title,
        facts=facts,
        warnings=(*place.warnings, *warnings),
    )


def _advice(planned: Any, given: dict[str, Any], plan: Plan, settings: PlanSettings) -> Advice | None:
    """What to change where it does not fit: so that it does with the plan's error to spare, or else just."""
    if plan.fits is not False or not settings.advise or plan.available is None:
        return None
    from trimtab.planning.advice import advise

    found = advise(planned, given, plan.available / (1 + MARGIN))
    return found if found.fits else advise(planned, given, plan.available)


def _say(plan: Plan, advice: Advice | None, settings: PlanSettings) -> None:
    """On the terminal, or as files."""
    from trimtab.planning.showing.show import facts_of, show_advice, show_plan, verdict
    from trimtab.planning.showing.svg import draw

    if settings.json is not None:
        _write_json(settings.json, {**plan.to_dict(), "advice": None if advice is None else advice.to_dict()})
    if settings.svg is not None:
        rows = [(phase.name, phase) for phase in plan.memory.phases]
        notes = ["; ".join(facts_of(plan.facts)), verdict(plan)]
        _write(settings.svg, draw(plan.title, notes, rows, plan.available))
    if settings.json == "-":
        return
    console = _console()
    show_plan(plan, console)
    if advice is not None:
        show_advice(advice, console)


def _say_several(
    plans: Mapping[str, Plan],
    failed: Mapping[str, str],
    place: Place,
    options: Mapping[str, Any],
    settings: PlanSettings,
) -> None:
    from trimtab.planning.showing.show import common_facts, show_plans
    from trimtab.planning.showing.svg import draw

    title = f"{len(plans)} methods with {options.get('model')}"
    if settings.json is not None:
        document = {
            "format": 1,
            "title": title,
            "options": dict(options),
            "plans": {name: plan.to_dict() for name, plan in plans.items()},
            "failed": dict(failed),
        }
        _write_json(settings.json, document)
    if settings.svg is not None:
        rows = [(f"{name}: {plan.memory.fullest.name}", plan.memory.fullest) for name, plan in plans.items()]
        _write(
            settings.svg,
            draw(title, ["; ".join(common_facts(plans)), "each at its fullest phase"], rows, place.available),
        )
    if settings.json != "-":
        show_plans(title, plans, failed, _console())


def _console() -> Any:
    """Of the terminal, or 80 columns wide where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=Console().width, no_color=True)


def _write_json(file: str, values: dict[str, Any]) -> None:
    from trimtab.registry.scores import finite

    text = json.dumps(finite(values), indent=2, allow_nan=False, default=str)
    if file == "-":
        print(text)
    else:
        _write(file, f"{text}\n")


def _write(file: str, text: str) -> None:
    from trimtab.registry.files import write_atomic

    try:
        write_atomic(Path(file), text)
    except OSError as error:
        raise InputError(f"{printable(file)}: cannot be written: {error.strerror}") from None
    except ValueError:  # "" or "/"
        raise InputError(f"{printable(file)!r} names no file that could be written") from None
