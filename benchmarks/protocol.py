"""How a worker and the harness talk: JSON lines over the worker's standard input and output.

The worker says ``{"ready": {…}}`` once it could run a step, then answers
``{"cmd": "step"}`` with ``{"seconds": s}``, ``{"cmd": "peak"}`` with ``{"peak_mb": m, "loaded_mb": l}`` and
leaves at ``{"cmd": "stop"}`` or when its input ends. Nothing runs between two requests, so that two workers
can hold their models at once and never compute at once.

Standard library only: it is imported in every peer's environment, whatever is installed there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

STATUS = Path("/proc/self/status")


def peak_mb(status: Path = STATUS) -> float | None:
    """The most memory this process ever held resident (VmHWM), in MB of 2²⁰ bytes.

    It counts everything since the process began: the interpreter, the libraries, both models.
    None where the system has no /proc.
    """
    return _status_mb("VmHWM:", status)


def resident_mb(status: Path = STATUS) -> float | None:
    """The memory this process holds resident now (VmRSS), in MB of 2²⁰ bytes; None without /proc."""
    return _status_mb("VmRSS:", status)


def _status_mb(field: str, status: Path) -> float | None:
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package, for the machine record."""
    return {package: importlib.metadata.version(package) for package in packages}


class Channel:
    """The worker's end. Whoever owns the loop calls :meth:`wait` before a step and :meth:`done` after.

    >>> channel = Channel()
    >>> channel.ready(threads=2)
    >>> while channel.wait():
    ...     train_one_step()
    ...     channel.done()
    """

    def __init__(self, requests: TextIO | None = None, replies: TextIO | None = None) -> None:
        self._requests = requests or sys.stdin
        self._replies = replies or _take_stdout()
        self._started = 0.0
        self._loaded_mb: float | None = None

    def loaded(self, weights: Iterable[Any] = ()) -> None:
        """The policy is in memory, and nothing else of the training yet; only the first call counts.

        ``weights`` are read once: of a file that is mapped, only what was read is resident.
        """
        if self._loaded_mb is None:
            for weight in weights:
                float(weight.detach().sum())
            self._loaded_mb = resident_mb()

    def ready(self, **facts: Any) -> None:
        """Say that the next request may be a step; ``facts`` go to the machine record."""
        self._send({"ready": facts})

    def wait(self) -> bool:
        """Block until a step is asked for and start its clock; False = no more steps."""
        for line in self._requests:
            command = json.loads(line)["cmd"]
            if command == "peak":
                self._send({"peak_mb": peak_mb(), "loaded_mb": self._loaded_mb})
            elif command == "step":
                self._started = time.perf_counter()
                return True
            elif command == "stop":
                return False
            else:
                raise ValueError(f"unknown command {command!r}: expected step, peak or stop")
        return False

    def done(self) -> None:
        """Stop the clock that :meth:`wait` started and report the step."""
        self._send({"seconds": time.perf_counter() - self._started})

    def _send(self, message: dict[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()


def _take_stdout() -> TextIO:
    """The real standard output, for replies alone: what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
