"""How groups of any lengths are cut into micro-batches: what ``data/collate.py`` does, without tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import InputError
from trimtab.planning.job import Batch, Layout
from trimtab.planning.numbers import Number, floor, largest, smallest

Lengths = Sequence[tuple[int, Sequence[int]]]
"""Of each group the prompt's tokens and each response's."""
Recompute = Literal["none", "some", "all"]
MOST_STEPS = 256
"""Steps that are cut, at most, to find the mean and the fullest of a run."""


def forward_times(layers: Number, recompute: Recompute = "none") -> Number:
    """How many micro-batches a pass without gradient takes at once (``training/recompute.py``)."""
    return 1 if recompute != "none" else smallest(8, largest(1, floor(layers / 2)))


@dataclass(frozen=True, slots=True)
class Micro:
    """One micro-batch, as it is laid out."""

    tokens: int
    """Padding counted."""
    targets: int
    rows: int
    scores: float


def cut(lengths: Lengths, budget: int, *, layout: Layout, divisible: bool) -> list[Micro]:
    """The micro-batches of these groups, as ``data/collate.py`` makes them.

    Raises InputError for a tree over the budget that may not be cut.
    """
    trees = [(prompt, list(parts)) for prompt, parts in lengths]
    if divisible:
        trees = [tree for prompt, parts in trees for tree in _spread(prompt, parts, budget, layout)]
    trees.sort(key=lambda tree: -_size(tree[0], tree[1], layout))
    parts: list[list[tuple[int, list[int]]]] = []
    rows = width = 0
    for tree in trees:
        size = _size(tree[0], tree[1], layout)
        own = len(tree[1]) if layout == "plain" else 1
        if size > budget:
            raise InputError(
                f"one group needs {size} tokens but train.micro_batch_tokens is {budget}; raise it to at "
                f"least {size}, or shorten the data (data.max_prompt_tokens, data.max_tokens)"
            )
        if layout == "packed":
            if not parts or width + size > budget:
                parts.append([])
                width = 0
            width += size
        else:
            widest = max(width, size // own)
            if not parts or (rows + own) * widest > budget:
                parts.append([])
                rows, widest = 0, size // own
            rows, width = rows + own, widest
        parts[-1].append(tree)
    return [_micro(part, layout) for part in parts]


def _spread(prompt: int, parts: list[int], budget: int, layout: Layout) -> list[tuple[int, list[int]]]:
    trees: list[list[int]] = [[]]
    for part in parts:
        if trees[-1] and _size(prompt, [*trees[-1], part], layout) > budget:
            trees.append([])
        trees[-1].append(part)
    return [(prompt, tree) for tree in trees]


def _size(prompt: int, parts: Sequence[int], layout: Layout) -> int:
    if layout == "plain":
        return (prompt + max(parts)) * len(parts)
    return prompt + sum(parts)


def _micro(trees: Lengths, layout: Layout) -> Micro:
    if layout == "plain":
        trees = [(prompt, [part]) for prompt, parts in trees for part in parts]
    sizes = [prompt + sum(parts) for prompt, parts in trees]
    targets = sum(sum(parts) for _, parts in trees)
    if layout == "packed":
        seen = sum(_triangle(p) + sum(_triangle(n) + n * p for n in parts) for p, parts in trees)
        return Micro(sum(sizes), targets, 1, seen)
    width = max(sizes)
    # A mask that is more than causal has every pair computed.
    masked = min(sizes) < width or any(len(parts) > 1 for _, parts in trees)
    tokens = width * len(sizes)
    return Micro(tokens, targets, len(sizes), tokens * width if masked else len(sizes) * _triangle(width))


def _triangle(n: int) -> float:
    return n * (n + 1) / 2


def batch_over(
    steps: Sequence[Sequence[Lengths]],
    *,
    micro_batch_tokens: int,
    layout: Layout,
    divisible: bool,
    layers: int,
    recompute: Recompute = "none",
    forward: Sequence[Lengths] = (),
) -> Batch:
    """Means over these steps, with the fullest micro-batch of all of them.

    A step is one list of groups, or several that are cut apart (``mixed`` cuts each kind of feedback alone).
    ``forward``: what is passed through without gradient at once, in as many parts. Raises InputError as
    :func:`cut` does.
    """
    if not steps or not all(any(part) for part in steps):
        raise InputError("a step without a group cannot be planned: give rows, or a number of groups above 0")
    times = int(forward_times(layers, recompute))

    def pieces(parts: Sequence[Lengths], budget: int) -> list[Micro]:
        return [m for part in parts if part for m in cut(part, budget, layout=layout, divisible=divisible)]

    cuts = [pieces(step, micro_batch_tokens) for step in steps]
    fullest = max((micro for micros in cuts for micro in micros), key=lambda micro: micro.tokens)
    groups = [group for step in steps for part in step for group in part]
    count = len(steps)
    found = Batch(
        groups=len(groups) / count,
        responses=sum(len(parts) for _, parts in groups) / count,
        tokens=sum(m.tokens for micros in cuts for m in micros) / count,
        targets=sum(m.targets for micros in cuts for m in micros) / count,
        scores=sum(m.scores for micros in cuts for m in micros) / count,
        micro_batches=sum(len(micros) for micros in cuts) / count,
        widest=fullest.tokens,
        widest_targets=fullest.targets,
        rows=fullest.rows,
        longest=max(prompt + max(parts) for prompt, parts in groups),
        forward_times=times,
    )
    passes = pieces(forward, times * micro_batch_tokens)
    if not passes:
        return found
    most = max(passes, key=lambda micro: micro.tokens)
    return with_forward(found, most.tokens, most.targets, most.rows)


def batch_from(
    lengths: Lengths,
    *,
    micro_batch_tokens: int,
    layout: Layout,
    divisible: bool,
    layers: int,
    groups: int = 0,
    steps: int = 0,
    recompute: Recompute = "none",
    forward: bool = False,
) -> Batch:
    """The same for a list of groups: one step of them all, or steps of ``groups`` drawn from them in turn.

    Drawn as a run draws: pass after pass, each in another order. ``steps`` of the run, as far as MOST_STEPS,
    are cut. ``forward``: they are passed through without gradient, all of them at once.
    """
    if groups < 0 or steps < 0:
        raise InputError(f"groups {groups} and steps {steps} must not be negative")
    if not lengths:
        raise InputError("no lengths to plan with: give at least one group")
    drawn = [[lengths]] if not groups else [[step] for step in _steps(lengths, groups, steps or MOST_STEPS)]
    return batch_over(
        drawn,
        micro_batch_tokens=micro_batch_tokens,
        layout=layout,
        divisible=divisible,
        layers=layers,
        recompute=recompute,
        forward=[lengths] if forward else (),
    )


def _steps(lengths: Lengths, groups: int, steps: int) -> Iterator[Lengths]:
    """Deterministic: a plan of the same data is the same."""
    shuffled = random.Random(0)
    waiting: list[tuple[int, Sequence[int]]] = []
    for _ in range(min(steps, MOST_STEPS)):
        while len(waiting) < groups:
            waiting += shuffled.sample(list(lengths), len(lengths))
        yield waiting[:groups]
        del waiting[:groups]


def with_forward(batch: Batch, widest: Number, targets: Number, rows: Number) -> Batch:
    """The batch, and the largest micro-batch of its passes without gradient."""
    values = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    return Batch(**values | {"forward_widest": widest, "forward_targets": targets, "forward_rows": rows})
