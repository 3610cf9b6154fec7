"""Groups → TreeBatch: the only place that lays tokens out, and the only shift (see batch.py's legend)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

import torch

from trimtab.batch import PADDING, PROMPT, Layout, Span, TreeBatch
from trimtab.errors import InputError
from trimtab.groups import Group, Response


def collate(
    groups: Sequence[Group],
    *,
    layout: Layout = "tree",
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> TreeBatch:
    """Lay out tokenised groups; responses keep their order, group by group.

    Raises ValueError when a group has no tokens yet, no prompt token (nothing would predict the first), or a
    mask that is not as long as its response.
    """
    trees = [
        (group, part)
        for group in groups
        for part in ([[r] for r in group.responses] if layout == "plain" else [group.responses])
    ]
    sizes = [_row_tokens(group, responses) for group, responses in trees]
    packed = layout == "packed"
    shape = (1, sum(sizes)) if packed else (len(trees), max(sizes, default=1))
    count = sum(len(responses) for _, responses in trees)
    longest = max((len(_tokens(r)) for _, responses in trees for r in responses), default=1)

    ids = torch.full(shape, pad_id, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.long)
    sources = torch.zeros((count, longest), dtype=torch.long)
    targets = torch.zeros((count, longest), dtype=torch.long)
    mask = torch.zeros((count, longest), dtype=torch.bool)
    lasts = torch.zeros(count, dtype=torch.long)
    weights = torch.ones(count)
    spans: list[Span] = []
    # Written through flat views, so that a place means the same in every layout.
    flat_ids, flat_positions, flat_segments = ids.view(-1), positions.view(-1), segments.view(-1)

    n = segment = first = 0
    for b, ((group, responses), size) in enumerate(zip(trees, sizes, strict=True)):
        prompt = group.prompt_tokens
        if not prompt:
            raise ValueError(f"group {group.id} has no prompt tokens")
        if not packed:
            first, segment = b * shape[1], 0
        start = first + len(prompt)
        flat_ids[first:start] = torch.tensor(prompt)
        flat_positions[first:start] = torch.arange(len(prompt))
        flat_segments[first:start] = PROMPT
        if packed:
            # A single response continues its prompt: one span, and nothing to merge.
            alone = len(responses) == 1
            spans.append(Span(first, first + size if alone else start, first + size))
        for response in responses:
            segment += 1
            tokens = torch.tensor(_tokens(response), dtype=torch.long)
            end = start + len(tokens)
            flat_ids[start:end] = tokens
            flat_positions[start:end] = len(prompt) + torch.arange(len(tokens))
            flat_segments[start:end] = segment
            if packed and len(responses) > 1:
                spans.append(Span(start, end, end))
            # Token 0 is predicted from the last prompt token, token t from the token before it.
            source = torch.arange(start - 1, end - 1)
            if len(tokens):
                source[0] = first + len(prompt) - 1
            sources[n, : len(tokens)] = source
            targets[n, : len(tokens)] = tokens
            mask[n, : len(tokens)] = torch.tensor(_mask(response), dtype=torch.bool)
            lasts[n] = (end if len(tokens) else first + len(prompt)) - 1
            weights[n] = group.weight
            start = end
            n += 1
        first += size
    branching = any(len(responses) > 1 for _, responses in trees)
    batch = TreeBatch(
        *(ids, positions, segments, sources, targets, mask, lasts, weights, branching, tuple(spans)),
        temperatures_N=_temperatures([r for _, responses in trees for r in responses]),
    )
    return batch.to(device)


def _temperatures(responses: Sequence[Response]) -> torch.Tensor | None:
    """What each was drawn at, ``[N]``; None where none says."""
    if all(response.temperature is None for response in responses):
        return None
    found = [math.nan if r.temperature is None else r.temperature for r in responses]
    return torch.tensor(found, dtype=torch.float64)


def in_each_layout(groups: Sequence[Group], device: torch.device | str = "cpu") -> dict[Layout, TreeBatch]:
    """The same groups laid out in every way, for the check that chooses among them."""
    layouts: tuple[Layout, ...] = get_args(Layout)
    return {layout: collate(groups, layout=layout, device=device) for layout in layouts}


def microbatches(
    groups: Sequence[Group], max_tokens: int, *, layout: Layout = "tree", divisible: bool = False
) -> list[list[Group]]:
    """Cut groups into micro-batches of at most ``max_tokens`` computed tokens each, padding counted.

    Groups of like length go together, longest first, so that little is padded (in the packed layout nothing
    is) and the largest micro-batch is met first. ``divisible`` allows a group's responses to be spread over
    several trees (policy gradients weigh each response alone; a pair must stay whole). A single tree that is
    over the budget and cannot be cut is an InputError that says how large the budget must be.
    """
    trees = list(groups)
    if divisible:
        trees = [part for group in groups for part in _cut(group, max_tokens, layout)]
    trees.sort(key=lambda group: -group_tokens(group, layout))
    batches: list[list[Group]] = []
    rows = width = 0
    for tree in trees:
        size = group_tokens(tree, layout)
        tree_rows = len(tree.responses) if layout == "plain" else 1
        if size > max_tokens:
            raise InputError(
                f"{tree.id}: one group needs {size} tokens but train.micro_batch_tokens is {max_tokens}; "
                f"raise it to at least {size}, or shorten the data (data.max_prompt_tokens, data.max_tokens)"
            )
        if layout == "packed":
            # ``width`` is the one row's.
            if not batches or width + size > max_tokens:
                batches.append([])
                width = 0
            batches[-1].append(tree)
            width += size
            continue
        widest = max(width, size // tree_rows)
        if not batches or (rows + tree_rows) * widest > max_tokens:
            batches.append([])
            rows, widest = 0, size // tree_rows
        batches[-1].append(tree)
        rows, width = rows + tree_rows, widest
    return batches


def group_tokens(group: Group, layout: Layout = "tree") -> int:
    """Tokens that the model computes for this group alone."""
    if layout != "plain":
        return _row_tokens(group, group.responses)
    return max(_row_tokens(group, [r]) for r in group.responses) * len(group.responses)


def _cut(group: Group, max_tokens: int, layout: Layout) -> list[Group]:
    """Spread a group's responses over as few trees as fit the budget."""
    parts: list[list[Response]] = [[]]
    for response in group.responses:
        grown = dataclasses.replace(group, responses=[*parts[-1], response])
        if parts[-1] and group_tokens(grown, layout) > max_tokens:
            parts.append([])
        parts[-1].append(response)
    return [dataclasses.replace(group, responses=part) for part in parts]


def _row_tokens(group: Group, responses: Sequence[Response]) -> int:
    return len(group.prompt_tokens or ()) + sum(len(_tokens(r)) for r in responses)


def _tokens(response: Response) -> list[int]:
    if response.tokens is None:
        raise ValueError("the response has not been tokenised")
    return response.tokens


def _mask(response: Response) -> list[bool]:
    tokens = _tokens(response)
    if response.mask is None:
        return [True] * len(tokens)
    # Checked, since a mask of one entry would be spread over the whole response.
    if len(response.mask) != len(tokens):
        raise ValueError(f"a response's mask has {len(response.mask)} entries for {len(tokens)} tokens")
    return response.mask
