"""Runs both sides of a benchmark in turn, and turns the timings into rows.

Each side is one process per case, alive for the whole case. A case is an allocator, and one of the
benchmark's variants where it has some. The requests alternate (ours, peer, ours,
peer, …) and a request is answered before the next is made, so that only one side computes at a time and
whatever slows the machine down for a while slows both.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import settings
from benchmarks.environments import peer_python

ROOT = Path(__file__).resolve().parent.parent
CACHE = ".benchmarks"
"""Under the current directory: environments, models, and the workers' folders while they run."""

ALLOCATORS: dict[str, str | None] = {
    "default allocator": None,
    "tuned allocator": (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=34359738368:"
        "glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=268435456"
    ),
}
"""Name → GLIBC_TUNABLES of both sides; None = unset for both."""


class WorkerError(Exception):
    """A worker died or answered nonsense; the message holds the end of its log and where the rest is."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one side is started."""

    command: list[str]
    environ: Mapping[str, str]
    folder: Path
    """Working directory of the process; its standard error goes to ``log.txt`` there."""


class Worker:
    """The harness's end of the protocol (``protocol.py``): one started process."""

    def __init__(self, launch: Launch) -> None:
        launch.folder.mkdir(parents=True, exist_ok=True)
        self._log = launch.folder / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                launch.command,
                env=dict(launch.environ),
                cwd=launch.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.facts: dict[str, Any] = self._read("ready")
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Run one step; its seconds by the worker's own clock."""
        return float(self._ask("step", "seconds"))

    def peak_mb(self) -> float | None:
        """The most memory the worker has held so far, in MB of 2²⁰ bytes."""
        return self._ask("peak", "peak_mb")

    def close(self) -> None:
        """Ask the worker to leave; end it if it has not within 30 seconds."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, command: str, key: str) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"cmd": command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read(key)

    def _read(self, key: str) -> Any:
        """The value under ``key`` of the next reply.

        Lines before the first reply that are not JSON objects are what imports printed before the
        worker took its standard output for itself; they are skipped.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if key == "ready" and not line.startswith("{"):
                continue
            with contextlib.suppress(json.JSONDecodeError):
                reply = json.loads(line)
                if isinstance(reply, dict) and key in reply:
                    return reply[key]
            raise WorkerError(f"expected a reply with {key!r}, got {line.strip()!r}; log: {self._log}")
        raise self._died()

    def _died(self) -> WorkerError:
        code = self._process.wait()
        with self._log.open(errors="replace") as log:
            tail = "".join(deque(log, maxlen=15))
        return WorkerError(f"worker ended with code {code}; the end of {self._log}:\n{tail}")


@dataclass(slots=True)
class Side:
    """What was measured of one side in one case."""

    seconds: list[float]
    peak_mb: float | None
    facts: dict[str, Any]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(launches: Mapping[str, Launch], runs: int, warm_up: int = 2) -> dict[str, Side]:
    """Start the sides, warm them up in turn, then time ``runs`` steps of each, in turn.

    ``launches`` maps "ours" and/or "peer" to how it is started; turns follow its order. Seconds of the
    warm-up are dropped; peaks include it.

    Raises WorkerError when a side dies.
    """
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(contextlib.closing(Worker(launch))) for name, launch in launches.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(warm_up + runs):
            for name, worker in workers.items():
                elapsed = worker.step()
                if turn >= warm_up:
                    seconds[name].append(elapsed)
        return {name: Side(seconds[name], worker.peak_mb(), worker.facts) for name, worker in workers.items()}


def to_row(case: str, sides: Mapping[str, Side], runs: int) -> dict[str, Any]:
    """One row of the result; null where a side was not run or its figure is unknown.

    ``speedup`` is the peer's median over ours (2 = twice as fast); ``memory_ratio`` is our peak over the
    peer's (0.5 = half the memory).
    """
    ours, peer = sides.get("ours"), sides.get("peer")
    ours_peak = ours.peak_mb if ours else None
    peer_peak = peer.peak_mb if peer else None
    return {
        "case": case,
        "ours_s": _rounded(ours.median_s if ours else None, 4),
        "peer_s": _rounded(peer.median_s if peer else None, 4),
        "speedup": _rounded(peer.median_s / ours.median_s if ours and peer else None, 3),
        "ours_peak_mb": _rounded(ours_peak, 1),
        "peer_peak_mb": _rounded(peer_peak, 1),
        "memory_ratio": _rounded(ours_peak / peer_peak if ours_peak and peer_peak else None, 3),
        "runs": runs,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def describe_machine(sides: Mapping[str, Side]) -> dict[str, Any]:
    """Processor, cores, memory in GB of 2³⁰ bytes, huge pages, load, and each side's threads and packages.

    The load is the mean number of running processes over the last minute: above the cores, something
    else was competing with the benchmark, and its seconds are too long on both sides.
    """
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }
    for name in ("ours", "peer"):
        machine[name] = sides[name].facts if name in sides else None
    return machine


