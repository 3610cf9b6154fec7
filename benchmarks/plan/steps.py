"""``python -m benchmarks plan-time``: this machine is calibrated, then step times are planned and measured.

A row's ``measured_s`` is the median of its run's steps after the first two, by the run's own metrics; where
a rollout serves several steps (PPO), their mean, over as many steps as whole rollouts serve. ``planned_s`` is
what the calibrated device gives for the same options. Nothing else should run meanwhile.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.plan.cases import PROMPT, RESPONSE, Setting
from benchmarks.plan.command import FAILED, measure
from benchmarks.plan.planned import planned_job

STEPS, DROPPED = 6, 2
LORA = {"adapter.kind": "lora"}
CASES = (
    *(("sft", Setting(model)) for model in ("llama 60M", "qwen2 82M", "qwen2 144M")),
    *(("dpo", Setting(model)) for model in ("llama 60M", "qwen2 82M", "qwen2 144M")),
    *(("reward", Setting(model)) for model in ("llama 60M", "qwen2 144M")),
    *(("grpo", Setting(model)) for model in ("llama 60M", "qwen2 82M", "qwen2 144M")),
    *(("ppo", Setting(model)) for model in ("llama 60M", "qwen2 82M")),
    ("kto", Setting("qwen2 82M")),
    ("sft", Setting("qwen2 192M, vocabulary 152k")),
    ("sft", Setting("qwen2 82M", {"train.activation_mb": "300"})),
    *((method, Setting("qwen2 82M", LORA)) for method in ("sft", "dpo", "grpo", "ppo")),
)
SETTING = (
    f"{STEPS} optimiser steps in bf16 on all cores, prompts of {PROMPT} tokens and responses of {RESPONSE}. "
    f"measured_s: the median of the steps after the first {DROPPED}, with sampling and scoring, or their "
    "mean where a rollout serves several steps; planned_s: from a calibration made just before on the same "
    "machine. error: planned over measured, less 1."
)


def run(cache: Path) -> dict[str, Any]:
    """Calibrate, run, compare."""
    from trimtab.planning.time import time_of
    from trimtab.studies.calibrate import calibrate

    folder = cache.absolute() / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    device = calibrate(save=False)
    rows: list[dict[str, Any]] = []
    for method, setting in CASES:
        options = {**setting.options, "train.steps": str(STEPS)}
        row: dict[str, Any] = {"case": f"{method}, {setting.name}"}
        found = measure(method, Setting(setting.model, options), folder)
        if FAILED in found:
            rows.append(row | found)
            continue
        job = planned_job(method, setting.model, options, folder)
        seconds = [seconds_of(metrics, job.batch.tokens) for metrics in found["metrics"]][DROPPED:]
        planned = time_of(job, device).step_s
        measured = step_s(seconds, int(job.steps_per_rollout))
        row |= {"measured_s": round(measured, 3), "planned_s": round(float(planned), 3)}
        rows.append(row | {"error": round(float(planned) / measured - 1, 4)})
        print(f"{row['case']}: planned {planned:.2f} s, measured {measured:.2f}", file=sys.stderr)
    errors = [abs(row["error"]) for row in rows if "error" in row]
    summary = {
        "rows": len(rows),
        FAILED: len(rows) - len(errors),
        "median_error": round(statistics.median(errors), 4) if errors else None,
        "worst_error": round(max(errors), 4) if errors else None,
    }
    machine = describe_machine({})
    return {"name": "plan-time", "setting": SETTING, "machine": machine, "rows": rows, "summary": summary}


def step_s(seconds: Sequence[float], steps_per_rollout: int) -> float:
    """Of a typical step; a rollout's seconds are shared out over the steps that it serves.

    Raises ValueError for fewer steps than one rollout serves.
    """
    if steps_per_rollout == 1:
        return statistics.median(seconds)
    whole = len(seconds) // steps_per_rollout * steps_per_rollout
    if not whole:
        raise ValueError(f"{len(seconds)} steps, and a rollout serves {steps_per_rollout}")
    return statistics.fmean(seconds[-whole:])


def seconds_of(metrics: dict[str, Any], tokens: float) -> float:
    """Of one step: as sampling methods log it, or by the ``tokens`` that it learned from."""
    return float(metrics["step_s"] if "step_s" in metrics else tokens / metrics["tokens_per_s"])
