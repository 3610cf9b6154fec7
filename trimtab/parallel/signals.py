"""SIGTERM where no step waits for it: while a process of several loads its model, or ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trimtab.errors import Terminated


class Asked(Terminated):
    """SIGTERM came to this process where no step waits for it: while it loads, or ends."""


@contextmanager
def asked() -> Iterator[None]:
    """Within it SIGTERM is raised as Asked, so that the others hear of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Asked("before its next step; earlier checkpoints are kept")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
