"""Files that are written whole: a kill or a power cut leaves the old one or the new one, never a half."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, in UTF-8: temporary name, sync, rename, sync of the folder.

    Raises OSError, the file being as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write_synced(temporary, [text.encode()])
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write the parts (of bytes) one after another and sync; the file's size and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def size_and_digest(path: Path) -> tuple[int, str]:
    """What :func:`write_synced` gave for a file, from the file. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def sync(folder: Path) -> None:
    """Have the names in a folder reach the disk: a rename is only lasting after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
