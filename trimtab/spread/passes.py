"""Passes of models whose weights are spread: each is one of all processes, unless these are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn

from trimtab.errors import InputError
from trimtab.models.shards import local, reshard, spread_modules
from trimtab.models.tree_model import TreeModel
from trimtab.parallel.rule import gathers_whole
from trimtab.parallel.world import World, world
from trimtab.spread.heard import Heard, first_failure
from trimtab.training.memory import available_bytes

FROZEN_PASSES = 256
"""Passes of a frozen model after which what FSDP2 notes of each for a backward pass is thrown away."""
NONE = 1 << 30
"""Announced by a process that has no pass left to make."""


class Passes:
    """The passes of one model."""

    def __init__(self, root: nn.Module, trunk: nn.Module, device: torch.device) -> None:
        self.root, self.trunk, self.device = root, trunk, device
        self.inside = False
        """A call of the root is under way; its trunk's is part of it."""
        self.phase: _Phase | None = None
        """The phase in which processes make passes of their own; see :func:`local_passes`."""
        self.gathered = False
        self._made = 0

    def enter(self) -> None:
        """A call of the root begins."""
        self._announce()
        self.inside = True

    def leave(self) -> None:
        """It has ended."""
        self.inside = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """A call of the trunk alone."""
        self._announce()
        try:
            yield
        except BaseException:
            # FSDP2 is in the middle of a pass that will not go on.
            self.root.reset_iter_state()  # type: ignore[operator]
            raise

    def _announce(self) -> None:
        if self.phase is not None:
            self.phase.announce(self)
        elif not self.gathered and not any(p.requires_grad for p in self.root.parameters()):
            self._made += 1
            if self._made % FROZEN_PASSES == 0:
                self.root.reset_iter_state()  # type: ignore[operator]

    @torch.no_grad()
    def idle(self) -> None:
        """Take part in a pass of another process."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.trunk(input_ids=one, use_cache=False)


class _Phase:
    """Processes make passes when they have some to make: each is announced, and all take part in it."""

    def __init__(self, models: list[Passes], here: World) -> None:
        self.models, self.here = models, here
        self._joining = False

    def announce(self, passes: Passes) -> None:
        """Return when it is this model's turn, having taken part in what others make before."""
        if not self._joining:
            self._until(self.models.index(passes))

    def end(self) -> None:
        """Take part until no process has any left."""
        self._until(NONE)

    def _until(self, wanted: int) -> None:
        while (turn := self._first(wanted)) != wanted:
            self._joining = True
            try:
                self.models[turn].idle()
            finally:
                self._joining = False

    def _first(self, wanted: int) -> int:
        found = torch.tensor([wanted])
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.here.group)
        return int(found)


@contextmanager
def local_passes(*models: TreeModel, gather: str = "") -> Iterator[None]:
    """Within it each process passes its own groups through the models, as often as it likes; no gradients.

    A model that is not spread needs nothing for it. Of one that is, the whole weights are gathered for as
    long ("whole"), or every pass is one of all processes, announced, in which those that have none of their
    own take part ("layers"). ``gather``: which; left out, the run's option ``parallel.gather``.

    Collective, at its beginning and its end; within another phase of the same models it is nothing. Raises
    ``Heard`` at its beginning where another process failed in its share of the work before it came here.
    """
    # Within such a phase of theirs there is nothing to do, and the others may not be here.
    spread = [lm for lm in models if lm.spread and not lm.passes.gathered and lm.passes.phase is None]
    if not spread:
        yield
        return
    if (failed := first_failure(world(), None)) is not None:
        raise Heard(failed[1])
    with ExitStack() as closing, torch.no_grad():
        apart = []
        for lm in spread:
            if _whole(lm, gather):
                closing.enter_context(gathered(lm))
            else:
                apart.append(lm.passes)
        if not apart:
            yield
            return
        phase = _Phase(apart, world())
        for passes in apart:
            passes.phase = phase
        try:
            try:
                yield
            except InputError:
                phase.end()  # it came between passes: the others' go on, and are told afterwards
                raise
            phase.end()
        finally:
            for passes in apart:
                passes.phase = None
                reshard(passes.root)


@contextmanager
def gathered(lm: TreeModel) -> Iterator[None]:
    """Every process holds the whole weights meanwhile; a pass, without gradient, sends no message."""
    modules = spread_modules(lm.model)
    reshard(lm.model)
    lm.passes.gathered = True
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in modules[1:]:
            module.set_reshard_after_forward(True, recurse=False)
        lm.passes.gathered = False
        reshard(lm.model)


def _whole(lm: TreeModel, asked: str) -> bool:
    assert lm.holder is not None
    how = asked or lm.holder.gather
    if how != "auto":
        return how == "whole"
    reshard(lm.model)
    count = sum(p.numel() for p in lm.model.parameters())
    learns = [p for p in lm.model.parameters() if p.requires_grad]
    # Once in a run, and kept over its sittings: other kernels read whole weights, and round otherwise.
    key = f"{type(lm).__name__} {count} {'learns' if learns else 'frozen'} {lm.dtype}"
    if key not in lm.holder.chosen:
        # Decided before the first step, which makes gradients and two moments.
        coming = 3 * sum(local(p).numel() * p.element_size() for p in learns)
        free = free_bytes(lm.device)
        found = world().gather(None if free is None else free - coming)
        fits = all(gathers_whole(count * lm.dtype.itemsize, one) for one in found)
        lm.holder.chosen[key] = "whole" if fits else "layers"
    return lm.holder.chosen[key] == "whole"


def free_bytes(device: torch.device) -> int | None:
    """What this process can take on its device, its share of a machine's; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = available_bytes()
    return None if free is None else free // world().local_size
