"""Where a run comes from: fingerprints of what went into it, and what it ran on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def surroundings() -> dict[str, Any]:
    """Versions and hardware, for the lineage."""
    packages: dict[str, str | None] = {}
    for name in ("trimtab", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "packages": packages,
        "python": platform.python_version(),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "device": device},
        "threads": torch.get_num_threads(),
    }


def fingerprint(path: str | Path) -> str | None:
    """SHA-256 of a file, or of all files of a folder with their names; None for what is not on this disk."""
    path = Path(path)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
