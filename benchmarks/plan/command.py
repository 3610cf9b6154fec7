"""``python -m benchmarks plan``: every method in a dozen settings, planned, and measured in fresh processes.

A row's ``measured_mb`` is the largest resident memory of the run above what the process held after its
imports; ``planned_mb`` the plan's peak. Rows that are measured are kept in ``.benchmarks/plan``, and a later
call goes on with what is missing; ``replan`` plans the rows of a result again, which needs no measurement.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, worker_environ
from benchmarks.plan.cases import METHODS, MODELS, PROMPT, RESPONSE, STEPS, Setting, settings_of
from benchmarks.plan.inputs import model_folder

SETTING = (
    f"{STEPS} optimiser steps of each method (in each of spin's two iterations) on random models, prompts of "
    f"{PROMPT} tokens and responses of {RESPONSE}, in bf16 over fp32 masters, micro-batches of up to 4,096 "
    "tokens, with the allocator that the trimtab command sets. ppo and online-dpo with a reward model of the "
    "policy's size in fp32. Each row is a process of its own; measured_mb is its largest resident memory, "
    "less what it held after its imports, in MiB; planned_mb is the plan's peak. error: planned over "
    "measured, less 1."
)
FAILED = "failed"


def names() -> list[str]:
    """Every case: a method and a setting."""
    return [name_of(method, setting) for method in METHODS for setting in settings_of(method)]


def name_of(method: str, setting: Setting) -> str:
    """As ``--case`` takes it."""
    return f"{method}, {setting.name}"


def run(chosen: Sequence[str], cache: Path) -> dict[str, Any]:
    """Measure what of these cases was not measured yet, and plan all of them."""
    folder = cache.absolute() / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "measured.jsonl"
    measured = {row["case"]: row for row in _lines(kept)}
    for method in METHODS:
        for setting in settings_of(method):
            name = name_of(method, setting)
            if name not in chosen or name in measured:
                continue
            began = time.perf_counter()
            row = {"case": name, "method": method, "model": setting.model, "options": setting.options}
            row["cpu"] = describe_machine({})["cpu"]  # rows are kept, and may be of several machines
            row |= {k: v for k, v in measure(method, setting, folder).items() if k != "metrics"}
            measured[name] = row
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = row.get("measured_mb", row.get(FAILED))
            print(f"{name}: {shown} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
    rows = [measured[name] for name in names() if name in chosen]
    result = {"name": "plan", "setting": SETTING, "machine": describe_machine({}), "rows": rows}
    return replanned(result, folder)


def measure(method: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """One run in a process of its own: its peak, or why there is none."""
    model = model_folder(folder, setting.model)
    if not (model / "whole").exists():
        command = [sys.executable, "-m", "benchmarks.plan.inputs", str(folder), setting.model]
        subprocess.run(command, check=True, capture_output=True, env=worker_environ("tuned allocator"))
    work = folder / f"run-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, "-m", "benchmarks.plan.worker", method, str(model), str(work)]
    done = subprocess.run(
        [*command, json.dumps(setting.options)],
        env=worker_environ("tuned allocator"),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found = json.loads((work / "result.json").read_text(encoding="utf-8"))
    except OSError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {FAILED: last[:300]}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {**found, "measured_mb": round(found["measured_mb"]), "baseline_mb": round(found["baseline_mb"])}


def replanned(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result with its rows planned anew; needs the models' folders, and no measurement."""
    from benchmarks.plan.planned import planned

    rows = []
    for row in result["rows"]:
        row = {k: v for k, v in row.items() if k not in ("planned_mb", "error", "phase")}
        if "measured_mb" in row:
            found = planned(row["method"], row["model"], row["options"], folder)
            row |= found | {"error": round(found["planned_mb"] / row["measured_mb"] - 1, 4)}
        rows.append(row)
    return {**result, "rows": rows, "summary": summary(rows)}


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Errors over the rows whose measured peak is 1 GB or more."""
    rows = list(rows)
    counted = [abs(r["error"]) for r in rows if r.get("measured_mb", 0) * 2**20 >= 1e9]
    return {
        "cases": len(names()),
        "rows": len(rows),
        "counted": len(counted),
        FAILED: sum(FAILED in r for r in rows),
        "median_error": round(statistics.median(counted), 4) if counted else None,
        "worst_error": round(max(counted), 4) if counted else None,
    }


def show(result: dict[str, Any]) -> str:
    """What the terminal says."""
    said = result["summary"]
    lines = [
        f"{row['case']}: planned {row['planned_mb']:,} MB, measured {row['measured_mb']:,}, "
        f"{row['error']:+.1%}"
        if "error" in row
        else f"{row['case']}: {row.get(FAILED)}"
        for row in result["rows"]
    ]
    if said["counted"]:
        lines.append(
            f"{said['counted']} rows of 1 GB or more: median error {said['median_error']:.1%}, worst "
            f"{said['worst_error']:.1%}; {said[FAILED]} failed"
        )
    return "\n".join(lines)


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


assert set(MODELS) >= {setting.model for method in METHODS for setting in settings_of(method)}
