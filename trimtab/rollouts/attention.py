"""Attention for tree decoding, installed through the interface that transformers offers.

While a :class:`DecodeCache` is active every attention layer of the model calls :func:`tree_attention`
with the queries, keys and values of the *new* tokens only. The cache keeps each prompt's keys and values
once for all its samples, and each sample's own. One softmax runs over both parts, so the result is the
ordinary attention, not an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "trimtab_decode"


class DecodeCache:
    """Keys and values of one wave: P prompts with G samples each.

    Row p·G + g is sample g of prompt p. ``version`` is the weights' version that filled it: reading under
    another is an error, never a stale answer.
    """

    def __init__(self, lengths_P: torch.Tensor, samples: int, capacity: int, version: int) -> None:
        self.lengths_P = lengths_P
        self.samples = samples
        self.capacity = capacity
        self.version = version
        self.step = -1
        """−1 while the prompts are run, then the number of own tokens already stored."""
        self.prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.bias: dict[int | None, torch.Tensor | None] = {}
        """Additive prefix mask by window, for the current step."""

    def prefix_bias(self, window: int | None, width: int) -> torch.Tensor | None:
        """0 where the current token may see a prompt position, −inf elsewhere: ``[P, 1, 1, Lp]``.

        None where every position may be seen. All samples of a prompt are at the same position.
        """
        if window not in self.bias:
            index = torch.arange(width, device=self.lengths_P.device)
            allowed = index[None, :] < self.lengths_P[:, None]
            if window is not None:
                allowed &= self.lengths_P[:, None] + self.step - index[None, :] < window
            bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)
            self.bias[window] = None if bool(allowed.all()) else bias[:, None, None, :]
        return self.bias[window]

    def advance(self) -> None:
        """Begin the next decode step."""
        self.step += 1
        self.bias = {}

    def select(self, prompts_P: torch.Tensor, rows_PG: torch.Tensor) -> None:
        """Keep these prompts, and of each of them these rows (old row numbers)."""
        rows = rows_PG.reshape(-1)
        used = max(self.step + 1, 0)
        self.lengths_P = self.lengths_P[prompts_P]
        self.samples = rows_PG.shape[1]
        for layer, (k, v) in self.prefix.items():
            self.prefix[layer] = (k[prompts_P], v[prompts_P])
        for layer, (k, v) in self.own.items():
            kept = []
            for tensor in (k, v):
                fresh = tensor.new_empty((len(rows), *tensor.shape[1:]))
                fresh[:, :, :used] = tensor[rows, :, :used]
                kept.append(fresh)
            self.own[layer] = (kept[0], kept[1])
        self.bias = {}


_active: list[DecodeCache] = []


@contextmanager
def decoding(model: nn.Module, cache: DecodeCache) -> Iterator[None]:
    """Route the model's attention through ``cache``; the model's own kernel comes back afterwards."""
    config: Any = model.config
    kernel = config._attn_implementation
    config._attn_implementation = NAME
    _active.append(cache)
    try:
        yield
    finally:
        _active.pop()
        config._attn_implementation = kernel


def tree_attention(
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
    """Attention of the new tokens over the cache, with the signature that transformers calls.

    ``attention_mask`` is ignored: who sees whom follows from the cache. An argument that this function
    does not know (attention sinks, a position bias) changes the numbers, and the engine's check then
    rejects it for that model.
    """
    cache = _active[-1]
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.step < 0:
        cache.prefix[layer] = (key, value)
        return _prompt_attention(query, key, value, scale, softcap, sliding_window), None
    return _own_attention(cache, layer, query, key, value, scale, softcap, sliding_window), None


def _prompt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention over right-padded prompts: a real token never looks as far right as the padding."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    length = query.shape[2]
    if softcap is None and (window is None or window >= length):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, scale=scale)
        return out.transpose(1, 2)
    index = torch.arange(length, device=query.device)
    seen = index[None, :] <= index[:, None]
    if window is not None:
        seen &= index[:, None] - index[None, :] < window
    scores = _soft(query @ key.transpose(-1, -2) * scale, softcap).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)


def _own_attention(
    cache: DecodeCache,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    prefix_k, prefix_v = cache.prefix[layer]
    prompts, kv_heads, width, head_dim = prefix_k.shape
    rows, heads = query.shape[:2]
    if layer not in cache.own:
        shape = (rows, kv_heads, cache.capacity, head_dim)
        cache.own[layer] = (key.new_empty(shape), value.new_empty((*shape[:3], value.shape[-1])))
    own_k, own_v = cache.own[layer]
    t = cache.step
    own_k[:, :, t] = key[:, :, 0]
    own_v[:, :, t] = value[:, :, 0]
    first = 0 if window is None else max(0, t + 1 - window)
    repeat = heads // kv_heads
    query = query.view(rows, kv_heads, repeat, head_dim) * scale

    # The prefix part is one matrix product per prompt and head for all its samples together.
    grouped = query.view(prompts, cache.samples, kv_heads, repeat, head_dim).transpose(1, 2)
    grouped = grouped.reshape(prompts, kv_heads, cache.samples * repeat, head_dim)
    scores_prefix = _soft(grouped @ prefix_k.transpose(-1, -2), softcap).float()
    if (bias := cache.prefix_bias(window, width)) is not None:
        scores_prefix = scores_prefix + bias
    scores_prefix = scores_prefix.view(prompts, kv_heads, cache.samples, repeat, width).transpose(1, 2)
    scores_own = _soft(query @ own_k[:, :, first : t + 1].transpose(-1, -2), softcap).float()
    scores = torch.cat([scores_prefix.reshape(rows, kv_heads, repeat, width), scores_own], dim=-1)

    weights = scores.softmax(-1).to(value.dtype)
    own = weights[..., width:] @ own_v[:, :, first : t + 1]
    shared = weights[..., :width].reshape(prompts, cache.samples, kv_heads, repeat, width).transpose(1, 2)
    shared = shared.reshape(prompts, kv_heads, cache.samples * repeat, width) @ prefix_v
    shared = shared.view(prompts, kv_heads, cache.samples, repeat, -1).transpose(1, 2)
    out = own + shared.reshape(rows, kv_heads, repeat, -1)
    return out.reshape(rows, 1, heads, -1)


def _soft(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


AttentionInterface.register(NAME, tree_attention)
