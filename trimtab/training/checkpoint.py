"""Checkpoints on disk: written whole, checked before they are believed, thinned out.

    checkpoints/step-00000100/
      tensors.safetensors   weights, moments, the generator's state
      state.json            everything else
      checksums.json        size and SHA-256 of both, the step and its metrics, and a digest of itself

Where weights are sharded over processes each writes the rows that it holds, as
``tensors-00001-of-00004.safetensors`` and so on; checksums.json has the digest of each of these files, and
says how many rows of each tensor each of them has.

A name that begins with a dot is no checkpoint: one being written, replaced or removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.parallel.world import World
from trimtab.registry.files import size_and_digest, sync, write_synced
from trimtab.training.pieces import Stored, row_counts, together

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
    spread: bool = False
    """Of a sharded run: ``tensors`` are what this process writes, and every process writes some."""
    places: dict[str, list[int]] = field(default_factory=dict)
    """Of each tensor that is a piece: its first row in the whole, and the one behind its last."""

    def copied(self) -> Snapshot:
        """The same with tensors of its own, in main memory: training may go on while they are written."""
        own = {name: t.detach().to("cpu", copy=True) for name, t in self.tensors.items()}
        return replace(self, tensors=own)

    @property
    def size(self) -> int:
        """Bytes that this process writes, but for a few."""
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


def piece_name(number: int, count: int) -> str:
    """Of the file with the pieces of process ``number``, from 1, of ``count`` that write some."""
    return f"tensors-{number:05d}-of-{count:05d}.safetensors"


def tensor_files(count: int, counts: Mapping[str, Any] | None) -> list[str]:
    """The names of a checkpoint's ``count`` files of tensors, in order; ``counts``: see checksums.json."""
    return [TENSORS] if counts is None else [piece_name(n + 1, count) for n in range(count)]


def write(folder: Path, snapshot: Snapshot, here: World | None = None) -> Path:
    """Write ``folder/step-N``: temporary name, sync, rename, sync. One that stands there is replaced.

    ``here``: the processes that write a snapshot that is spread, all of which call this; what fails in one
    is raised in all. Raises OSError, having removed what it wrote.
    """
    here = here or World()
    target = folder / folder_name(snapshot.step)
    temporary = folder / f".{target.name}.partial"
    try:
        if here.first:
            sweep(folder)
        together(here, (lambda: temporary.mkdir(parents=True)) if here.first else _nothing)
        writers = [rank for rank, some in enumerate(here.gather(bool(snapshot.tensors))) if some]
        names = tensor_files(len(writers), snapshot.places if snapshot.spread else None)
        written = together(here, lambda: _own_file(temporary, names, writers, snapshot, here))
        together(here, (lambda: _complete(temporary, target, snapshot, written)) if here.first else _nothing)
    except OSError:
        if here.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if here.first:
        sweep(folder)
    return target


def _nothing() -> None:
    return None


def _own_file(
    temporary: Path, names: list[str], writers: list[int], snapshot: Snapshot, here: World
) -> list[Any]:
    """Write this process's file: its name, its size and SHA-256, and the places of the pieces in it."""
    if snapshot.spread and here.rank not in writers:
        return []
    name = names[writers.index(here.rank)] if snapshot.spread else TENSORS
    return [name, write_synced(temporary / name, tensor_file(snapshot.tensors)), snapshot.places]


def _complete(temporary: Path, target: Path, snapshot: Snapshot, written: list[list[Any]]) -> None:
    """All else that a checkpoint has, and its name. ``written``: what each process wrote of it."""
    written = [one for one in written if one]
    files = {name: found for name, found, _ in written}
    for name, (size, _), _ in written:
        if snapshot.spread and (not (file := temporary / name).exists() or file.stat().st_size != size):
            raise OSError(f"{name} is not seen by process 0: run.out has to be one folder for all processes")
    files[PLAIN] = write_synced(temporary / PLAIN, [snapshot.plain.encode()])
    values: dict[str, Any] = {"step": snapshot.step, "metrics": snapshot.metrics, "files": files}
    if snapshot.spread:
        values["rows"] = row_counts([places for *_, places in written])
    write_synced(temporary / SUMS, [sealed(values)])
    sync(temporary)
    if target.exists():
        # Renamed, not deleted: a kill in between leaves no half of it under a name that counts.
        os.rename(target, target.with_name(f".{target.name}.replaced"))
    os.rename(temporary, target)
    sync(target.parent)


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
        counts, count = values.get("rows"), len(values["files"]) - 1
        whole = counts is None or all(
            len(rows) == count and min(rows) >= 0 and set(map(type, rows)) == {int}
            for rows in counts.values()
        )
        names = {*tensor_files(count, counts), PLAIN}
        if sealed(values) != raw or values["files"].keys() != names or not whole:
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


def verify(checkpoint: Path, here: World | None = None) -> dict[str, Any]:
    """Read every byte and compare; what checksums.json holds. Raises Damaged for the first that differs.

    ``here``: processes that all call this, read a share of the files each, and all raise the same.
    """
    here = here or World()
    values: dict[str, Any] = {}
    place, why = -1, ""
    try:
        values = contents(checkpoint)
        for place, (name, recorded) in enumerate(values["files"].items()):
            if place % here.size == here.rank:
                _compare(checkpoint / name, *recorded)
    except Damaged as error:
        why = str(error)
    told = [(*found, rank) for rank, found in enumerate(here.gather((place, why))) if found[1]]
    if told:
        place, why, rank = min(told)
        alone = place < 0 and len(told) < here.size
        raise Damaged(f"{why}, as process {rank} sees it" if alone else why)
    return values


def _compare(file: Path, size: int, digest: str) -> None:
    try:
        found = file.stat().st_size
        if found != size:
            raise Damaged(f"{file.name}: {found:,} of {size:,} bytes")
        if size_and_digest(file) != (size, digest):
            raise Damaged(f"{file.name}: checksum")
    except FileNotFoundError:
        raise Damaged(f"{file.name}: missing") from None
    except OSError as error:
        raise Damaged(f"{file.name}: {error.strerror}") from None


def stored(checkpoint: Path, like: Callable[[str], torch.Tensor | None] = lambda name: None) -> Stored:
    """A checkpoint's tensors, to be used in a ``with``; ``like``: what each will be copied into, if known.

    Raises OSError and SafetensorError where they cannot be read, Damaged for a checkpoint without a list.
    """
    if (checkpoint / TENSORS).exists():
        return Stored([checkpoint / TENSORS], {}, like)
    values = contents(checkpoint)
    counts = values.get("rows")
    names = tensor_files(len(values["files"]) - 1, counts)
    return Stored([checkpoint / name for name in names], counts or {}, like)


def newest_good(folder: Path, here: World | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and the damaged ones newer than it, each with the reason.

    None where there is no checkpoint at all. ``here``: processes that all call this and get the same. Raises
    InputError where there are some checkpoints, and none is whole.
    """
    here = here or World()
    damaged: dict[Path, str] = {}
    for name in here.agreed([p.name for p in reversed(checkpoints(folder))]):
        try:
            verify(folder / name, here)
        except Damaged as why:
            damaged[folder / name] = str(why)
        else:
            return folder / name, damaged
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