def _first_line(path: str) -> str | None:
    file = Path(path)
    return file.read_text().splitlines()[0] if file.exists() else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    total = _first_line("/proc/meminfo")
    return round(int(total.split()[1]) / 2**20, 1) if total else None


def worker_environ(allocator: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of both sides in a case: the same allocator, no network, this checkout importable.

    Trimtab would set its own allocator; ``TRIMTAB_ALLOCATOR=default`` keeps it from doing so, and
    GLIBC_TUNABLES alone decides, for both.
    """
    environ = {key: value for key, value in base.items() if key != "GLIBC_TUNABLES"}
    tunables = ALLOCATORS[allocator]
    if tunables is not None:
        environ["GLIBC_TUNABLES"] = tunables
    paths = [str(ROOT), environ.get("PYTHONPATH", "")]
    return environ | {
        "TRIMTAB_ALLOCATOR": "default",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def prepare_inputs(cache: Path) -> Path:
    """The folder with the model and the data, written on first use (by a process of its own)."""
    folder = cache / f"inputs-{settings.fingerprint()}"
    if not (folder / "data.json").exists():
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.settings", str(folder)]
        subprocess.run(command, env=environ, check=True, stdout=sys.stderr)
    return folder


def cases_of(benchmark: settings.Benchmark) -> list[str]:
    """The names of its cases: every allocator, with every variant if there are any.

    >>> cases_of(BENCHMARKS["ppo"])
    ['1 epoch, default allocator', '1 epoch, tuned allocator', '4 epochs, default allocator', …]
    """
    if not benchmark.variants:
        return list(ALLOCATORS)
    return [f"{variant}, {allocator}" for variant in benchmark.variants for allocator in ALLOCATORS]


Launcher = Callable[[str], dict[str, Launch]]
"""Case → how each side is started."""


@contextlib.contextmanager
def launcher_for(benchmark: settings.Benchmark, sides: list[str], keep: bool) -> Iterator[Launcher]:
    """Make what the benchmark needs and yield how each case's sides are started.

    The workers' folders, with their logs, are removed at the end unless ``keep`` is set or a worker failed.
    """
    cache = Path.cwd() / CACHE
    inputs = prepare_inputs(cache)
    arguments = [str(inputs / "model"), str(inputs / "data.json")]
    commands: dict[str, list[str]] = {}
    if "ours" in sides:
        commands["ours"] = [sys.executable, "-m", "benchmarks.ours", benchmark.name, *arguments]
    if "peer" in sides:
        python = str(peer_python(benchmark.environment, cache))
        commands["peer"] = [python, "-m", benchmark.peer_module, *arguments]
    folder = cache / "runs" / f"{benchmark.name}-{os.getpid()}"

    def launches(case: str) -> dict[str, Launch]:
        variant, _, allocator = case.rpartition(", ")
        last = [benchmark.variants[variant]] if variant else []
        here = folder / case.replace(",", "").replace(" ", "-")
        return {
            side: Launch([*command, *last], worker_environ(allocator), here / side)
            for side, command in commands.items()
        }

    yield launches
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    benchmark: settings.Benchmark, launcher: Launcher, cases: list[str], runs: int | None = None
) -> dict[str, Any]:
    """Measure every case and return the result that ``--json`` writes; ``runs`` None takes the benchmark's.

    Raises WorkerError when a side dies.
    """
    rows = []
    runs = runs or benchmark.runs
    sides: dict[str, Side] = {}
    for case in cases:
        sides = measure(launcher(case), runs, benchmark.warm_up)
        rows.append(to_row(case, sides, runs))
        for name, side in sides.items():
            print(f"{case}, {name}: {' '.join(f'{s:.3f}' for s in side.seconds)} s", file=sys.stderr)
    return {
        "name": benchmark.name,
        "setting": benchmark.setting,
        "machine": describe_machine(sides),
        "rows": rows,
    }
