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
        """By layer: keys ``[P, H, d, Lp]`` and values ``[P, H, Lp, d]``."""
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.bias: dict[int | None, torch.Tensor | None] = {}
        """Additive prefix mask by window, for the current step."""

    def prefix_bias(self, window: int | None, width: int) -> torch.Tensor | None:
        """0 where the current token may see a prompt position, −inf elsewhere: ``[P, 1, Lp]``.

        None where every position may be seen. All samples of a prompt are at the same position.
        """
        if window not in self.bias:
            index = torch.arange(width, device=self.lengths_P.device)
            allowed = index[None, :] < self.lengths_P[:, None]
            if window is not None:
                allowed &= self.lengths_P[:, None] + self.step - index[None, :] < window
            bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)
            self.bias[window] = None if bool(allowed.all()) else bias[:, None, :]
        return self.bias[window]

    def advance(self) -> None:
        """Begin the next decode step."""
        self.step += 1
        self.bias = {}

    def own_of(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples' own keys and values ``[P, H, G, capacity, d]``, made at a layer's first step."""
        if layer not in self.own:
            shape = (len(self.lengths_P), key.shape[1], self.samples, self.capacity)
            self.own[layer] = (
                key.new_empty((*shape, key.shape[-1])),
                value.new_empty((*shape, value.shape[-1])),
            )
        return self.own[layer]

    def select(self, prompts_P: torch.Tensor, rows_PG: torch.Tensor) -> None:
        """Keep these prompts, and of each of them these rows (old row numbers)."""
        used = max(self.step + 1, 0)
        within_PG = rows_PG % self.samples
        self.lengths_P = self.lengths_P[prompts_P]
        self.samples = rows_PG.shape[1]
        for layer, (k, v) in self.prefix.items():
            self.prefix[layer] = (k[prompts_P], v[prompts_P])
        for layer, (k, v) in self.own.items():
            kept = []
            for tensor in (k, v):
                fresh = tensor.new_empty(
                    (*rows_PG.shape[:1], tensor.shape[1], self.samples, *tensor.shape[3:])
                )
                picked = tensor[prompts_P[:, None], :, within_PG, :used]
                fresh[:, :, :, :used] = picked.transpose(1, 2)
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
        # Stored as the two products read them: keys transposed, both contiguous.
        cache.prefix[layer] = (key.transpose(-1, -2).contiguous(), value.contiguous())
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
    prompts, kv_heads, head_dim, width = prefix_k.shape
    rows, heads = query.shape[:2]
    samples, repeat, t = cache.samples, heads // kv_heads, cache.step
    own_k, own_v = cache.own_of(layer, key, value)
    # [rows, heads, 1, d] → [P, H, G, …]: with the samples innermost, both parts of the attention are
    # plain batched products over contiguous memory.
    own_k[:, :, :, t] = key.reshape(prompts, samples, kv_heads, head_dim).transpose(1, 2)
    own_v[:, :, :, t] = value.reshape(prompts, samples, kv_heads, -1).transpose(1, 2)
    first = 0 if window is None else max(0, t + 1 - window)
    used_k, used_v = (x.view(prompts * kv_heads * samples, -1, x.shape[-1]) for x in (own_k, own_v))
    grouped = (query * scale).reshape(prompts, samples, kv_heads, repeat, head_dim).transpose(1, 2)
    shared = grouped.reshape(prompts * kv_heads, samples * repeat, head_dim).contiguous()
    alone = shared.view(prompts * kv_heads * samples, repeat, head_dim)

    # The prefix part is one matrix product per prompt and head for all its samples together.
    scores_prefix = torch.bmm(shared, prefix_k.view(prompts * kv_heads, head_dim, width))
    scores_own = torch.bmm(alone, used_k[:, first : t + 1].transpose(1, 2))
    scores_prefix, scores_own = _soft(scores_prefix, softcap).float(), _soft(scores_own, softcap).float()
    if (bias := cache.prefix_bias(window, width)) is not None:
        scores_prefix = (scores_prefix.view(prompts, -1, width) + bias).view(scores_prefix.shape)
    # One softmax over both parts, so this is the ordinary attention and no approximation.
    scores = torch.cat([scores_prefix, scores_own.view(*shared.shape[:2], -1)], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)
    out = torch.bmm(weights[..., :width], prefix_v.view(prompts * kv_heads, width, -1))
    own = weights[..., width:].reshape(*alone.shape[:2], -1)
    out += torch.bmm(own, used_v[:, first : t + 1]).view(out.shape)
    out = out.view(prompts, kv_heads, samples, repeat, -1).transpose(1, 2)
    return out.reshape(rows, 1, heads, -1)


def _soft(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


AttentionInterface.register(NAME, tree_attention)
