"""How FSDP2 gathers weights and sums gradients on CPUs: in memory that goes back, and in place.

A layer's buffers come and go with every pass. From the C allocator, which by ``trimtab.cli.launch`` gives
nothing back, they leave holes that other tensors settle in, so that resident memory climbs from step to step.
And gloo's own gather and reduce-scatter work on copies of what they are given, in memory of its threads.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
import torch.distributed as dist


def apart(size: Sequence[int | torch.SymInt], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory of its own, which the system has back the moment that it is freed; zeros."""
    numbers = math.prod(int(n) for n in size)
    if not numbers:
        return torch.empty(*size, dtype=dtype)
    memory = mmap.mmap(-1, numbers * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # else most of its time is spent on faults
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numbers).view(*(int(n) for n in size))


class _Apart:
    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A buffer of the CPU's."""
        assert device.type == "cpu"
        return apart(size, dtype)


class Gather(_Apart):
    """All-gather around a ring: each process passes on to the next one what it got last."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Return when it is done, whatever ``async_op``."""
        size, rank = group.size(), group.rank()
        pieces = output_tensor.view(size, -1)
        if pieces[rank].data_ptr() != input_tensor.data_ptr():
            pieces[rank].copy_(input_tensor)
        if not input_tensor.numel():
            return
        for turn in range(size - 1):
            own, next_one = pieces[(rank - turn) % size], pieces[(rank - turn - 1) % size]
            sending = dist.isend(own, group=group, group_dst=(rank + 1) % size)
            coming = dist.irecv(next_one, group=group, group_src=(rank - 1) % size)
            for work in (coming, sending):
                assert work is not None
                work.wait()


class ReduceScatter(_Apart):
    """Sums in every process, in the very buffer that was given, of which each keeps its piece.

    gloo's own sends as much and sums in the same order, in a copy.
    """

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Return when it is done, whatever ``async_op``; ``input_tensor`` is written over."""
        dist.all_reduce(input_tensor, op=op, group=group)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()].view_as(output_tensor))
