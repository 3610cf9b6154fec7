"""``trimtab ARGUMENTS`` in a process of its own, in which a fault happens at a chosen event.

The product knows nothing of this: what writes, syncs, renames and removes files, and what learns, is wrapped
from outside, in this process only. An event has a kind, a path inside the run directory ("" where it has
none) and a moment:

    open, mkdir          before
    write, tensors       before, middle (half of the bytes are written, then it happens), after
    sync, rename, remove before, after (the path of a rename is the new one)
    backward, adam       before, after (of one micro-batch's gradient, of one optimiser's update)

``python faults_driver.py SPEC.json ARGUMENTS`` or, in a forked process, :func:`drive`.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import functools
import io
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REAL_OPEN, REAL_WRITE = builtins.open, os.write
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"
"""The beginning of what PyTorch says on a CPU."""


def drive(spec: dict[str, Any], arguments: list[str]) -> int:
    """Install the faults that ``spec`` names, run the command; its exit code.

    ``spec``: out (the run directory), log (a file for the events), faults (see :class:`Fault`), memory (rows
    times length of the largest forward pass with gradient that "fits"), powerless (give up root's powers).
    """
    if spec.get("powerless"):
        give_up_powers()
    if spec.get("faults") or spec.get("log"):
        Events(Path(spec["out"]), [Fault(**f) for f in spec.get("faults", ())], spec.get("log")).install()
    if spec.get("memory"):
        limit_forward(spec["memory"])
    from trimtab.cli.main import run

    return run(arguments)


class Fault:
    """``do`` something at the ``n``-th event of this kind, moment and path (a pattern); from then on if
    ``lasting``. ``do``: kill, term, int, group (SIGTERM for the group), fill (the disk), a name of
    errno, chmod:MODE:PATH, size (no file may outgrow this one) or size:BYTES, memory:MIB.
    """

    def __init__(
        self, kind: str, do: str, n: int = 1, when: str = "before", path: str = "*", lasting: bool = False
    ) -> None:
        self.kind, self.when, self.path, self.n, self.do, self.lasting = kind, when, path, n, do, lasting
        self.seen = 0

    def hit(self, kind: str, when: str, path: str) -> bool:
        """Count this event; whether it is the one."""
        if (kind, when) != (self.kind, self.when) or not fnmatchcase(path, self.path):
            return False
        self.seen += 1
        return self.seen == self.n or (self.lasting and self.seen > self.n)

    def act(self, out: Path, path: str) -> None:
        """Let it happen."""
        verb, *more = self.do.split(":")
        if verb in ("kill", "term", "int"):
            os.kill(os.getpid(), getattr(signal, f"SIG{verb.upper()}"))
        elif verb == "group":
            os.killpg(0, signal.SIGTERM)
        elif verb == "fill":
            fill(out.parent)
        elif verb == "chmod":
            os.chmod(out / more[1], int(more[0], 8))
        elif verb == "size":
            most = int(more[0]) if more else os.path.getsize(out / path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        elif verb == "memory":  # address space beyond what is used now
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + (int(more[0]) << 20), resource.RLIM_INFINITY))
        else:
            number = getattr(errno, verb)
            error = OSError(number, os.strerror(number), path)
            if self.kind == "tensors":
                from safetensors import SafetensorError

                raise SafetensorError(f"I/O error: {error.strerror} (os error {number})")
            raise error


def fill(folder: Path) -> None:
    """Take all the room that the file system of this folder has left."""
    handle = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for size in (1 << 16, 1 << 12, 1):
        try:
            while True:
                REAL_WRITE(handle, b"\0" * size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    os.close(handle)


class Events:
    """Notices what happens below ``out``, notes it in ``log`` and lets the faults happen."""

    def __init__(self, out: Path, faults: list[Fault], log: str | None) -> None:
        self.out, self.faults = out.absolute(), faults
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) if log else None
        self._lock = threading.RLock()

    def inside(self, path: Any, folder: int | None = None) -> str | None:
        """The path relative to the run directory; None for one elsewhere, such as a cache."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = Path(os.fsdecode(path))
        if folder is not None:
            path = Path(os.readlink(f"/proc/self/fd/{folder}")) / path
        try:
            return path.absolute().relative_to(self.out).as_posix()
        except ValueError:
            return None

    def happened(self, kind: str, when: str, path: str | None) -> None:
        """An event outside the run directory is none."""
        if path is None:
            return
        for fault in self.hits(kind, when, path):
            fault.act(self.out, path)

    def hits(self, kind: str, when: str, path: str) -> list[Fault]:
        """Note the event; the faults that are due."""
        with self._lock:
            if self._log is not None:
                with contextlib.suppress(OSError):  # a limit on the size of files is its limit, too
                    REAL_WRITE(self._log, f"{kind} {when} {path}\n".encode())
            return [fault for fault in self.faults if fault.hit(kind, when, path)]

    def around(self, call: Callable[..., Any], kind: str, where: int | None = 0) -> Callable[..., Any]:
        """The call with an event before and after; argument ``where`` is its path (None: it has none)."""

        @functools.wraps(call)
        def wrapped(*given: Any, **named: Any) -> Any:
            path = "" if where is None else self.inside(given[where], named.get("dir_fd"))
            self.happened(kind, "before", path)
            result = call(*given, **named)
            self.happened(kind, "after", path)
            return result

        return wrapped

    def install(self) -> None:
        """Wrap what a run writes with and learns with."""
        import safetensors.torch
        import torch

        os.fsync = self.around(os.fsync, "sync")
        for name in ("rename", "replace"):
            setattr(os, name, self.around(getattr(os, name), "rename", 1))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self.around(getattr(os, name), "remove"))
        os.mkdir = self.around(os.mkdir, "mkdir")
        builtins.open = io.open = self.open  # type: ignore[assignment]
        torch.Tensor.backward = self.around(torch.Tensor.backward, "backward", None)  # type: ignore[method-assign]
        torch.optim.AdamW.step = self.around(torch.optim.AdamW.step, "adam", None)  # type: ignore[method-assign]
        own = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, filename: Any, *rest: Any, **named: Any) -> Any:
            path = self.inside(filename)
            self.happened("tensors", "before", path)
            result = own(tensors, filename, *rest, **named)
            for fault in self.hits("tensors", "middle", path) if path is not None else ():
                os.truncate(filename, os.path.getsize(filename) // 2)
                fault.act(self.out, path or "")
            self.happened("tensors", "after", path)
            return result

        safetensors.torch.serialize_file = serialize_file

    def open(self, file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        """``open`` whose files have events, where they are written to."""
        path = self.inside(file) if set(mode) & set("wax+") and not isinstance(file, int) else None
        self.happened("open", "before", path)
        opened = REAL_OPEN(file, mode, *rest, **named)
        return opened if path is None else Watched(opened, path, self)


class Watched:
    """A file whose writes are events."""

    def __init__(self, file: Any, path: str, events: Events) -> None:
        self._file, self._path, self._events = file, path, events

    def write(self, content: Any) -> int:
        """With the first half alone on the disk in the middle."""
        events, path = self._events, self._path
        events.happened("write", "before", path)
        for fault in events.hits("write", "middle", path):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            fault.act(events.out, path)
        written = self._file.write(content)
        events.happened("write", "after", path)
        return written

    def writelines(self, lines: Any) -> None:
        """One by one."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._file.__exit__(*what)

    def __iter__(self) -> Any:
        return iter(self._file)


def limit_forward(tokens: int) -> None:
    """A forward pass with gradient over more tokens than these, padding counted, has no memory."""
    from transformers.models.llama.modeling_llama import LlamaModel

    own = LlamaModel.forward
    import torch

    @functools.wraps(own)
    def forward(self: Any, input_ids: Any = None, **named: Any) -> Any:
        if input_ids is not None and torch.is_grad_enabled() and input_ids.numel() > tokens:
            raise RuntimeError(f"{NO_MEMORY} allocate {input_ids.numel()} bytes.")
        return own(self, input_ids, **named)

    LlamaModel.forward = forward  # type: ignore[method-assign]


def give_up_powers() -> None:
    """Root without its capabilities meets a read-only folder as any user does."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    sys.exit(drive(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2:]))
