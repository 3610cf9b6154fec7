"""One run in fresh processes: started, waited for, and what they found put together."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import worker_environ
from benchmarks.plan.inputs import model_folder
from benchmarks.plan.worker import overrides
from benchmarks.scale.cases import MODEL, STEPS, Case, Way

FAILED = "failed"
LIMIT_S = 1200.0
GRACE_S = 20.0
"""How long the others may go on after one process has failed."""


def measure(case: Case, way: Way, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Figures of one run, or why there are none; ``folder`` has the model, or gets it."""
    model = with_model(folder)
    work = folder / f"scale-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    given = overrides(case.method, model, work, case.options(way, steps))
    (work / "options.json").write_text(json.dumps(given), encoding="utf-8")
    load, began, busy = os.getloadavg()[0], time.perf_counter(), _busy_s()
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        failed = ended(_started(case.method, way, work), work, LIMIT_S)
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        mine = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
        others = None if busy is None else max(0.0, ((_busy_s() or busy) - busy - mine) / seconds)
        noise = {"load": round(load, 2), "others": None if others is None else round(others, 2)}
        if failed:
            return {FAILED: failed, **noise}
        found = [
            json.loads((work / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(way.processes)
        ]
        return {**figures(found), **noise}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def with_model(folder: Path) -> Path:
    """The model's folder; made in a process of its own if it is not there."""
    model = model_folder(folder, MODEL)
    if not (model / "whole").exists():
        command = [sys.executable, "-m", "benchmarks.plan.inputs", str(folder), MODEL]
        subprocess.run(command, check=True, capture_output=True, env=worker_environ("tuned allocator"))
    return model


def figures(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what each process wrote: seconds of a step, of its messages, of waiting in them, and the peaks.

    The first step is left out. ``messages_s``: a process's seconds in messages in a step, their mean over
    processes. In each message the process that came last waited for nobody: what the others took longer is
    ``waiting_s``, a part of it.
    """
    ends = found[0]["ends"]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    sent, waited = [], []
    for calls in list(zip(*(process["calls"] for process in found), strict=True))[1:]:
        if len({len(one) for one in calls}) > 1:
            raise ValueError(f"processes sent {[len(one) for one in calls]} messages in one step")
        mean = statistics.fmean(sum(one) for one in calls)
        sent.append(mean)
        waited.append(mean - sum(map(min, zip(*calls, strict=True))))
    return {
        "step_s": statistics.median(steps),
        "messages": len(found[0]["calls"][-1]),
        "messages_s": statistics.median(sent),
        "waiting_s": statistics.median(waited),
        "peak_mb": [round(process["peak_mb"]) for process in found],
        "baseline_mb": [round(process["baseline_mb"]) for process in found],
    }


def _started(method: str, way: Way, work: Path) -> list[subprocess.Popen[bytes]]:
    """The processes, as torchrun would start them."""
    environment = worker_environ("tuned allocator") | {"OMP_NUM_THREADS": str(way.threads)}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE", "MKL_NUM_THREADS")}
    if way.processes > 1:
        environment |= {
            "WORLD_SIZE": str(way.processes),
            "LOCAL_WORLD_SIZE": str(way.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        }
    command = [sys.executable, "-m", "benchmarks.scale.worker", method, str(work)]
    processes = []
    for rank in range(way.processes):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if way.processes > 1 else {}
        with (work / f"{rank}.log").open("wb") as said:
            processes.append(
                subprocess.Popen(command, env=environment | numbers, stdout=said, stderr=subprocess.STDOUT)
            )
    return processes


def ended(processes: Sequence[subprocess.Popen[bytes]], work: Path, limit_s: float) -> str:
    """Wait for all; what went wrong, in the last words of the process that failed first. None is left."""
    until = time.monotonic() + limit_s
    first: int | None = None
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            wrong = [rank for rank, process in enumerate(processes) if process.poll()]
            if wrong and first is None:
                first, until = wrong[0], min(until, time.monotonic() + GRACE_S)
            time.sleep(0.05)
    finally:
        late = [process for process in processes if process.poll() is None]
        for process in late:
            process.kill()
        for process in processes:
            process.wait(30)
    if first is None and late:
        return f"not done after {limit_s:.0f} s"
    codes = [process.returncode for process in processes]
    if not any(codes):
        return ""
    if first is None:
        first = next(rank for rank, code in enumerate(codes) if code)
    lines = (work / f"{first}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"process {first} of {len(processes)} ended with code {codes[first]}: {last[:300]}".strip(": ")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _busy_s() -> float | None:
    """Processor seconds that all of this machine has used so far; None where nobody tells."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
