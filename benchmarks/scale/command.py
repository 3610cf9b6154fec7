"""``python -m benchmarks scale``: the same runs in one process and in two, in turn, each in fresh processes.

Every run that is measured is kept in ``.benchmarks/scale``, and a later call goes on with what is missing;
with that folder removed it begins anew.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.cases import PROMPT, RESPONSE
from benchmarks.plan.inputs import model_folder
from benchmarks.plan.worker import overrides
from benchmarks.scale.cases import CASES, MODEL, RUNS, STEPS, TOKENS, WAYS, Case, Way
from benchmarks.scale.measure import FAILED, measure, with_model

SETTING = (
    f"{STEPS} optimiser steps of each method on {MODEL} with random weights, prompts of {PROMPT} tokens and "
    f"responses of {RESPONSE}, {TOKENS:,} tokens a step in micro-batches of up to 4,096, in bf16 over fp32 "
    "masters, gloo between processes of one machine, with the allocator that the trimtab command sets. Each "
    "row is a case in one way, every run of it in fresh processes, the ways in turn. step_s: the median over "
    "runs of the median step after the first, with sampling and scoring; tokens_per_s: tokens of a step over "
    "that; speedup: over 1 process with 1 thread; messages_s: a process's seconds in messages to the other "
    "in a step, waiting for it (waiting_s) included; peak_mb: the largest resident memory of each process in "
    "the middle run, less what it held after its imports, in MiB; planned_mb: the plan's peak of each "
    "process. others: cores that other programs kept busy meanwhile, the most in any of the runs."
)
NOISY = 0.1
"""Cores that others kept busy, above which a row's seconds are said to be noisy."""
MIB = 2**20


def names() -> list[str]:
    """Every case."""
    return [case.name for case in CASES]


def run(chosen: Sequence[str], cache: Path, runs: int | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Measure what of these cases was not measured yet, ``runs`` times, and plan all of them."""
    runs = runs or RUNS
    folder = cache.absolute() / "plan"  # the models are those of the benchmark of plans
    kept = cache.absolute() / "scale" / "measured.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    done = {_key(entry): entry for entry in _lines(kept) if FAILED not in entry}
    cases = [case for case in CASES if case.name in chosen]
    for number in range(runs):
        for case in cases:
            for way in WAYS:
                entry = {"case": case.name, "way": way.name, "run": number, "steps": steps}
                if _key(entry) in done:
                    continue
                began = time.perf_counter()
                entry |= measure(case, way, folder, steps)
                done[_key(entry)] = entry
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                _say(entry, time.perf_counter() - began)
    found = [entry for entry in done.values() if entry["steps"] == steps and entry["run"] < runs]
    rows = rows_of(cases, found, {case.name: planned(case, folder, steps) for case in cases})
    return {"name": "scale", "setting": SETTING, "machine": describe_machine(_packages()), "rows": rows}


def planned(case: Case, folder: Path, steps: int = STEPS) -> dict[str, int]:
    """By way: the plan's peak of each process, in MiB."""
    from trimtab import methods
    from trimtab.config import load_config
    from trimtab.planning.plan import plan
    from trimtab.studies.job import job_of
    from trimtab.studies.job_processes import on_processes

    with_model(folder)
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as work:
            options = case.options(way, steps)
            given = overrides(case.method, model_folder(folder, MODEL), Path(work), options)
            config: Any = load_config(methods.find(case.method).Config, None, given)
            job, _ = on_processes(job_of(case.method, config)[0], config, way.processes, available=None)
        found[way.name] = round(float(plan(job).memory.peak) / MIB)
    return found


def rows_of(
    cases: Sequence[Case], entries: Sequence[dict[str, Any]], plans: dict[str, dict[str, int]]
) -> list[dict[str, Any]]:
    """One row a case and way; without figures where one of its runs failed."""
    rows = []
    for case in cases:
        alone: float | None = None
        for way in WAYS:
            own = [e for e in entries if (e["case"], e["way"]) == (case.name, way.name)]
            row = _row(case, way, own, plans[case.name][way.name])
            if way is WAYS[0]:
                alone = row.get("step_s")
            if alone is not None and "step_s" in row:
                row["speedup"] = round(alone / row["step_s"], 3)
            rows.append(row)
    return rows


def _row(case: Case, way: Way, entries: Sequence[dict[str, Any]], plan: int) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "way": way.name, "processes": way.processes}
    if failed := [entry[FAILED] for entry in entries if FAILED in entry]:
        return row | {"runs": len(entries), FAILED: failed[0]}
    steps = sorted(entry["step_s"] for entry in entries)
    middle = sorted(entries, key=lambda entry: max(entry["peak_mb"]))[len(entries) // 2]
    step = statistics.median(steps)
    others = [entry["others"] for entry in entries if entry["others"] is not None]
    peak = max(middle["peak_mb"])
    row |= {
        "runs": len(entries),
        "step_s": round(step, 3),
        "step_s_of_runs": [round(seconds, 3) for seconds in steps],
        "tokens_per_s": round(TOKENS / step, 1),
        "messages": middle["messages"],
        "messages_s": round(statistics.median(entry["messages_s"] for entry in entries), 3),
        "waiting_s": round(statistics.median(entry["waiting_s"] for entry in entries), 3),
        "peak_mb": middle["peak_mb"],
        "planned_mb": plan,
        "error": round(plan / peak - 1, 4),
        "load": max(entry["load"] for entry in entries),
        "others": max(others) if others else None,
    }
    return row | ({"noisy": True} if others and max(others) > NOISY else {})


def show(result: dict[str, Any]) -> str:
    """What the terminal says."""
    lines = []
    for row in result["rows"]:
        if FAILED in row:
            lines.append(f"{row['case']}, {row['way']}: failed: {row[FAILED]}")
            continue
        peaks = " and ".join(f"{peak:,}" for peak in row["peak_mb"])
        lines.append(
            f"{row['case']}, {row['way']}: {row['step_s']:.2f} s a step, "
            f"{row['tokens_per_s']:,.0f} tokens/s, messages {row['messages_s']:.2f} s, "
            f"{peaks} MB ({row['planned_mb']:,} planned)" + (", noisy" if row.get("noisy") else "")
        )
    return "\n".join(lines)


def _say(entry: dict[str, Any], seconds: float) -> None:
    said = f"failed: {entry[FAILED]}" if FAILED in entry else f"{entry['step_s']:.2f} s a step"
    print(f"{entry['case']}, {entry['way']}: {said} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _packages() -> dict[str, dict[str, str]]:
    from importlib.metadata import version

    return {"ours": {name: version(name) for name in ("torch", "transformers")}}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("case", "way", "run", "steps"))


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
