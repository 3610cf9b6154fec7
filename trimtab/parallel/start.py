"""Joining the processes that a launcher started: what ``torchrun`` or a scheduler left in the environment."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trimtab.errors import InputError
from trimtab.parallel.world import World, enter

WAIT_S = 300.0
"""How long a process waits for the others to come."""


def launched() -> int:
    """How many processes the launcher says that there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str = "cpu") -> Iterator[World]:
    """Within it this process is one of those that the launcher started; alone where there is no launcher.

    Raises InputError for an environment that is incomplete, and where a process does not come.
    """
    size = launched()
    if size == 1:
        yield World()
        return
    rank = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    here = World(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=WAIT_S))
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise InputError(f"process {rank} of {size}: the others cannot be reached: {error}") from None
    before = enter(here)
    try:
        yield here
    finally:
        enter(before)
        dist.destroy_process_group()
