"""Compiles the C files of this folder once for this machine, and loads them.

Half of a training step of a small model, and most of a decode step, is elementwise work that PyTorch runs on
CPU as a chain of passes over memory. The files here do such chains in one pass. There is no well-kept
library of fused training kernels for CPU (Liger is Triton, for GPUs; Intel's extension has ended), and
``torch.compile`` of the same functions takes a minute where a C compiler takes two seconds.

Every kernel has a plain form in PyTorch beside it, which is its oracle in tests and what runs where there is
no compiler, on another device, or with ``TRIMTAB_KERNELS=off``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-freciprocal-math"),
)
"""Sums are reordered only where a loop says so (``omp simd reduction``); infinities keep their meaning."""


_used = True


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none or they are not used. :func:`why_not` says why."""
    return _built()[0] if _used else None


def why_not() -> str | None:
    """A few words that say why there are no compiled kernels; None where there are."""
    return _built()[1] if _used else "turned off"


def use(wanted: bool) -> None:
    """From now on use the compiled kernels, where there are any, or do not."""
    global _used
    _used = wanted


@functools.cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("TRIMTAB_KERNELS", "on") == "off":
        return None, "turned off by TRIMTAB_KERNELS"
    compiler, openmp = shutil.which(os.environ.get("CC", "cc")), _openmp()
    if compiler is None or openmp is None:
        return None, "no C compiler (cc)" if compiler is None else "PyTorch's OpenMP library was not found"
    try:
        return ctypes.CDLL(str(_compiled(compiler, openmp))), None
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"the C compiler failed: {detail.strip().splitlines()[-1] if detail.strip() else error}"


def _compiled(compiler: str, openmp: str) -> Path:
    """The shared library's path, compiled if no run on such a machine has done so before."""
    sources = sorted(FOLDER.glob("*.c"))
    mark = hashlib.sha256()
    for part in (*FLAGS, compiler, openmp, platform.machine(), _processor()):
        mark.update(part.encode())
    for file in (*sources, *sorted(FOLDER.glob("*.h"))):
        mark.update(file.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    target = folder / f"kernels-{mark.hexdigest()[:16]}.so"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="trimtab-"))
            target = folder / target.name
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = []
            for source in sources:
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                _run([compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
            # Linked with the OpenMP that PyTorch has loaded, not with -fopenmp: two pools of threads would
            # wait for each other's cores.
            finished = Path(scratch) / target.name
            _run([compiler, "-shared", *objects, openmp, "-lm", "-o", str(finished)])
            finished.replace(target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def _openmp() -> str | None:
    """The OpenMP library in this process."""
    torch.get_num_threads()
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        file = line.split(maxsplit=5)[-1]
        if any(name in Path(file).name for name in ("libgomp", "libiomp5", "libomp")):
            return file
    return None


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.processor())
