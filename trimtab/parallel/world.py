"""The processes of a run and what they tell each other, as numbers and JSON: nothing is unpickled.

Everything here is collective: every process of the world calls it, in the same order. In a world of one it
costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

FOR_EVER = timedelta(days=30)
"""A message between processes waits as long as they live, which the watch knows and a clock does not."""
BUCKET_BYTES = 64 * 2**20
"""Gradients that are added up in one message."""


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this is number ``rank``."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """This process among those of its machine."""
    local_size: int = 1
    group: Any = None
    """The processes' group for these messages; None is the default one."""

    @property
    def first(self) -> bool:
        """Of all processes, the one that writes files and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """There is no other process."""
        return self.size == 1

    def apart(self) -> World:
        """The same processes with messages of their own, so that a thread may send beside the main one."""
        if self.alone:
            return self
        group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        return World(self.rank, self.size, self.local_rank, self.local_size, group)

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """What every process gave, in order of rank."""
        if self.alone:
            return [mine]
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        if mine:
            padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        if longest:
            dist.all_gather(found, padded, group=self.group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(found, sizes, strict=True)]

    def gather(self, value: T) -> list[T]:
        """What every process gave, in order of rank; anything that JSON holds (tuples come back as lists)."""
        if self.alone:
            return [value]
        return [json.loads(part) for part in self.gather_bytes(json.dumps(value).encode())]

    def gather_floats(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every process's numbers, fp64 ``[·]`` on the CPU; their lengths may differ."""
        if self.alone:
            return [mine.double().cpu()]
        raw = mine.detach().double().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return [
            torch.frombuffer(bytearray(part), dtype=torch.float64) if part else torch.zeros(0).double()
            for part in self.gather_bytes(raw)
        ]

    def agreed(self, value: T) -> T:
        """The first process's value, for what each would find for itself (a clock, a measurement)."""
        return self.gather(value if self.first else None)[0] if not self.alone else value  # type: ignore[return-value]

    def found_first(self, find: Callable[[], T]) -> T:
        """``find()`` of the first process alone, told to all."""
        return self.agreed(find() if self.first else None)  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return any(self.gather(bool(flag)))

    def add(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over processes, name by name, in order of rank: the same bits everywhere."""
        if self.alone:
            return dict(values)
        total: dict[str, float] = {}
        for part in self.gather({key: float(value) for key, value in values.items()}):
            for key, value in part.items():
                total[key] = total.get(key, 0.0) + value
        return total

    def add_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum each over processes, in place; they have the same shapes everywhere."""
        if self.alone:
            return
        bucket: list[torch.Tensor] = []
        held = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if bucket and (held + size > BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
                self._add(bucket)
                bucket, held = [], 0
            bucket.append(tensor)
            held += size
        self._add(bucket)

    def _add(self, bucket: Sequence[torch.Tensor]) -> None:
        if not bucket:
            return
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=self.group)
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=self.group)
        begin = 0
        for tensor in bucket:
            tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(0)


_WORLD = World()


def world() -> World:
    """The processes that this one belongs to: itself alone, unless ``parallel/start.py`` joined others."""
    return _WORLD


def enter(new: World) -> World:
    """Make it this process's world; the one before."""
    global _WORLD
    before, _WORLD = _WORLD, new
    return before
