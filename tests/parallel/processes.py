"""A pool of processes that run a function together, as ``torchrun`` would start them.

How to use it::

    from processes import Processes  # for the annotation; the fixture is in conftest.py

    def losses(config: Path, steps: int) -> list[float]:  # at the top of the test's module
        ...                                               # here world().size is 2
        return found                                      # JSON or paths

    def test_losses(processes: Processes, tmp_path: Path) -> None:
        first, second = processes.run(losses, config=tmp_path / "config.toml", steps=3)
        alone, = processes.run(losses, size=1, config=tmp_path / "config.toml", steps=3)

Arguments and results are JSON or paths; a tuple arrives as a list. Each process imports the test's module by
its name, so the function stands at its top. The processes are started once (imports cost seconds) and joined
anew for each call, on a free port, over gloo on this machine; one thread each. An exception in one of them
fails the test with its traceback (``ProcessFailed``; ``.errors`` has one or None for each process); one that
does not answer within ``limit`` seconds fails it too. Where one ended or still waits for another, all are
started anew for the next call. None is left when the tests end.

Under pytest-xdist each worker that comes to such a test has a pool of its own. ``--dist loadgroup`` would
keep them in one, but pytest-xdist 3.8 marks groups in a way that pytest 9.2 no longer reads.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from processes_worker import decoded, encoded

HERE = Path(__file__).parent
LIMIT_S = 60.0
GRACE_S = 3.0
"""How long the others may go on after one process failed."""


class ProcessFailed(AssertionError):
    """A process raised, ended or did not answer."""

    def __init__(self, message: str, errors: list[str | None]) -> None:
        super().__init__(message)
        self.errors = errors
        """The traceback of each process that raised, in order of rank."""


class _Worker:
    """One process, and what it says."""

    def __init__(self) -> None:
        self.said: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        environment = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "processes_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | environment,
            text=True,
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def ask(self, order: dict[str, Any]) -> None:
        self.said.seek(0)
        self.said.truncate()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order, default=encoded) + "\n")
        self.process.stdin.flush()

    def answer(self, wait_s: float) -> dict[str, Any]:
        """What it found; raises queue.Empty."""
        line = self.answers.get(timeout=max(wait_s, 0.001))
        if line:
            return json.loads(line, object_hook=decoded)
        return {"error": f"ended with code {self.process.wait(5)}\n{self.spoken()}", "ended": True}

    def spoken(self) -> str:
        """What it printed during the last call, the end of it."""
        self.said.flush()
        self.said.seek(0)
        return self.said.read()[-4000:]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.said.close()


class Processes:
    """The pool; see the head of this file."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self.spoken: list[str] = []
        """What each process printed during the last call, in order of rank."""

    def run(
        self,
        function: Callable[..., Any],
        *,
        size: int = 2,
        limit: float = LIMIT_S,
        environment: dict[str, str] | None = None,
        join: bool = True,
        **given: Any,
    ) -> list[Any]:
        """``function(**given)`` in ``size`` processes at once; what each returned, in order of rank.

        ``join``: they have joined when it is called; else it is for the function to join them.
        """
        while len(self._workers) < size:
            self._workers.append(_Worker())
        module = Path(inspect.getfile(function))
        port = _free_port()
        for rank, worker in enumerate(self._workers[:size]):
            launched = (
                {}
                if size == 1
                else {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            )
            worker.ask(
                {
                    "module": module.stem,
                    "folders": [str(HERE.parent), str(HERE), str(module.parent)],
                    "function": function.__name__,
                    "given": given,
                    "join": join,
                    "environment": launched | (environment or {}),
                }
            )
        return self._collect(size, limit)

    def _collect(self, size: int, limit: float) -> list[Any]:
        answers: list[dict[str, Any] | None] = [None] * size
        until = time.monotonic() + limit
        while any(answer is None for answer in answers) and time.monotonic() < until:
            for rank, worker in enumerate(self._workers[:size]):
                if answers[rank] is None:
                    try:
                        answers[rank] = found = worker.answer(0.02)
                    except queue.Empty:
                        continue
                    if "error" in found:
                        until = min(until, time.monotonic() + GRACE_S)
        self.spoken = [worker.spoken() for worker in self._workers[:size]]
        if all(answer is not None and "error" not in answer for answer in answers):
            return [answer["found"] for answer in answers if answer is not None]
        if not all(answer is not None and "ended" not in answer for answer in answers):
            self.close()
        errors = [None if answer is None else answer.get("error") for answer in answers]
        lines = [f"process {rank} of {size}: {error}" for rank, error in enumerate(errors) if error]
        silent = [rank for rank, answer in enumerate(answers) if answer is None]
        if silent:
            lines.append(f"processes {silent} of {size} did not answer")
            lines += [f"process {rank} said:\n{self.spoken[rank]}" for rank in silent]
        raise ProcessFailed("\n".join(lines), errors)

    def close(self) -> None:
        """End them all; the next call starts new ones."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
