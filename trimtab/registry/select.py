"""Choosing among runs: a value by its dotted key, conditions, order."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.registry.runs import RunRecord

TELLING = (
    *("gold_reward", "eval_reward", "eval_accuracy", "eval_accuracy_implicit_reward", "eval_loss"),
    *("accuracy", "reward_mean", "loss"),
)
"""Metrics that say most of a run; the first that it has is shown."""

CONDITION = re.compile(r"\s*([\w./:-]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)


def value(run: RunRecord, key: str) -> Any:
    """What a dotted key stands for; None where the run has no such thing.

    Looked for in this order: what every run has (name, folder, status, method, steps, date, seconds,
    processes, model, parent), the metrics of the last evaluation and of the last step, the lineage, the
    configuration.
    """
    own = {
        "name": run.name,
        "folder": str(run.folder),
        "status": run.status,
        "method": run.method,
        "steps": run.steps,
        "date": run.lineage.get("started"),
        "seconds": run.lineage.get("wall_s"),
        "processes": processes(run),
        "parent": run.lineage.get("parent") or None,
        "model": _inside(run.config, "model.path") or run.lineage.get("model"),
        "problem": run.problem or None,
    }
    if key in own:
        return own[key]
    for metrics in (run.scores.get("eval"), run.scores.get("train")):
        if isinstance(metrics, dict) and key in metrics:
            return metrics[key]
    for values in (run.lineage, run.config):
        found = _inside(values, key)
        if found is not None:
            return found
    return None


def processes(run: RunRecord) -> int:
    """How many processes computed it, the last time that it was started."""
    found = run.lineage.get("processes")
    return len(found) if isinstance(found, list) and found else 1


def _inside(values: Any, key: str) -> Any:
    """The value below a dotted key; numbers count in lists. A key that itself holds dots is tried whole."""
    if key == "":
        return values
    if isinstance(values, dict):
        parts = key.split(".")
        for size in range(len(parts), 0, -1):
            head = ".".join(parts[:size])
            if head in values:
                return _inside(values[head], ".".join(parts[size:]))
        return None
    if isinstance(values, list):
        head, _, rest = key.partition(".")
        if head.isdigit() and int(head) < len(values):
            return _inside(values[int(head)], rest)
    return None


def keys(run: RunRecord) -> Iterator[str]:
    """Every key that :func:`value` knows of a run, for hints."""
    yield from ("name", "folder", "status", "method", "steps", "date", "seconds", "processes", "parent")
    yield "model"
    for part in ("eval", "train"):
        metrics = run.scores.get(part)
        if isinstance(metrics, dict):
            yield from metrics
    yield from flat(run.lineage)
    yield from flat(run.config)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data by dotted keys; an empty list or mapping is a value."""
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(values, dict) and values:
        pairs = values.items()
    elif isinstance(values, list) and values:
        pairs = enumerate(values)
    else:
        return {prefix: values} if prefix else {}
    out: dict[str, Any] = {}
    for key, inner in pairs:
        out |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def where(runs: Sequence[RunRecord], conditions: Sequence[str]) -> list[RunRecord]:
    """The runs that meet every condition: ``method=dpo``, ``train.lr<1e-5``, ``status!=finished``.

    Numbers are compared as numbers, all else as text. A run without the key meets only ``!=``. Raises
    InputError for what is no condition, and for a key that no run has.
    """
    kept = list(runs)
    for condition in conditions:
        parts = CONDITION.fullmatch(condition)
        if parts is None:
            raise InputError(f"--where {condition!r}: write KEY=VALUE, or with !=, <, <=, >, >=")
        key, sign, wanted = parts.groups()
        _known(runs, key, "--where")
        kept = [run for run in kept if _meets(value(run, key), sign, wanted)]
    return kept


def _known(runs: Sequence[RunRecord], key: str, option: str) -> None:
    if not runs or any(value(run, key) is not None for run in runs) or key in ("parent", "date", "seconds"):
        return
    near = difflib.get_close_matches(key, sorted({k for run in runs for k in keys(run)}), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{option}: no run here has {key!r}{hint}")


def _meets(found: Any, sign: str, wanted: str) -> bool:
    if found is None:
        return sign == "!="
    ours, theirs = _number(found), _number(wanted)
    if ours is None or theirs is None:
        text = str(found).lower() if isinstance(found, bool) else str(found)
        return _compare(text, sign, wanted)
    return _compare(ours, sign, theirs)


def _compare(a: Any, sign: str, b: Any) -> bool:
    results = {"=": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}
    return bool(results[sign])


def _number(found: Any) -> float | None:
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        return None
    try:
        return float(found)
    except (ValueError, OverflowError):
        return None


def ordered(runs: Sequence[RunRecord], key: str = "-date") -> list[RunRecord]:
    """By a key, ``-key`` the other way round; runs without it come last. Raises InputError as `where`."""
    name = key.removeprefix("-")
    _known(runs, name, "--sort")
    known = [run for run in runs if value(run, name) is not None]
    rest = [run for run in runs if value(run, name) is None]

    def place(run: RunRecord) -> tuple[int, float, str]:
        found = value(run, name)
        number = _number(found)
        if number is None or math.isnan(number):
            return (1, 0.0, str(found))
        return (0, number, "")

    return sorted(known, key=place, reverse=key.startswith("-")) + rest


def telling(run: RunRecord) -> dict[str, float]:
    """The few metrics that say most: one of quality, and how far the policy went."""
    out: dict[str, float] = {}
    for key in TELLING:
        found = value(run, key)
        if isinstance(found, int | float):
            out[key] = found
            break
    kl = value(run, "kl")
    if isinstance(kl, int | float):
        out["kl"] = kl
    return out
