"""Memory of this process and of the machine, where the system tells."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

REFUSED = ("DefaultCPUAllocator", "can't allocate memory", "could not create a primitive", "bad_alloc")
"""How an allocation that failed on a CPU reads: PyTorch's own, oneDNN's (seen under a limit), C++'s."""


def reset_peak() -> None:
    """Start a new measurement of the peak (Linux); elsewhere the peak stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_mb() -> float:
    """Largest resident memory since :func:`reset_peak`, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident_mb() -> float:
    """Resident memory now, in MiB; 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
    return 0.0


def give_back() -> None:
    """Free what nobody uses any more, and hand it to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Hand what has been freed to the system, as far as the C library and PyTorch do.

    It stays with the C library otherwise, where a mapping (oneDNN's code, a large tensor) cannot use it, and
    where it counts as taken.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")  # not imported for this: whoever asks what is free may need none of it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_bytes(system: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, in this machine and container; None where nobody tells."""
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
        groups = (system / "proc/self/cgroup").read_text().splitlines()
    except (OSError, StopIteration):
        return None
    # A container's limit is not the machine's. Version 2 has one tree ("0::/path"), version 1 one a resource.
    for _, kinds, path in (group.split(":", 2) for group in groups):
        if kinds not in ("", "memory"):
            continue
        root = system / "sys/fs/cgroup" / kinds
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        )
        for folder in (root / path.lstrip("/"), root):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                # What files have in the cache is given back first.
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
                free = min(free, left + int(stat.get("inactive_file", 0)))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return free


def out_of_memory(error: BaseException) -> bool:
    """PyTorch says so by a class of its own on a GPU, in words on a CPU."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in REFUSED)
