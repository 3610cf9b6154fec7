"""What a run ran on: code, packages, hardware, and the settings of the process that change numbers."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from trimtab import __version__
from trimtab.registry.digests import combined, file_digest

PACKAGE = Path(__file__).parents[1]
SOURCES = {".py", ".c", ".h", ".toml", ".j2"}

PACKAGES = (
    *("trimtab", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
    *("peft", "bitsandbytes", "datasets", "pyarrow", "pydantic", "huggingface_hub"),
)

VARIABLES = (
    *("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "TRIMTAB_ALLOCATOR", "TRIMTAB_KERNELS", "CC"),
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_DYNAMIC", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("MKL_NUM_THREADS", "MKL_CBWR", "MKL_DYNAMIC", "OPENBLAS_NUM_THREADS", "ATEN_CPU_CAPABILITY"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "TOKENIZERS_PARALLELISM"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONHASHSEED"),
)
"""The environment variables that are recorded, where they are set; no others are."""


def surroundings() -> dict[str, Any]:
    """Versions, hardware, threads and settings, for the lineage."""
    return {
        "packages": packages(),
        "python": platform.python_version(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def packages() -> dict[str, str | None]:
    """Versions; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = __version__ if name == "trimtab" else None
    return found


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, memory and GPU of this machine, and its system; sizes in MiB."""
    made: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _processor(),
        "memory_mb": _memory_mb(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
    }
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        made |= {"device": about.name, "gpu_memory_mb": about.total_memory >> 20, "cuda": torch.version.cuda}
    else:
        made["device"] = made["cpu"]
    return made


def _processor() -> str:
    """The processor's name; ``platform.processor`` has none on most Linux systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or "cpu"


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    except (ValueError, OSError, AttributeError):
        return None


def code() -> dict[str, Any]:
    """This version of Trimtab: its number, the digest of its sources, and the commit of a checkout."""
    files = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*")) if p.suffix in SOURCES}
    sources = {name: file_digest(path) for name, path in files.items()}
    return {"version": __version__, "sha256": combined(sources), **_commit(PACKAGE)}


def _commit(package: Path) -> dict[str, Any]:
    """Commit and whether the package's files were changed since; nothing outside a checkout of it."""
    root = package.parent
    if not (root / ".git").exists():
        return {}
    tracked = _git(root, "ls-files", "--error-unmatch", f"{package.name}/__init__.py")
    commit = _git(root, "rev-parse", "HEAD")
    if tracked is None or commit is None:  # installed below somebody else's repository
        return {}
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--", package.name))}


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or there is none."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # read only: no refresh of the index
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
