"""Which process computes which groups, and how what they found is put together again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate, group_tokens, microbatches
from trimtab.errors import NotFinite
from trimtab.groups import Group
from trimtab.models.tree_model import TreeModel
from trimtab.objectives.reduce import Reduction, count_of
from trimtab.parallel.world import world


@dataclass(frozen=True)
class Part:
    """One micro-batch of this process."""

    groups: list[Group]
    batch: TreeBatch
    idle: bool = False
    """Computed only so that every process makes as many passes; counts for nothing."""


def places_of(groups: Sequence[Group], size: int, *, evenly: bool = False) -> list[list[int]]:
    """Which groups each of ``size`` processes has: places in ``groups``, in order; the same in every process.

    Whole groups: the longest first to whoever has least tokens. ``evenly``: to whoever has the fewest groups,
    of these to whoever has least. A process has none where there are fewer groups than processes.
    """
    load, places = [0] * size, [list[int]() for _ in range(size)]
    for i in sorted(range(len(groups)), key=lambda i: -group_tokens(groups[i])):
        to = min(range(size), key=lambda rank: (evenly and len(places[rank]), load[rank], rank))
        load[to] += group_tokens(groups[i])
        places[to].append(i)
    return [sorted(own) for own in places]


def deal(groups: Sequence[Group], size: int) -> list[list[Group]]:
    """The groups dealt out to ``size`` processes, about as many tokens to each, in their order."""
    if size == 1:
        return [list(groups)]
    return [[groups[i] for i in own] for own in places_of(groups, size)]


def parts(
    lm: TreeModel,
    groups: Sequence[Group],
    max_tokens: int,
    *,
    divisible: bool = False,
    beside: TreeModel | None = None,
) -> Iterator[Part]:
    """This process's micro-batches of the groups, one at a time.

    Where the model's weights are spread over processes (``lm.spread``), every pass is one of all of them:
    then each process has as many micro-batches, the missing ones idle. ``beside``: a second model that the
    same micro-batches pass through, of which that may be true too.
    """
    here = world()
    cut = [
        microbatches(share, max_tokens, layout=lm.layout, divisible=divisible) if share else []
        for share in deal(groups, here.size)
    ]
    own = cut[here.rank]
    for part in own:
        yield Part(part, collate(part, layout=lm.layout, device=lm.device))
    if here.alone or not (lm.spread or (beside is not None and beside.spread)):
        return
    most = max(map(len, cut))
    if len(own) == most:
        return
    small = min((group for share in cut for part in share for group in part), key=group_tokens)
    for _ in range(most - len(own)):
        spare = [copy.deepcopy(small)]  # since a pass may write into what it reads
        yield Part(spare, collate(spare, layout=lm.layout, device=lm.device), idle=True)


def global_count(groups: Iterable[Group], reduction: Reduction, *, constant: int = 1) -> float:
    """``objectives.reduce.global_count`` of groups, which every process has: no message is sent."""
    tokens = responses = 0
    for response in (r for group in groups for r in group.responses):
        counted = len(response.tokens or ()) if response.mask is None else sum(response.mask)
        tokens, responses = tokens + counted, responses + (counted > 0)
    return count_of(tokens, responses, reduction, constant)


class Learner(Protocol):
    """What gradients are added up in: an optimiser."""

    def backward(self, loss: torch.Tensor, *, checked: bool = True) -> float:
        """Add this micro-batch's gradient; its loss. Raises NotFinite for one that is not, if ``checked``."""
        ...


class Sums:
    """The loss of one optimiser step and what is shown of it, added up over micro-batches and processes."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._shown: dict[str, float] = {}

    def backward(
        self, optimiser: Learner, loss: torch.Tensor, part: Part, shown: Mapping[str, float] | None = None
    ) -> None:
        """Add the gradient of a micro-batch's share of the loss, and sums of what is shown of it.

        Raises NotFinite in a world of one; in others :meth:`total` does, in every process alike.
        """
        alone = world().alone
        if part.idle:
            optimiser.backward(loss * 0.0, checked=False)
            return
        self._loss += optimiser.backward(loss, checked=alone)
        for key, value in (shown or {}).items():
            self._shown[key] = self._shown.get(key, 0.0) + value

    def total(self, count: float) -> tuple[float, dict[str, float]]:
        """The loss, and what is shown divided by ``count``; of all processes, and the same in all.

        Raises NotFinite for a loss that is not finite.
        """
        found = world().add({"": self._loss, **self._shown})
        loss = found.pop("")
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss}")
        return loss, {key: value / count for key, value in found.items()}


def put_together(own: Sequence[Part], groups: Sequence[Group], *fields: str) -> None:
    """Tell every process the per-token numbers that each found of its own groups' responses.

    Each field of ``groups``' responses is a list of numbers, or None (which stays). The parts'
    groups may be cut: their responses are those of ``groups``.
    """
    here = world()
    if here.alone:
        return
    computed = {id(r) for part in own if not part.idle for group in part.groups for r in group.responses}
    responses = [r for group in groups for r in group.responses]
    places = [i for i, r in enumerate(responses) if id(r) in computed]
    for field in fields:
        mine = {i: row for i in places if (row := getattr(responses[i], field)) is not None}
        for i, row in _of_all(mine).items():
            if i not in mine:
                setattr(responses[i], field, row)


def _of_all(own: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Rows of numbers by their place, of every process. Lengths travel too: a mask may make rows shorter."""
    here = world()
    found: dict[int, list[float]] = {}
    sizes = here.gather([[i, len(row)] for i, row in own.items()])
    flat = torch.tensor([value for row in own.values() for value in row], dtype=torch.float64)
    for places, values in zip(sizes, here.gather_floats(flat), strict=True):
        rows = values.split([length for _, length in places])
        found |= {i: row.tolist() for (i, _), row in zip(places, rows, strict=True)}
    return found


@torch.no_grad()
def numbers(
    lm: TreeModel,
    groups: Sequence[Group],
    max_tokens: int,
    find: Callable[[Part], Sequence[Sequence[float]]],
    *,
    divisible: bool = False,
    beside: TreeModel | None = None,
) -> list[list[float]]:
    """What ``find`` measures of each response, in the order of groups and responses; in every process.

    ``find`` gives one list of numbers for each response of a micro-batch, in order; no gradients. The other
    arguments are those of :func:`parts`.
    """
    measured: dict[int, Sequence[float]] = {}
    for part in parts(lm, groups, max_tokens, divisible=divisible, beside=beside):
        rows = find(part)
        if not part.idle:
            of_part = (r for group in part.groups for r in group.responses)
            measured |= {id(r): row for r, row in zip(of_part, rows, strict=True)}
    responses = [r for group in groups for r in group.responses]
    own = {i: measured[id(r)] for i, r in enumerate(responses) if id(r) in measured}
    if world().alone:
        return [list(own[i]) for i in range(len(responses))]
    found = _of_all(own)
    return [found[i] for i in range(len(responses))]
