"""Runs of several processes that can be killed: what each said, and how and when it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import _free_port

HERE = Path(__file__).parent
SPOKEN = ("error: ", "lost: ", "terminated: ", "interrupted", "Traceback")
"""How lines begin that say why a run ended."""


@dataclass
class End:
    """Of one process."""

    code: int
    """The exit code, or minus the signal."""
    after_s: float
    """Seconds since the fault, or since the start."""
    out: str
    err: str


@dataclass
class Ends:
    """Of all processes of a run, in order of rank."""

    each: list[End]

    @property
    def codes(self) -> list[int]:
        return [end.code for end in self.each]

    @property
    def line(self) -> str:
        """What was said of the end: once, by one process, in one line."""
        lines = [line for end in self.each for line in end.err.splitlines() if line.startswith(SPOKEN)]
        assert len(lines) == 1, "\n".join(f"--- {i}\n{end.err}" for i, end in enumerate(self.each))
        return lines[0]

    def silent(self, rank: int) -> bool:
        return not self.each[rank].err.strip() and not self.each[rank].out.strip()


class Ranks:
    """The server that forks them (ranks_server.py)."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE}:{HERE.parents[1]}",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "ranks_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def run(
        self,
        folder: Path,
        *arguments: str,
        size: int = 2,
        own: dict[int, list[str]] | None = None,
        environments: dict[int, dict[str, str]] | None = None,
        start: list[int] | None = None,
        fault: dict[str, Any] | None = None,
        limit_s: float = 60.0,
    ) -> Ends:
        """``trimtab ARGUMENTS`` in ``size`` processes; ``own``: further arguments of some, by rank.

        ``start``: those that are started at all.
        """
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        ranks = list(range(size)) if start is None else start
        request = {
            "arguments": [[*arguments, *(own or {}).get(rank, [])] for rank in ranks],
            "environments": [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    **(environments or {}).get(rank, {}),
                }
                for rank in ranks
            ],
            "folder": str(folder),
            "fault": fault,
            "limit_s": limit_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        ended = json.loads(self._process.stdout.readline())["ended"]
        texts = [[(folder / f"{i}.{end}").read_text() for end in ("out", "err")] for i in range(len(ranks))]
        return Ends([End(code, s, *text) for (code, s), text in zip(ended, texts, strict=True)])

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
