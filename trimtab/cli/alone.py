"""Commands that are for one process: what they say where a launcher has started several."""

from __future__ import annotations

import os
import signal
import threading
import time

from trimtab.errors import InputError

SILENT_S = 5.0
"""What the other processes wait: a launcher ends all when one is gone, and the first has to speak."""


def only_process(command: str) -> None:
    """Go on where this process is alone; else the first one says so, and all end with exit code 2.

    Raises InputError in the first process, SystemExit in the others.
    """
    if not os.environ.keys() & {"RANK", "WORLD_SIZE", "SLURM_PROCID"}:
        return
    from trimtab.parallel.environment import place

    here = place()
    if here is None:
        return
    if here.rank == 0:
        raise InputError(f"trimtab {command} runs in one process: start it without {here.launcher}")
    # The launcher's request to end, once the first has, must not come before the exit code.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(SILENT_S)
    raise SystemExit(2)
