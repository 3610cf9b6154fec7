"""``trimtab sweep``: one or more methods over options and seeds, in one process, one run after another.

Each run is measured as soon as it is trained, on the same prompts with the same noise, so an interrupted
sweep keeps what is done and goes on with the rest. A run that fails is noted and does not end the sweep.
"""

from __future__ import annotations

import gc
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.config import toml_value
from trimtab.errors import InputError, Terminated
from trimtab.evaluation.pages.sweep_report import write_sweep_report
from trimtab.evaluation.stats.intervals import mean_interval
from trimtab.registry.ancestry import finished
from trimtab.studies.config import REWARD, study_file
from trimtab.studies.evaluate import Evaluator, ToEvaluate
from trimtab.studies.grid import SweepConfig, Trial, short_names, trials
from trimtab.studies.order import in_order
from trimtab.studies.pipeline import refuse_held, resolved, say_on_stderr, stage_models
from trimtab.studies.publish import samples_of, write_json
from trimtab.studies.records import Order
from trimtab.studies.stages import facts_of, implicit_beta, make_base, run_stage
from trimtab.studies.steps import check_options, check_sources, keep_options, run_steps

FILE = "sweep.toml"
SHARES = frozenset(
    {
        "win_rate",
        "judged_win_rate",
        "accuracy",
        "preference_accuracy",
        "implicit_accuracy",
        "implicit_ece",
        "implicit_brier",
    }
)
"""Figures that lie between 0 and 1, where an interval over seeds is cut."""
FIGURES = (
    "gold_reward",
    "proxy_reward",
    "kl_nats_per_token",
    "response_tokens",
    "implicit_nll",
    "implicit_temperature",
    "wall_s",
    "generated_tokens",
    "peak_rss_mb",
    "planned_peak_mb",
    "measured_peak_mb",
    *sorted(SHARES),
)
"""What is averaged over the seeds of a setting."""


def run_sweep(config: SweepConfig, say: Callable[[str], object] = say_on_stderr) -> dict[str, Any]:
    """Run and measure everything, write ``summary.json`` and ``report.html``; returns the summary.

    Raises InputError for anything that the user can mend, before the first run wherever that can be known;
    and where every run failed.
    """
    out = Path(config.out)
    refuse_held(out, FILE, config.resume, "a sweep")
    order = in_order(config, config.prepare, [], "prepare")
    runs = trials(config, order)
    evaluation = _evaluation(config, order, runs)
    check_sources([*order.steps, *(trial.step for trial in runs)], evaluation.evaluation, out)
    for trial in runs:
        if finished(out / trial.name):
            check_options(trial.step.key, out / trial.name, trial.step.config)
    out.mkdir(parents=True, exist_ok=True)
    first = next((step for step in order.steps if step.kind != "data"), runs[0].step)
    make_base(config, first.fresh)
    (out / FILE).write_text(study_file(config, [trial.name for trial in runs]), encoding="utf-8")
    prepared = run_steps(order, out, config.seed, say, force=config.force)
    evaluator = _evaluator(order, config, evaluation, runs)
    failures: dict[str, str] = {}
    for number, trial in enumerate(runs, start=1):
        say(f"run {number} of {len(runs)}, {trial.name}")
        if why := _run(trial, out, evaluator, config):
            failures[trial.name] = why
            say(f"{trial.name} failed: {why}")
            if config.on_failure == "stop":
                raise InputError(f"{trial.name}: {why}")
        gc.collect()
    if len(failures) == len(runs):
        name, why = next(iter(failures.items()))
        raise InputError(f"every run failed; the first, {name}: {why}")
    summary = _summary(config, order, runs, evaluator, failures)
    summary["prepared"] = {name: {"wall_s": row["wall_s"]} for name, row in prepared.items()}
    for step in order.steps:
        if step.stage.method == REWARD:
            summary["prepared"][step.folder] |= evaluator.reward_model(step.folder)
    write_json(out / "summary.json", summary)
    write_sweep_report(out / "report.html", summary)
    return summary


def _evaluation(config: SweepConfig, order: Order, runs: list[Trial]) -> ToEvaluate:
    """The evaluation with its names resolved; without a reference, what all runs start from."""
    options = config.evaluation
    if not options.reference:
        starts = list(dict.fromkeys(trial.step.start for trial in runs))
        newest = order.policy if order.policy in starts else starts[0]
        options = options.model_copy(update={"reference": newest})
    return resolved(config, options, order)


def _evaluator(order: Order, config: SweepConfig, evaluation: ToEvaluate, runs: list[Trial]) -> Evaluator:
    reference = evaluation.evaluation.reference
    learned = any(step.kind != "data" for step in order.steps)
    models = stage_models(order if learned or config.model else Order([runs[0].step]), config)
    models |= {trial.name: trial.step.config for trial in runs}
    betas = {
        trial.name: beta
        for trial in runs
        if trial.step.reference == reference
        and (beta := implicit_beta(trial.step.stage.method, trial.step.config)) is not None
    }
    return Evaluator(evaluation, models, betas)


