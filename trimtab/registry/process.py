"""Telling a process that still runs from one that has ended, though another may have its number now."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What tells this process from one that has its number later, here or on another machine."""
    return {"pid": os.getpid(), "began": _began_at(os.getpid()), "boot": _boot()}


def is_alive(process: Any) -> bool:
    """Whether the process that :func:`this_process` described still runs, on this machine."""
    if not isinstance(process, dict) or not isinstance(process.get("pid"), int):
        return False
    began = _began_at(process["pid"])
    return began is not None and began == process.get("began") and process.get("boot") == _boot()


def _began_at(pid: int) -> str | None:
    try:
        # Behind the name in brackets, which may hold anything; field 22 of the whole line.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
