"""SHA-256 of what a run reads and writes: files, folders, models by folder or hub name.

A file's digest is that of its content, as ``sha256sum`` prints it. A folder's is the digest of the lines
``DIGEST  NAME`` of its files in the order of their names: what is in it and what it is called, not when.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

Kind = Literal["file", "folder", "model"]

BLOCK = 1 << 20
MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
"""What weights, configuration, tokenizer, chat template and a model's own code are written in."""
TEMPLATES = "additional_chat_templates"

_known: dict[tuple[str, int, int, int], str] = {}
"""Digests of this process by path, size, time of change and inode: a study's stages share their model."""


class Stopped(Exception):
    """Hashing was given up, since nobody waits for it any more."""


def file_digest(path: Path, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Of one file; what this process found before, if the file looks the same (see :func:`forget`).

    Raises OSError, and Stopped once ``stop`` says so.
    """
    about = path.stat()
    key = (str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino)
    if key in _known:
        return _known[key]
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(BLOCK):
            if stop():
                raise Stopped
            digest.update(block)
    _known[key] = digest.hexdigest()
    return _known[key]


def forget() -> None:
    """From here on every file is read again: damage to a disk changes no time of change."""
    _known.clear()


def combined(files: Mapping[str, str]) -> str:
    """The digest of a folder from those of its files."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def files_of(path: Path, kind: Kind) -> dict[str, Path]:
    """The files that count, by their names within ``path``: of a model those it is loaded from.

    Links are followed to files, not to folders. Hidden files do not count.
    """
    if path.is_file():
        return {path.name: path}
    if kind == "model":
        found = [p for p in path.iterdir() if p.suffix in MODEL_FILES and not p.name.startswith(".")]
        found += list((path / TEMPLATES).glob("*.jinja"))
    else:
        found = []
        for root, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(root) / name for name in names if not name.startswith(".")]
    return {p.relative_to(path).as_posix(): p for p in sorted(found) if p.is_file()}


def digests_of(
    path: Path, kind: Kind, *, stop: Callable[[], bool] = lambda: False
) -> tuple[str, dict[str, str]]:
    """The digest, and each file's. Raises OSError, also for what is not there, and Stopped."""
    files = files_of(path, kind)
    if not files and not path.exists():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    each = {name: file_digest(file, stop=stop) for name, file in files.items()}
    return (next(iter(each.values())) if path.is_file() else combined(each)), each


def fingerprint(path: str | Path) -> str | None:
    """SHA-256 of a file, or of all files of a folder with their names; None for what is not on this disk."""
    try:
        return digests_of(Path(path), "folder")[0]
    except OSError:
        return None


def hub_snapshot(
    name: str, revision: str, kind: Literal["models", "datasets"]
) -> tuple[Path | None, str | None]:
    """Where the local cache holds a hub name's files, and the commit that ``revision`` stood for.

    None for each that the cache does not tell. Nothing is downloaded.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or not re.fullmatch(r"[\w./-]+", revision):
        return None, None
    if ".." in (*name.split("/"), *revision.split("/")):
        return None, None
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"
    commit = revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None, None
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None, None
    snapshot = folder / "snapshots" / commit
    return (snapshot if snapshot.is_dir() else None), commit
