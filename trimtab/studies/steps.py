"""Running the steps of a pipeline: training, sampling and labelling, and replay; each once."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trimtab.data.readers import check_there, read_rows
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.evaluation.judging.label import run_label
from trimtab.evaluation.watching.during import heldout_evaluation
from trimtab.groups import stable_hash
from trimtab.registry.ancestry import config_digest, finished
from trimtab.registry.files import write_atomic
from trimtab.studies.config import EvaluationConfig, stand_in
from trimtab.studies.records import ROWS, Order, Step
from trimtab.studies.stages import run_stage

STEP_FILE = "step.json"
"""In each step's folder: the options that it was run with, and what a sample stage did."""
REPLAYED = "data"
"""Folder of the study for rows that are mixed in again."""

KEY_METRICS = ("accuracy", "reward_margin", "reward_mean", "kl", "loss")
"""What the table shows of a step, the first three of these that it logged."""
LAST = 0.1
"""The share of a run's steps, its last ones, that a key metric is the mean of."""


def options_digest(config: Any, out: Path) -> str:
    """SHA-256 of a step's options, wherever its study ``out`` has been moved to.

    Of those that differ from their defaults, so that an option which a later version adds changes nothing.
    """
    stated = config.model_dump(mode="json", exclude_defaults=True)
    return config_digest(stand_in(stated, {str(out): "{out}"}))


def done(step: Step, out: Path) -> bool:
    """Whether the step has come to its end."""
    folder = out / step.folder
    return (folder / ROWS).exists() and _kept(folder) != {} if step.kind == "data" else finished(folder)


def check_options(key: str, folder: Path, config: Any, replay: float = 0.0) -> None:
    """Raises InputError where a finished run had other options, or another share of replay, than now."""
    kept = _kept(folder)
    digest = kept.get("stated_sha256")
    if digest is None:
        return
    if digest != options_digest(config, folder.parent) or kept.get("replay", 0.0) != replay:
        raise InputError(
            f"{key}: {folder} was run with other options; give another out, or move that folder away to run "
            "it again"
        )


def keep_options(folder: Path, config: Any, more: dict[str, Any] | None = None) -> None:
    """Note beside a finished run what it was run with."""
    values = {"stated_sha256": options_digest(config, folder.parent), **(more or {})}
    write_atomic(folder / STEP_FILE, json.dumps(values, indent=2) + "\n")


def check_sources(steps: Iterable[Step], options: EvaluationConfig | None, out: Path) -> None:
    """Raises InputError for data that is not there, hours before a later stage or the evaluation reads it."""
    named: list[tuple[str, SourceConfig]] = []
    for step in steps:
        if not done(step, out):
            if step.kind == "data":
                named += [(f"{step.key}.sources", source) for source in step.config.sources]
                continue
            named += [(f"{step.key}.data.sources", source) for source in step.fresh]
            named += [(f"{step.key}.data.heldout", source) for source in step.config.data.heldout]
    if options is not None:
        named += [("evaluation.prompts", source) for source in options.prompts]
        named += [("evaluation.pairs", source) for source in options.pairs]
    for key, source in named:
        if Path(source.path).is_relative_to(out):  # a stage makes it
            continue
        try:
            check_there(source.path)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None


def run_steps(
    order: Order,
    out: Path,
    seed: int,
    say: Callable[[str], object],
    *,
    evaluate: bool = True,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run every step that has not been; what each took, by folder. ``evaluate``: on its own held-out data.

    ``force``: also a step whose plan does not fit.
    """
    for step in order.steps:
        if done(step, out):
            check_options(step.key, out / step.folder, step.config, step.stage.replay)
    rows = {}
    for number, step in enumerate(order.steps, start=1):
        began = "done before" if done(step, out) else f"{step.stage.method} from {step.start}"
        say(f"stage {number} of {len(order.steps)}, {step.folder}: {began}")
        rows[step.folder] = (
            _samples(step, out, say) if step.kind == "data" else _trained(step, out, seed, evaluate, force)
        )
        gc.collect()
    return rows


def _trained(step: Step, out: Path, seed: int, evaluate: bool, force: bool) -> dict[str, Any]:
    folder, config = out / step.folder, step.config
    ran = finished(folder)
    if not ran and step.stage.replay and step.history:
        config = config.model_copy(deep=True)
        config.data.sources = [*step.fresh, *_replayed(step, out, seed)]
    on_eval = heldout_evaluation if evaluate else None
    before = step.config.model_copy(deep=True)  # a run may settle options of its own
    facts = run_stage(step.key, step.stage, config, {}, on_eval=on_eval, force=force)
    if not ran or not (folder / STEP_FILE).exists():
        keep_options(folder, before, {"replay": step.stage.replay} if step.stage.replay else None)
    return facts | {"metrics": key_metrics(folder)}


def key_metrics(folder: Path) -> dict[str, float]:
    """The mean of each of a run's key metrics over its last steps."""
    found: dict[str, list[float]] = {}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        for name, value in json.loads(line).items():
            if name in KEY_METRICS and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    means = {}
    for name in [name for name in KEY_METRICS if name in found][:3]:
        last = found[name][-max(1, math.ceil(LAST * len(found[name]))) :]
        means[name] = sum(last) / len(last)
    return means


def _samples(step: Step, out: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Answer the prompts, have them judged; rows are there whole or not at all."""
    folder = out / step.folder
    if not done(step, out):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROWS).unlink(missing_ok=True)  # of a run that ended before it was noted
        began = time.perf_counter()
        try:
            report = run_label(step.config, say=say)
        except InputError as error:
            raise InputError(f"{step.key}: {error}") from None
        facts = {
            "wall_s": time.perf_counter() - began,
            "generated_tokens": report.generated_tokens,
            "rows": report.rows,
            "judged": report.judged,
            "written": report.written,
            "repeated": report.repeated,
            "calls": report.costs.calls,
            "cost": report.costs.cost,
            "start": step.start,
        }
        keep_options(folder, step.config, {"facts": facts})
        say(str(report))
    kept: dict[str, Any] = _kept(folder)["facts"]
    return kept | {"metrics": {"rows": float(kept["written"])}}


def _kept(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _replayed(step: Step, out: Path, seed: int) -> list[SourceConfig]:
    """Sources of old rows: the stated share, at least one row, of all that earlier versions learned from.

    Which ones depends on (seed, step, row) alone. Each source keeps its rows together, in a file of its own,
    and is drawn from in proportion to them: a row of old data counts as much as a new one.
    """
    old = [(k, key, row) for k, source in enumerate(step.history) for key, row in _rows(source)]
    count = max(1, round(step.stage.replay * len(old)))
    old.sort(key=lambda entry: stable_hash(seed, "replay", step.folder, entry[0], entry[1]))
    chosen: dict[int, list[dict[str, Any]]] = {}
    for k, _, row in old[:count]:
        chosen.setdefault(k, []).append(row)
    weight = sum(source.weight for source in step.fresh)
    fresh = sum(len(_rows(source)) for source in step.fresh)
    (out / REPLAYED).mkdir(parents=True, exist_ok=True)
    made = []
    for k, rows in sorted(chosen.items()):
        name = f"{step.folder}-replay-{k + 1}"
        file = out / REPLAYED / f"{name}.jsonl"
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        made.append(SourceConfig(path=str(file), name=name, weight=weight * len(rows) / fresh))
    return made


def _rows(source: SourceConfig) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a source that can be read, under our column names, each with its id."""
    ids = {group.id for group in source.read()[0]}
    found = read_rows(source.path, name=source.name, split=source.split, columns=source.columns)
    return [(key, row) for key, row in found if key in ids]
