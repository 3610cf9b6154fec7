"""Checkpoints on disk: written whole, checked before they are believed, thinned out.

    checkpoints/step-00000100/
      tensors.safetensors   weights, moments, the generator's state
      state.json            everything else
      checksums.json        size and SHA-256 of both, the step and its metrics, and a digest of itself

A name that begins with a dot is no checkpoint: one being written, replaced or removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.registry.files import size_and_digest, sync, write_synced

FORMAT = 2
"""1 had no checksums."""
TENSORS, PLAIN, SUMS = "tensors.safetensors", "state.json", "checksums.json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that the safetensors format gives to dtypes."""


class Damaged(Exception):
    """Why a checkpoint is not to be believed: the file, and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds."""

    step: int
    tensors: dict[str, torch.Tensor]
    plain: str
    """The text of state.json."""
    metrics: dict[str, Any]
    """What was logged of this very step; a checkpoint that is the best by a metric is found by it."""

    def copied(self) -> Snapshot:
        """The same with tensors of its own, in main memory: training may go on while they are written."""
        own = {name: t.detach().to("cpu", copy=True) for name, t in self.tensors.items()}
        return replace(self, tensors=own)

    @property
    def size(self) -> int:
        """Bytes on the disk, but for a few."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + len(self.plain)


def folder_name(step: int) -> str:
    """The name of the checkpoint taken after ``step`` updates."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The inverse of :func:`folder_name`."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint, oldest first, whether whole or damaged."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write ``folder/step-N``: temporary name, sync, rename, sync. One that stands there is replaced.

    Raises OSError, having removed what it wrote.
    """
    target = folder / folder_name(snapshot.step)
    temporary = folder / f".{target.name}.partial"
    sweep(folder)
    try:
        temporary.mkdir(parents=True)
        files = {
            TENSORS: write_synced(temporary / TENSORS, tensor_file(snapshot.tensors)),
            PLAIN: write_synced(temporary / PLAIN, [snapshot.plain.encode()]),
        }
        values = {"step": snapshot.step, "metrics": snapshot.metrics, "files": files}
        write_synced(temporary / SUMS, [sealed(values)])
        sync(temporary)
        if target.exists():
            # Renamed, not deleted: a kill in between leaves no half of it under a name that counts.
            os.rename(target, folder / f".{target.name}.replaced")
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)
    sweep(folder)
    return target


def remove(found: Iterable[Path]) -> None:
    """Delete checkpoints of one folder, each out of sight first. Raises OSError where that is not allowed."""
    gone = [(old, old.with_name(f".{old.name}.removed")) for old in found]
    for old, hidden in gone:
        os.rename(old, hidden)
    if gone:
        sync(gone[0][0].parent)
    for _, hidden in gone:
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what a killed save or removal left behind."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def tensor_file(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in parts: it is hashed as it is written, without a copy and outside Python's lock.

    The library's writer does one or more of these otherwise, depending on its version.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all aligned
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if flat.size:
            yield flat.data


def sealed(values: dict[str, Any]) -> bytes:
    """checksums.json with a digest of itself: there is one way to write it, and any other is damage."""
    body = {"format": FORMAT, **values}
    body = json.loads(json.dumps(body))  # as it will be read: tuples are lists
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def contents(checkpoint: Path) -> dict[str, Any]:
    """checksums.json, itself checked; the files it speaks of are not. Raises Damaged."""
    try:
        raw = (checkpoint / SUMS).read_bytes()
    except FileNotFoundError:
        raise Damaged(_without_sums(checkpoint)) from None
    except OSError as error:
        raise Damaged(f"{SUMS}: {error.strerror}") from None
    try:
        values = json.loads(raw)
        if isinstance(values.get("format"), int) and values["format"] != FORMAT:
            raise Damaged(f"format {values['format']} is not the {FORMAT} read here")
        del values["sha256"]
        if sealed(values) != raw or values["files"].keys() != {TENSORS, PLAIN}:
            raise Damaged(f"{SUMS}: checksum")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise Damaged(f"{SUMS}: checksum") from None
    if values["step"] != step_of(checkpoint):
        raise Damaged(f"it is that of step {values['step']}")
    return values


def _without_sums(checkpoint: Path) -> str:
    try:
        number = json.loads((checkpoint / PLAIN).read_bytes())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        number = FORMAT
    return f"{SUMS}: missing" if number == FORMAT else f"format {number} is not the {FORMAT} read here"


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every byte and compare; what checksums.json holds. Raises Damaged for the first that differs."""
    values = contents(checkpoint)
    for name, (size, digest) in values["files"].items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise Damaged(f"{name}: {found:,} of {size:,} bytes")
            if size_and_digest(checkpoint / name) != (size, digest):
                raise Damaged(f"{name}: checksum")
        except FileNotFoundError:
            raise Damaged(f"{name}: missing") from None
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
    return values


def newest_good(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and the damaged ones newer than it, each with the reason.

    None where there is no checkpoint at all. Raises InputError where there are some, and none is whole.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except Damaged as why:
            damaged[checkpoint] = str(why)
        else:
            return checkpoint, damaged
    if not damaged:
        return None, {}
    what = ", ".join(f"{checkpoint.name} ({why})" for checkpoint, why in damaged.items())
    raise InputError(
        f"{folder}: no checkpoint is whole: {what}; "
        "put a copy of one back, or remove that folder to begin anew"
    )


def surplus(steps: Iterable[int], keep: int, every: int, best: str, values: dict[int, float]) -> set[int]:
    """Which of the steps' checkpoints to delete.

    The newest ``keep`` stay, the multiples of ``every`` (0: none), and with ``best`` (a metric's name, after
    a minus where lower is better) the one with the best of ``values``, the earliest of equals.
    """
    known = sorted(steps)
    stay = set(known[-keep:]) | {step for step in known if every and step % every == 0}
    sign = -1 if best.startswith("-") else 1
    if best and (ranked := [step for step in known if math.isfinite(values.get(step, math.nan))]):
        stay.add(max(ranked, key=lambda step: (sign * values[step], -step)))
    return set(known) - stay
