"""The machine that a result was measured on, and the environment that both sides' processes are given."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.catalogue import ALLOCATORS

ROOT = Path(__file__).resolve().parent.parent


def describe_machine(facts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Processor, cores, memory in GB of 2³⁰ bytes, huge pages, load, and each side's threads and packages.

    The load is the mean number of running processes over the last minute: above the cores, something
    else was competing with the benchmark, and its seconds are too long on both sides.
    """
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "load": round(os.getloadavg()[0], 2),
    }
    return {**machine, "ours": None, "peer": None, **facts}


def _first_line(path: str) -> str | None:
    file = Path(path)
    return file.read_text().splitlines()[0] if file.exists() else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    total = _first_line("/proc/meminfo")
    return round(int(total.split()[1]) / 2**20, 1) if total else None


def worker_environ(allocator: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of both sides in a case: the same allocator, no network, this checkout importable.

    Trimtab would set its own allocator; ``TRIMTAB_ALLOCATOR=default`` keeps it from doing so, and
    GLIBC_TUNABLES alone decides, for both.
    """
    environ = {key: value for key, value in base.items() if key != "GLIBC_TUNABLES"}
    tunables = ALLOCATORS[allocator]
    if tunables is not None:
        environ["GLIBC_TUNABLES"] = tunables
    paths = [str(ROOT), environ.get("PYTHONPATH", "")]
    return environ | {
        "TRIMTAB_ALLOCATOR": "default",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
