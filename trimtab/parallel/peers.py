"""The other processes of a run: what each says of itself, and what of its life can be seen from here."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT = "left"
"""The last beat of a process that has nothing more to do with the others."""


@dataclass(frozen=True)
class Peer:
    """Another process, as it described itself."""

    rank: int
    host: str
    pid: int
    space: str
    """Tells processes whose numbers this one can look up."""
    began: str

    @property
    def name(self) -> str:
        return f"process {self.rank} ({self.host}, pid {self.pid})"


def myself(rank: int) -> dict[str, Any]:
    """What tells this process from all others, for :class:`Peer`."""
    host = os.uname().nodename
    space = host
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return {"rank": rank, "host": host, "pid": os.getpid(), "space": space, "began": _began(os.getpid())[1]}


def _began(pid: int) -> tuple[str, str]:
    """State and time of start of a process of this machine; empty for one that is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    values = text.rpartition(")")[2].split()
    return values[0], values[19]


@dataclass
class Heard:
    """What is known of another process."""

    peer: Peer
    beat: str = ""
    at: float = 0.0

    @property
    def left(self) -> bool:
        return self.beat == LEFT

    @property
    def step(self) -> str:
        text = self.beat.partition(" ")[2]
        return f", at step {text}" if text else ""


def is_gone(peer: Peer, me: Peer) -> bool:
    """A process of this machine is not there any more; of another machine nobody knows."""
    if peer.space != me.space or not peer.began:
        return False
    state, began = _began(peer.pid)
    return began != peer.began or state in "ZX"
