"""Runs both sides of a benchmark in turn, and turns the timings into rows.

Each side is one process per case, alive for the whole case. A case is an allocator, and one of the
benchmark's variants where it has some. The requests alternate (ours, peer, ours, peer, …) and a request is
answered before the next is made, so that only one side computes at a time and whatever slows the machine down
for a while slows both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.catalogue import Benchmark, Variant
from benchmarks.environments import peer_python
from benchmarks.machine import ROOT, describe_machine, worker_environ
from benchmarks.rows import Side, skipped_row, to_row
from trimtab.errors import InputError

CACHE = ".benchmarks"
"""Under the current directory: environments, models, and the workers' folders while they run."""


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
            self.facts: dict[str, Any] = self._read("ready")["ready"]
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Run one step; its seconds by the worker's own clock."""
        return float(self._ask("step", "seconds")["seconds"])

    def memory(self) -> tuple[float | None, float | None]:
        """The most memory held so far, and what was held once the weights were loaded, in MB of 2²⁰ bytes."""
        reply = self._ask("peak", "peak_mb")
        return reply["peak_mb"], reply.get("loaded_mb")

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

    def _ask(self, command: str, key: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"cmd": command}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._read(key)

    def _read(self, key: str) -> dict[str, Any]:
        """The next reply, which has ``key``.

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
                    return reply
            raise WorkerError(f"expected a reply with {key!r}, got {line.strip()!r}; log: {self._log}")
        raise self._died()

    def _died(self) -> WorkerError:
        code = self._process.wait()
        with self._log.open(errors="replace") as log:
            tail = "".join(deque(log, maxlen=15))
        return WorkerError(f"worker ended with code {code}; the end of {self._log}:\n{tail}")


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
        return {name: Side(seconds[name], *worker.memory(), worker.facts) for name, worker in workers.items()}


def prepare_inputs(cache: Path, names: set[str]) -> Path:
    """The folder with the data and the models ``names``, written on first use (by a process of its own)."""
    folder = cache / f"inputs-{inputs.fingerprint()}"
    if inputs.missing(folder, names):
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.inputs", str(folder), *sorted(names)]
        subprocess.run(command, env=environ, check=True, stdout=sys.stderr)
    return folder


def cases_of(benchmark: Benchmark) -> list[str]:
    """The names of its cases: every allocator, with every variant if there are any.

    >>> cases_of(BENCHMARKS["ppo"])
    ['32 prompts, default allocator', '32 prompts, tuned allocator', …]
    """
    return [
        f"{variant}, {allocator}" if variant else allocator
        for variant in benchmark.variants
        for allocator in benchmark.allocators
    ]


def variant_of(benchmark: Benchmark, case: str) -> Variant:
    """The variant that a case measures."""
    return benchmark.variants[case.rpartition(", ")[0]]


Launcher = Callable[[str], dict[str, Launch]]
"""Case → how each side is started. Raises InputError where the peer's environment cannot be made."""


@contextlib.contextmanager
def launcher_for(
    benchmark: Benchmark, sides: list[str], keep: bool, cases: list[str] | None = None
) -> Iterator[Launcher]:
    """Make what the cases need (None: all) and yield how each case's sides are started.

    The workers' folders, with their logs, are removed at the end unless ``keep`` is set or a worker failed.
    Raises InputError when an environment that is not optional cannot be made.
    """
    cache = Path.cwd() / CACHE
    variants = [variant_of(benchmark, case) for case in cases or cases_of(benchmark)]
    files = prepare_inputs(cache, {variant.model for variant in variants})
    if "peer" in sides:
        for name in {v.environment or benchmark.environment for v in variants if not v.optional}:
            if name is not None:
                peer_python(name, cache)
    folder = cache / "runs" / f"{benchmark.name}-{os.getpid()}"

    def launches(case: str) -> dict[str, Launch]:
        variant = variant_of(benchmark, case)
        last = [str(files / variant.model), str(files / "data.json"), *filter(None, [variant.argument])]
        commands: dict[str, list[str]] = {}
        if "ours" in sides:
            commands["ours"] = [sys.executable, "-m", benchmark.ours_module, benchmark.name, *last]
        environment, module = variant.environment or benchmark.environment, None
        if "peer" in sides and environment is not None:
            module = variant.peer_module or benchmark.peer_module
            commands["peer"] = [str(peer_python(environment, cache)), "-m", str(module), *last]
        allocator = case.rpartition(", ")[2]
        here = folder / case.replace(",", "").replace(" ", "-")
        return {
            side: Launch(command, worker_environ(allocator), here / side)
            for side, command in commands.items()
        }

    yield launches
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    benchmark: Benchmark, launcher: Launcher, cases: list[str], runs: int | None = None
) -> dict[str, Any]:
    """Measure every case and return the result that ``--json`` writes; ``runs`` None takes the benchmark's.

    An optional peer that cannot be installed, or whose worker fails, costs its case its figures and no more:
    a line says so, and so does ``skipped`` in its row. Raises WorkerError when a side of another case dies.
    """
    rows = []
    runs = runs or benchmark.runs
    facts: dict[str, dict[str, Any]] = {}
    for case in cases:
        variant = variant_of(benchmark, case)
        try:
            sides = measure(launcher(case), runs, benchmark.warm_up)
        except (InputError, WorkerError) as error:
            if not variant.optional:
                raise
            reason = str(error).strip().splitlines()
            print(f"{case}: skipped: {error}", file=sys.stderr)
            rows.append(skipped_row(case, f"{reason[0]} {reason[-1]}" if len(reason) > 1 else reason[0]))
            continue
        rows.append(to_row(case, sides, runs, above_model=variant.above_model))
        for name, side in sides.items():
            # A benchmark's peers may live in several environments; each is described.
            apart = name == "peer" and variant.environment is not None
            facts[f"peer in {variant.environment}" if apart else name] = side.facts
        for name, side in sides.items():
            print(f"{case}, {name}: {' '.join(f'{s:.3f}' for s in side.seconds)} s", file=sys.stderr)
    return {
        "name": benchmark.name,
        "setting": benchmark.setting,
        "machine": describe_machine(facts),
        "rows": rows,
    }
