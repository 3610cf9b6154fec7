"""Which runs a run stands on: its parent, and the runs that made its reference, critic and reward models."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trimtab.errors import InputError

FILE = "lineage.json"
DEEPEST = 20
"""Generations that are followed."""


def read_lineage(run: Path) -> dict[str, Any]:
    """A run's lineage. Raises InputError for a file that is missing or damaged."""
    file = run / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{run}: no {FILE}; is it the folder of a run?") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: damaged: it holds no object")
    return values


def finished(run: Path) -> bool:
    """The run has come to its end, so that its ``model/`` is the trained one."""
    try:
        values = read_lineage(run)
    except InputError:
        return False
    # Before there was a status, the lineage was written at the end only.
    return values.get("status", "finished") == "finished"


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of a configuration as read from its file; where the run lives and whence it goes on apart."""
    counted = {key: value for key, value in config.items() if key != "run"}
    run = config.get("run")
    if isinstance(run, dict):
        counted["run"] = {k: v for k, v in run.items() if k not in ("out", "resume", "parent")}
    return _digest(counted)


def run_digest(lineage: dict[str, Any]) -> str:
    """A run's own digest: of its method, configuration, inputs, steps and model; not of when or where."""
    outputs = lineage.get("outputs") or {}
    return _digest(
        {
            "method": lineage.get("method"),
            "config": lineage.get("config_sha256"),
            "inputs": sorted([str(i.get("role")), str(i.get("sha256"))] for i in entries(lineage, "inputs")),
            "steps": lineage.get("steps"),
            "model": (outputs.get("model") or {}).get("sha256") if isinstance(outputs, dict) else None,
        }
    )


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def entries(lineage: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list in a lineage that others may have edited."""
    found = lineage.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def run_of(model: Path) -> Path | None:
    """The run that wrote a model's folder: RUN of RUN/model."""
    folder = model.parent
    return folder if model.name == "model" and (folder / FILE).is_file() else None


def ancestors(inputs: list[dict[str, Any]], parent: str, out: Path) -> list[dict[str, Any]]:
    """The runs behind the models among the inputs, each with its digest and its own ancestors.

    The first is the parent, if there is one: ``parent`` where that is given, else the run of the model.
    """
    found: list[tuple[str, Path]] = [("parent", Path(parent))] if parent else []
    for item in inputs:
        run = run_of(Path(item["path"])) if item["kind"] == "model" else None
        if run is None or run.resolve() == out.resolve():
            continue
        role = "parent" if item["role"] == "model" and not parent else item["role"]
        if not (role == "model" and _same(run, Path(parent))):
            found.append((role, run))
    return [_ancestor(role, run) for role, run in found]


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _ancestor(role: str, run: Path) -> dict[str, Any]:
    made: dict[str, Any] = {"role": role, "path": str(run), "digest": None}
    try:
        lineage = read_lineage(run)
    except InputError as error:
        return made | {"note": str(error)}
    for key in ("digest", "method", "status"):
        made[key] = lineage.get(key)
    return made | {"ancestors": _cut(entries(lineage, "ancestors"), DEEPEST - 1)}


def _cut(found: list[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    if depth <= 0:
        return []
    return [entry | {"ancestors": _cut(entries(entry, "ancestors"), depth - 1)} for entry in found]
