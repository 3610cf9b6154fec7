"""What each process of a run keeps for itself: its own log, its share of the machine's threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.parallel.world import world

PROCESSES = "processes"
"""The folder of the logs; also what the lineage and a checkpoint call the processes that there were."""


class ProcessLog:
    """``processes/RANK.log`` of a process that is not the first: what it said, its memory, its end."""

    def __init__(self, out: Path, rank: int, lines: list[str]) -> None:
        """Begin a sitting with what was said before. Raises InputError where it cannot be written."""
        file = out / PROCESSES / f"{rank}.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: cannot write: {error.strerror}") from None
        self.say(f"process {rank} of {world().size}, pid {os.getpid()} on {os.uname().nodename}")
        for line in lines:
            self.say(line)

    def say(self, line: str) -> None:
        """A line with its time. One that cannot be written is left out: the run does not hang on it."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {line}\n")
            self._file.flush()

    def memory(self, step: int, figures: Mapping[str, float]) -> None:
        """What it holds at this step, in MiB."""
        self.say(f"step {step}: " + ", ".join(f"{name} {value:,.1f}" for name, value in figures.items()))

    def close(self, reason: BaseException | None) -> None:
        """Say why it ended, and end; safe to call twice."""
        if self._file.closed:
            return
        what = " ".join(str(reason).split()) or type(reason).__name__ if reason is not None else "done"
        self.say(f"ended: {what}")
        with contextlib.suppress(OSError):
            self._file.close()


def choose_threads(saved: Mapping[str, Any], option: int) -> int:
    """CPU threads of this process; 0 leaves what PyTorch takes. The same in every process.

    A run that goes on has those of its first sitting, unless the number of processes has changed. Without an
    option the processes of a machine share its cores, unless OMP_NUM_THREADS says how many each has.
    """
    here = world()
    if saved.get("threads") and saved.get(PROCESSES, 1) == here.size:
        return int(saved["threads"])
    if option or here.alone:
        return option
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, cores // here.local_size)
    return min(here.gather(own))
