"""Seconds that this process spends in messages to others, call by call."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

CALLS = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast", "barrier"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
)
"""What ``trimtab.parallel`` and FSDP2 send by; those of them that this PyTorch has."""


class Messages:
    """Within :meth:`timed`, ``seconds`` grows by one entry a call, in the order of the calls.

    Only those of the thread that began, the outermost of nested ones; the wait for a message that was sent
    without waiting is a call of its own. Every process makes the same calls in the same order.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._inside = False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Until its end, calls are timed."""
        self._thread = threading.get_ident()
        places: list[tuple[Any, str]] = [(dist, name) for name in CALLS if hasattr(dist, name)]
        places.append((dist.Work, "wait"))
        kept = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, call in kept:
            setattr(place, name, self._wrapped(call))
        try:
            yield
        finally:
            for place, name, call in kept:
                setattr(place, name, call)

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            if self._inside or threading.get_ident() != self._thread:
                return call(*given, **named)
            self._inside = True
            began = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                self._inside = False
                self.seconds.append(time.perf_counter() - began)

        return timed
