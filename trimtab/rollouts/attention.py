"""Attention of the sampling engine, installed through the interface that transformers offers.

While :func:`decoding` is in force every attention layer of the model calls :func:`engine_attention` with
the queries, keys and values of the *new* tokens only, one packed row of them; who sees whom follows from the
state that is active: :class:`Prefill` (prompts) or :class:`Decode` (one token of every running row).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from trimtab.kernels.decode import BLOCK, Heads, Plan, attend, store
from trimtab.rollouts.cache import Blocks, Node, Shape

NAME = "trimtab_decode"
QUERIES = 512
"""Queries of one product where a mask is needed, so that none grows with the square of a prompt."""


class State(Protocol):
    """What the layers' attention does for the tokens of one forward pass."""

    def attend(self, layer: int, new: Heads) -> torch.Tensor:
        """The L new tokens' attention in one layer: ``[1, L, H, e]``."""
        ...


class Measure:
    """Notes each layer's shapes; for a pass over a single token, whose attention is its own value."""

    def __init__(self) -> None:
        self.shapes: dict[int, Shape] = {}

    def attend(self, layer: int, new: Heads) -> torch.Tensor:
        """See :class:`State`."""
        key, value = new.key, new.value
        self.shapes[layer] = Shape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        return value.repeat_interleave(new.query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


class Decode:
    """One token of every running row, over the cache."""

    def __init__(self, blocks: Blocks, plan: Plan) -> None:
        self.blocks, self.plan = blocks, plan

    def attend(self, layer: int, new: Heads) -> torch.Tensor:
        """See :class:`State`."""
        return attend(self.plan, new, self.blocks.keys[layer], self.blocks.values[layer])


class Segment(NamedTuple):
    """A node's tokens ``begin … begin + length`` in a packed row; ``begin`` is a multiple of BLOCK."""

    node: Node
    begin: int
    length: int


class Prefill:
    """Prompts packed one after another. A parent comes before its children, if only in the same pass."""

    def __init__(self, blocks: Blocks, segments: list[Segment]) -> None:
        self.blocks, self.segments = blocks, segments
        device = blocks.device
        spans = [(s.node, i) for s in segments for i in range(s.begin, s.begin + s.length)]
        self.where = torch.tensor([n.blocks[i // BLOCK] for n, i in spans], dtype=torch.int32, device=device)
        self.place = torch.tensor([i % BLOCK for _, i in spans], dtype=torch.int32, device=device)
        self.past = [_past(s, device) for s in segments]

    def attend(self, layer: int, new: Heads) -> torch.Tensor:
        """See :class:`State`."""
        keys, values = self.blocks.keys[layer], self.blocks.values[layer]
        query, key, value = new[:3]
        store(key, value, keys, values, self.where, self.place)
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        at = i = 0
        while i < len(self.segments):
            length, past = self.segments[i].length, self.past[i]
            count = 1
            # Neighbours of one length with nothing before them are one batch.
            while past is None and i + count < len(self.segments) and self.past[i + count] is None:
                if self.segments[i + count].length != length:
                    break
                count += 1
            q, k, v = (
                x[0, :, at : at + count * length].unflatten(1, (count, length)).transpose(0, 1)
                for x in (query, key, value)
            )
            if past is not None:
                old_k, old_v = _gathered(keys, values, *past)
                k = torch.cat([old_k, k], dim=2)
                v = torch.cat([old_v[..., : v.shape[-1]], v], dim=2)
            result = _causal(new._replace(query=q, key=k, value=v))
            out[0, at : at + count * length] = result.transpose(1, 2).flatten(0, 1)
            at, i = at + count * length, i + count
        return out


def _past(segment: Segment, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Blocks of what comes before a segment, and which of their places are taken; None for a beginning."""
    blocks: list[int] = []
    places: list[int] = []
    for node in segment.node.chain():
        length = segment.begin if node is segment.node else len(node.tokens)
        places.extend(len(blocks) * BLOCK + i for i in range(length))
        blocks.extend(node.blocks[: -(-length // BLOCK)])
    if not places:
        return None
    return torch.tensor(blocks, device=device), torch.tensor(places, device=device)


def _gathered(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored keys and values as ``[1, kv heads, L, width]``."""
    k = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)
    v = values[blocks].permute(1, 0, 2, 3).flatten(1, 2)
    return k[:, places][None], v[:, places][None]


def _causal(given: Heads) -> torch.Tensor:
    """Causal attention of ``[B, H, L, d]`` queries that are the last of ``[B, K, P, d]`` keys."""
    query, key, value, scale, softcap, window = given
    length, total = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if softcap is None and (window is None or window >= total) and length == total:
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, scale=scale)
    pieces = []
    for start in range(0, length, QUERIES):
        q = query[:, :, start : start + QUERIES]
        first, last = total - length + start, total - length + start + q.shape[2]
        low = 0 if window is None else max(0, first - window + 1)
        at = torch.arange(low, last, device=q.device)
        now = torch.arange(first, last, device=q.device)[:, None]
        seen = at <= now if window is None else (at <= now) & (now - at < window)
        k, v = key[:, :, low:last], value[:, :, low:last]
        if softcap is None:
            pieces.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
            continue
        scores = torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap)) * softcap
        pieces.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v)
    return torch.cat(pieces, dim=2)


_active: list[State] = []


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """The model's attention goes through this module; its own kernel comes back afterwards."""
    config: Any = model.config
    kernel = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = kernel


def forward(trunk: nn.Module, state: State, ids_L: torch.Tensor, positions_L: torch.Tensor) -> torch.Tensor:
    """The trunk on one packed row, its attention being ``state``'s: hidden states ``[L, D]``."""
    _active.append(state)
    try:
        output = trunk(
            input_ids=ids_L[None], position_ids=positions_L[None], attention_mask=None, use_cache=False
        )
    finally:
        _active.pop()
    return output.last_hidden_state[0]


def engine_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature that transformers calls.

    ``attention_mask`` is ignored: who sees whom follows from the state. An argument that this function does
    not know (attention sinks, a position bias) changes the numbers, and the engine's check then rejects it
    for that model.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return _active[-1].attend(layer, Heads(query, key, value, scale, softcap, sliding_window)), None


AttentionInterface.register(NAME, engine_attention)
