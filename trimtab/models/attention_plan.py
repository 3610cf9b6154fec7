"""Who attends to whom in a packed row: its spans, cut into batched products (or a block mask for a GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from trimtab.batch import Span

SCORE_BYTES = 16 * 2**20
"""Size of one piece's scores. Larger pieces leave the cache and are slower; smaller ones are many calls."""
SPARED = 0.8
"""Spans share a piece when the shorter is at least this share of the longer: the rest is padding."""
SHORT = 32
"""Spans this short share a piece whatever their lengths: calls cost more than their padding."""


@dataclass(slots=True)
class Piece:
    """One batched product: n times the same number of queries against the same number of keys.

    ``queries [n, Lq]`` and ``keys [n, Lk]`` are places in the row, −1 for padding (behind every real key of a
    causal piece). ``positions [Lq]``, int32, count from the piece's first key. A piece with n = 1 is two runs
    of neighbouring places, read without a copy.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    padded: bool = False
    gathers: dict[tuple[int, int, int], Rows] = field(default_factory=dict)

    def rows(self, tokens: int, heads: int, kv_heads: int) -> Rows | None:
        """Where the piece's rows are in ``[heads · tokens, d]``; None where they are slices."""
        if len(self.queries) == 1:
            return None
        name = (tokens, heads, kv_heads)
        if name not in self.gathers:
            places = [
                # [KV, n, repeat, Lq] and [KV, n, Lk]: the heads that share keys are rows of one product.
                (self.queries[None, :, None], torch.arange(heads).view(kv_heads, 1, -1, 1), heads),
                (self.keys[None], torch.arange(kv_heads).view(kv_heads, 1, 1), kv_heads),
            ]
            found = []
            for place, head, count in places:
                row = place + head.to(place.device) * tokens
                found.append(row.masked_fill(place < 0, 0).flatten())
                found.append(row.masked_fill(place < 0, count * tokens).flatten())
            self.gathers[name] = Rows(*found)
        return self.gathers[name]


@dataclass(slots=True)
class Rows:
    """Row numbers to read a piece from and to write it to, for queries and for keys.

    Padding reads row 0 (its scores are hidden, its results dropped) and writes one past the end.
    """

    read_q: torch.Tensor
    write_q: torch.Tensor
    read_k: torch.Tensor
    write_k: torch.Tensor


@dataclass(slots=True)
class AttentionPlan:
    """The pieces of a packed row: ``own`` ones, which write each token once, then ``prefix`` ones."""

    own: list[Piece]
    prefix: list[Piece]
    """With n = 1. Their queries have an own piece too: results are merged with what is there."""
    last_L: torch.Tensor
    """For each place, where what continues its span ends: it is seen by the places from itself to there."""
    positions_L: torch.Tensor
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """For FlexAttention, by window."""

    def block_mask(self, window: int | None) -> BlockMask:
        """Who sees whom, in the blocks that a GPU kernel skips or computes."""
        if window not in self.block_masks:
            last_L, positions_L = self.last_L, self.positions_L

            def seen(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                continued = (key <= query) & (query < last_L[key])
                if window is None:
                    return continued
                return continued & (positions_L[query] - positions_L[key] < window)

            length = len(last_L)
            self.block_masks[window] = create_block_mask(
                seen, None, None, length, length, device=str(last_L.device)
            )
        return self.block_masks[window]


def plan_attention(
    spans: Sequence[Span], positions_L: torch.Tensor, heads: int, *, itemsize: int = 2
) -> AttentionPlan:
    """Cut a packed row's attention into pieces of at most SCORE_BYTES of scores each.

    ``positions_L``: each place's position in its own sequence, on the device of the model.
    """
    budget = SCORE_BYTES // (itemsize * heads)
    device = positions_L.device
    own: list[Piece] = []
    waiting: list[Span] = []

    def flush() -> None:
        if len(waiting) == 1:
            (span,) = waiting
            own.extend(_causal_pieces(span.start, span.stop, budget, device))
        elif waiting:
            width = waiting[0].stop - waiting[0].start
            places = torch.full((len(waiting), width), -1)
            for row, span in zip(places, waiting, strict=True):
                row[: span.stop - span.start] = torch.arange(span.start, span.stop)
            padded = bool((places < 0).any())
            places = places.to(device)
            own.append(Piece(places, places, _run(0, width, device).int(), padded))
        waiting.clear()

    for span in sorted(spans, key=lambda s: (s.start - s.stop, s.start)):
        length = span.stop - span.start
        if not length:
            continue
        width = waiting[0].stop - waiting[0].start if waiting else length
        alike = length >= SPARED * width or width <= SHORT
        if not alike or (len(waiting) + 1) * width * width > budget:
            flush()
        waiting.append(span)
    flush()

    prefix = []
    for span in spans:
        step = max(1, budget // max(1, span.stop - span.start))
        for first in range(span.stop, span.last, step):
            stop = min(span.last, first + step)
            offsets = (positions_L[first:stop] - positions_L[span.start]).int()
            keys = _run(span.start, span.stop, device)[None]
            queries = _run(first, stop, device)[None]
            prefix.append(Piece(queries, keys, offsets.contiguous()))
    last_L = torch.empty(len(positions_L), dtype=torch.int32)
    for span in spans:
        last_L[span.start : span.stop] = span.last
    return AttentionPlan(own, prefix, last_L.to(device), positions_L)


def _causal_pieces(start: int, stop: int, budget: int, device: torch.device) -> list[Piece]:
    """One long span: rows of queries, each against the keys up to its last: half the square is left out."""
    pieces = []
    first = start
    while first < stop:
        # The rows r with r · (first + r) within the budget, and no more than keep the skipped triangle large.
        seen = first - start
        rows = max(16, min(256, budget // max(1, seen + 256)))
        last = min(stop, first + rows)
        queries, keys = _run(first, last, device)[None], _run(start, last, device)[None]
        pieces.append(Piece(queries, keys, _run(seen, last - start, device).int()))
        first = last
    return pieces


def _run(start: int, stop: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, stop, device=device)
