"""Runs the cases: our side here, the peers' in their environments, and tables what came out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environments import peer_python
from benchmarks.machine import describe_machine, worker_environ
from benchmarks.parity import compare, ours, world
from benchmarks.parity.case import Case
from benchmarks.parity.cases import CASES
from benchmarks.protocol import versions
from trimtab.errors import InputError

SETTING = (
    f"{world.STEPS} optimiser steps of each side from the same weights on the same batches in the same "
    f"order, in fp32: a Llama of two layers of width {world.WIDTH} after {world.SFT_STEPS} steps of SFT in "
    "the newsroom, AdamW (β 0.9 and 0.999, ε 1e-8, no decay) at a constant rate, gradient norm clipped at 1 "
    f"(PPO: not). {world.BATCH} rows a step, {world.ROWS} in all; sampling methods {world.PROMPTS} prompts × "
    f"{world.RESPONSES} fixed responses a step with rewards from a file, {CASES[-1].epochs} steps on each "
    "rollout unless the case says otherwise. *_difference: the largest over the steps of |ours − peer| "
    "relative to the peer's value; a loss that changes its sign or comes close to 0, as a policy gradient's "
    "does, is measured by its root mean square where that is more. loss_moved: the mean over the last pass "
    "against that over the first; of sampling methods, whose loss starts at 0, the loss's range over its "
    "largest absolute value. kl_nats_per_token: how far the last step's policy is from where it began."
)


def run(names: Sequence[str], cache: Path) -> dict[str, Any]:
    """The result of these cases. Raises InputError where an environment cannot be made.

    Where a case does not come out as it should, runs, tasks and logs stay in ``cache/runs/parity-…``.
    """
    chosen = [case for case in CASES if case.name in names]
    files = world.build(world.place(cache.absolute()))
    folder = cache.absolute() / "runs" / f"parity-{os.getpid()}"
    outcomes: dict[str, ours.Outcome] = {}
    rows: dict[str, dict[str, Any]] = {}
    facts: dict[str, dict[str, Any]] = {
        "ours": {"threads": torch.get_num_threads(), **versions("torch", "transformers")}
    }
    tasks: dict[tuple[str, str], list[Path]] = {}
    for case in chosen:
        began = time.perf_counter()
        here = _folder(folder, case)
        try:
            outcomes[case.name] = outcome = ours.run(case, files, here / "ours")
        except InputError as error:
            rows[case.name] = {"case": case.name, **case.in_words(), "verdict": f"not run: {error}"}
            continue
        tasks.setdefault((case.environment, case.module), []).append(_write_task(case, outcome, files, here))
        print(f"{case.name}: ours {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for (environment, module), paths in tasks.items():
        began = time.perf_counter()
        command = [str(peer_python(environment, cache)), "-m", module, *map(str, paths)]
        with (folder / f"{module}.log").open("w") as log:
            subprocess.run(
                command,
                env=worker_environ("default allocator"),
                cwd=folder,
                stdout=log,
                stderr=log,
                check=False,
            )
        print(f"{module}: {len(paths)} cases in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for path in paths:
            case = next(case for case in chosen if _folder(folder, case) == path.parent)
            found = _answer(path.with_name("peer.json"))
            facts |= {f"peer in {environment}": found["facts"]} if "facts" in found else {}
            rows[case.name] = _row(case, outcomes[case.name], found)
    shown = [rows[case.name] for case in chosen]
    if all(row["verdict"] in compare.GOOD for row in shown):
        shutil.rmtree(folder)
    else:
        print(f"see {folder}", file=sys.stderr)
    return {"name": "parity", "setting": SETTING, "machine": describe_machine(facts), "rows": shown}


def _folder(folder: Path, case: Case) -> Path:
    return folder / case.name.replace(",", "").replace(" ", "-")


def _write_task(case: Case, outcome: ours.Outcome, files: Path, here: Path) -> Path:
    task = {
        "trainer": case.trainer,
        "model": str(files / case.model),
        "reward": str(files / "reward"),
        "lr": case.lr,
        "steps": world.STEPS,
        "options": dict(case.peer),
        "batches": [batch[::-1] for batch in outcome.batches] if case.reversed_rows else outcome.batches,
        "epochs": case.epochs,
        "minibatches": case.minibatches,
        "responses": world.RESPONSES,
        "new_tokens": {"mixed": world.NEW_TOKENS, "even": world.EVEN_TOKENS}.get(case.rollouts, 0),
    }
    file = here / "task.json"
    file.write_text(json.dumps(task))
    (here / "ours.json").write_text(json.dumps(outcome.curves))
    return file


def _answer(file: Path) -> dict[str, Any]:
    """What the peer wrote; an ``error`` where it wrote nothing."""
    return json.loads(file.read_text()) if file.exists() else {"error": "the peer's process died"}


def _row(case: Case, outcome: ours.Outcome, found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        reason = found["error"].splitlines()[0]
        return {"case": case.name, **case.in_words(), "verdict": f"peer failed: {reason}"}
    period = 0 if case.rollouts else world.ROWS // world.BATCH
    figures = compare.row_of(outcome.curves, found["curves"], period=period, differs=case.differs)
    row = {"case": case.name, **case.in_words(), **figures}
    if case.rollouts:
        steps = [line for line in outcome.metrics if "grad_norm" in line]
        row["clip_fraction"] = float(f"{sum(line['clip_fraction'] for line in steps) / len(steps):.3g}")
        if "kl" in steps[-1]:
            row["kl_nats_per_token"] = float(f"{steps[-1]['kl']:.3g}")
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = []
    for row in rows:
        gaps = "  ".join(
            f"{k.removesuffix('_difference')} {v}" for k, v in row.items() if k.endswith("_difference")
        )
        moved = f"moved {row['loss_moved']}" if "loss_moved" in row else ""
        lines.append(f"{row['case']:32} {row['verdict']:20} {gaps}  {moved}".rstrip())
        if "why" in row:
            numbers = ", ".join(
                f"{n} {row[f'ours_{n}']} and {row[f'peer_{n}']}" for n in ("loss", "grad_norm")
            )
            lines.append(f"{'':33}step {row['at_step']}: {numbers}: {row['why']}")
    return "\n".join(lines)