def _run(trial: Trial, out: Path, evaluator: Evaluator, config: SweepConfig) -> str:
    """Train and measure one run unless that was done; why it failed, or nothing."""
    folder, step = out / trial.name, trial.step
    note = out / "failed" / f"{trial.name}.txt"
    options = step.config.model_copy(deep=True)  # a run may settle options of its own
    try:
        if not finished(folder):
            evaluator.release()
            run_stage(step.key, step.stage, step.config, {}, force=config.force, swept=tuple(trial.options))
            keep_options(folder, options)
        evaluator.measure(trial.name)
    except InputError as error:
        return str(error).removeprefix(f"{step.key}: ")
    except Terminated:  # the sweep is to end, not this run alone
        raise
    except Exception as error:  # whatever a run died of, the others are worth having
        note.parent.mkdir(exist_ok=True)
        note.write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (see {note})"
    note.unlink(missing_ok=True)
    if config.keep == "models":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return ""


def _summary(
    config: SweepConfig, order: Order, runs: list[Trial], evaluator: Evaluator, failures: dict[str, str]
) -> dict[str, Any]:
    out, options = Path(config.out), evaluator.options
    done = [trial for trial in runs if trial.name not in failures]
    rows: dict[str, dict[str, Any]] = {options.reference: {}}
    rows |= {trial.name: facts_of(trial.step.stage, out / trial.name) for trial in done}
    evaluated = evaluator.policies(rows)
    shown = {name: evaluated[name] for name in [options.reference, *_one_each(done)] if name in evaluated}
    write_json(out / "samples.json", samples_of(shown, options.shown))
    described = {
        trial.name: {
            "block": trial.block,
            "method": trial.step.stage.method,
            "options": trial.options,
            "seed": trial.seed,
            "folder": str(out / trial.name),
            **({"failed": failures[trial.name]} if trial.name in failures else rows[trial.name]),
        }
        for trial in runs
    }
    return {
        "title": config.title,
        "seed": config.seed,
        "reference": options.reference,
        "reference_row": rows[options.reference],
        "sample_size": len(evaluated[options.reference].scores) if evaluated else 0,
        "score_name": options.score_name,
        **({"budget": config.budget} if config.budget else {}),
        "points": points(runs, described),
        "runs": described,
    }


def _one_each(done: list[Trial]) -> list[str]:
    """One run of each setting, for the samples."""
    first: dict[str, str] = {}
    for trial in done:
        first.setdefault(_setting(trial), trial.name)
    return list(first.values())


def _setting(trial: Trial) -> str:
    told = [f"{name}={_value(value)}" for name, value in short_names(trial.options).items()]
    return " ".join([trial.block, *told])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else toml_value(value)


def points(runs: list[Trial], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a setting: its figures over seeds, and whether it lies on the frontier.

    Of two or more runs a figure is their mean with Student's 95 % interval over runs; of one run it has that
    run's own interval, over prompts. ``over`` says which.
    """
    found: dict[str, dict[str, Any]] = {}
    for trial in runs:
        name = _setting(trial)
        entry = found.setdefault(
            name,
            {
                "setting": name,
                "block": trial.block,
                "method": trial.step.stage.method,
                "options": trial.options,
                "runs": [],
                "failed": 0,
                "reward_seen": trial.step.stage.reward_seen,
                "sees_judge": trial.step.stage.sees_judge,
            },
        )
        if "failed" in rows[trial.name]:
            entry["failed"] += 1
        else:
            entry["runs"].append(trial.name)
    for entry in found.values():
        entry |= _averaged([rows[name] for name in entry["runs"]])
    _mark_frontier(list(found.values()))
    return list(found.values())


def _averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {"over": "runs" if len(rows) > 1 else "prompts"}
    for name in FIGURES:
        values = [row[name] for row in rows if isinstance(row.get(name), int | float)]
        if not values or len(values) < len(rows):
            continue
        if len(values) == 1:
            made[name] = values[0]
            if rows[0].get(f"{name}_ci95"):
                made[f"{name}_ci95"] = rows[0][f"{name}_ci95"]
            continue
        mean, low, high = mean_interval([float(value) for value in values])
        if name in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        made[name] = mean
        made[f"{name}_ci95"] = [low, high]
    return made


def _mark_frontier(entries: list[dict[str, Any]]) -> None:
    """On the frontier is what no other beats: no more KL, no less reward, and one of them better."""
    keys = ("kl_nats_per_token", "gold_reward")
    placed = [entry for entry in entries if all(entry.get(key) is not None for key in keys)]
    for ours in placed:
        kl, reward = (ours[key] for key in keys)
        ours["frontier"] = not any(
            theirs["kl_nats_per_token"] <= kl
            and theirs["gold_reward"] >= reward
            and (theirs["kl_nats_per_token"], theirs["gold_reward"]) != (kl, reward)
            for theirs in placed
        )
