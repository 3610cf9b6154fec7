"""Tensors whose rows are spread over processes: the piece that each writes, and how pieces are read again.

A tensor of a model that is sharded is a ``DTensor``: each process holds some rows, cut as ``torch.chunk``
cuts them, so the last ones may have fewer or none. Nothing needs the whole of one, but for :func:`gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from trimtab.parallel.world import World, world

T = TypeVar("T")


def together(here: World, act: Callable[[], T]) -> list[T]:
    """``act()`` in every process; what each gave (something that JSON holds), in order of rank.

    Raises OSError in all where it failed in one; that one raises what it met, if that was no OSError.
    """
    if here.alone:
        return [act()]
    gave: Any = None
    reason, fault = "", None
    try:
        gave = act()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    except Exception as error:  # the others wait to hear of it
        reason, fault = f"{type(error).__name__}: {error}", error
    found = here.gather([reason, gave])
    if fault is not None:
        raise fault
    for rank, (why, _) in enumerate(found):
        if why:
            raise OSError(f"process {rank}: {why}")
    return [gave for _, gave in found]


def is_spread(tensor: torch.Tensor | None) -> bool:
    """Each process holds some of its rows."""
    return isinstance(tensor, DTensor) and any(not p.is_replicate() for p in tensor.placements)


def rows_of(tensor: DTensor) -> tuple[int, int, bool]:
    """The first row that this process holds, the one behind the last, and whether it writes them.

    Of several processes that hold the same rows the first does.
    """
    rows = tensor.shape[0]
    begin, end, writes, cut = 0, rows, True, False
    for dim, placement in enumerate(tensor.placements):
        place = tensor.device_mesh.get_local_rank(dim)
        if placement.is_replicate():
            writes &= place == 0
        elif placement.is_shard(0) and not cut:
            size = -(-rows // tensor.device_mesh.size(dim))
            begin, end, cut = min(rows, size * place), min(rows, size * (place + 1)), True
        else:
            raise ValueError(f"rows alone are spread here, once; found {tensor.placements}")
    held = len(tensor.to_local())
    assert held == end - begin, f"{held} rows instead of {begin} to {end} of {tuple(tensor.shape)}"
    return begin, end, writes


def own_pieces(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """What this process writes of them, and of each that is spread where its rows begin and end.

    What every process holds whole is written by the first.
    """
    own: dict[str, torch.Tensor] = {}
    places: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor) or not is_spread(tensor):
            if world().first:
                own[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            continue
        begin, end, writes = rows_of(tensor)
        if writes and (begin < end or not tensor.shape[0]):
            own[name], places[name] = tensor.to_local(), [begin, end]
    return own, places


def row_counts(places: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """How many rows of each spread tensor each file has, from where those of each begin and end.

    Raises OSError where they leave a row out, or have it twice.
    """
    counts: dict[str, list[int]] = {}
    reached: dict[str, int] = {}
    for number, held in enumerate(places):
        for name, (begin, end) in held.items():
            if reached.get(name, 0) != begin:
                raise OSError(f"{name}: row {begin} follows row {reached.get(name, 0)}")
            counts.setdefault(name, [0] * len(places))[number] = end - begin
            reached[name] = end
    return counts


class Stored(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors, each read when it is asked for: whole, or the rows that this process holds.

    Raises OSError and SafetensorError when one is read. Its files are open within a ``with``.
    """

    def __init__(
        self,
        files: Sequence[Path],
        counts: Mapping[str, Sequence[int]],
        like: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> None:
        """``counts``: of each spread tensor the rows in each file; any other is whole in the first.

        ``like``: what a tensor will be copied into, if known. Where that is spread here, so is what is read.
        """
        self._paths, self._counts, self._like = list(files), counts, like
        self._open: dict[int, Any] = {}
        self._stack = ExitStack()
        plain = self._file(0).keys()
        self._names = {*plain, *counts}

    def _file(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = self._stack.enter_context(safe_open(self._paths[number], framework="pt"))
        return self._open[number]

    def _parts(self, name: str) -> list[tuple[int, int]]:
        """Files and numbers of rows; −1: all."""
        if name not in self._counts:
            return [(0, -1)]
        parts = [(number, rows) for number, rows in enumerate(self._counts[name]) if rows]
        return parts or [(0, 0)]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        parts = self._parts(name)
        target = self._like(name)
        if not isinstance(target, DTensor) or not is_spread(target):
            return self._rows(name, parts, 0, None)
        rest = self._file(parts[0][0]).get_slice(name).get_shape()
        rows = sum(rows for _, rows in parts) if name in self._counts else (rest or [0])[0]
        if [rows, *rest[1:]] != list(target.shape):
            return self._rows(name, parts, 0, None)  # whoever copies it says that it does not fit
        begin, end, _ = rows_of(target)
        return DTensor.from_local(
            self._rows(name, parts, begin, end),
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )

    def _rows(self, name: str, parts: Sequence[tuple[int, int]], begin: int, end: int | None) -> torch.Tensor:
        """Rows ``begin`` to ``end`` (None: all), from the files that have some of them."""
        if len(parts) == 1:
            file = self._file(parts[0][0])
            whole: torch.Tensor = file.get_tensor(name) if end is None else file.get_slice(name)[begin:end]
            return whole
        end = sum(rows for _, rows in parts) if end is None else end
        found: list[torch.Tensor] = []
        first = 0
        for number, rows in parts:
            low, high = max(begin, first) - first, min(end, first + rows) - first
            if low < high or (begin == end and not found):
                found.append(self._file(number).get_slice(name)[max(0, low) : max(0, high)])
            first += rows
        return torch.cat(found) if len(found) > 1 else found[0]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Beneath(Mapping[str, torch.Tensor]):
    """Those whose names begin with a prefix, by what follows it; read when asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        begin = len(self._prefix)
        return (name[begin:] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def gathered(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor whole in the first process, in ``dtype``; the others keep nothing. Collective.

    Those that are spread are gathered one at a time and moved to main memory: never more than one beside
    what is kept.
    """
    first = world().first
    kept: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in tensors:
        if (twin := names.setdefault(id(tensor), name)) != name:
            if first:
                kept[name] = kept[twin]
            continue
        value = tensor.detach()
        value = value if dtype is None else value.to(dtype)
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if first else value
        if first:
            kept[name] = value
    return kept
