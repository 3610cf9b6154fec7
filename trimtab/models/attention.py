"""Attention over packed trees, split into the parts that are really needed.

A packed row holds many trees. Of its ``T × T`` scores only two kinds count: each span (a prompt, a response)
against itself, causally, and a prompt's continuations against the prompt. Each kind is a batched matrix
product over exactly those tokens; a token's two parts are merged by their log-sum-exps, so the result is the
ordinary softmax. Nothing is computed and then masked but the upper triangles of the spans.

The backward pass computes each part's probabilities again from the row's own log-sum-exp (FlashAttention-2,
Dao, 2023): what is kept is the output and one number a head and token. PyTorch's CPU flash kernel does the
same, at a tenth of the speed that its batched matrix products have on matrix units.

On a GPU the same plan is a block mask of FlexAttention, which does all of this in one kernel.

Installed under a name of transformers' attention interface. Called without a plan it is transformers' SDPA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trimtab.kernels.attention import attend, attend_backward, merge_, row_dot
from trimtab.models.attention_plan import AttentionPlan, Piece

NAME = "trimtab"
MANY = 64
"""With more pieces than this, gradients are summed in fp32 whatever the dtype."""

# --- the two passes -----------------------------------------------------------------------------------------


def _part(x_HTd: torch.Tensor, places: torch.Tensor, rows: torch.Tensor | None, batch: int) -> torch.Tensor:
    """A piece's part of ``x``, ``[batch, rows, d]``."""
    width = x_HTd.shape[-1]
    if rows is None:
        first, length = int(places[0, 0]), places.shape[1]
        return x_HTd[:, first : first + length].reshape(batch, -1, width)
    return x_HTd.reshape(-1, width).index_select(0, rows).view(batch, -1, width)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A piece's attention over its own keys, ``[batch, rows, e]``, and its log-sum-exps."""
    batch, rows = len(k) * len(piece.queries), piece.rows(q.shape[1], len(q), len(k))
    read_q, read_k = (rows.read_q, rows.read_k) if rows else (None, None)
    q_p = _part(q, piece.queries, read_q, batch)
    k_p, v_p = (_part(x, piece.keys, read_k, batch) for x in (k, v))
    return attend(q_p, k_p, v_p, piece.positions, window, scale)


class _PackedAttention(torch.autograd.Function):
    """``q [H, T, d]``, ``k [K, T, d]``, ``v [K, T, e]`` → ``[H, T, e]``; heads h // (H/K) share keys."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        heads, tokens, _ = q.shape
        width = v.shape[-1]
        # One row more than there is: where the results of padding go.
        out = q.new_empty(heads * tokens + 1, width)
        lse = q.new_empty(heads * tokens + 1, dtype=torch.promote_types(q.dtype, torch.float32))
        out_HTe, lse_HT = out[:-1].view(heads, tokens, width), lse[:-1].view(heads, tokens)
        for number, piece in enumerate((*plan.own, *plan.prefix)):
            part, part_lse = _attend(q, k, v, piece, scale, window)
            rows = piece.rows(tokens, heads, len(k))
            if rows is not None:
                out.index_copy_(0, rows.write_q, part.view(-1, width))
                lse.index_copy_(0, rows.write_q, part_lse.view(-1))
                continue
            length = piece.queries.shape[1]
            here = slice(int(piece.queries[0, 0]), int(piece.queries[0, 0]) + length)
            part, part_lse = part.view(heads, length, width), part_lse.view(heads, length)
            if number < len(plan.own):
                out_HTe[:, here], lse_HT[:, here] = part, part_lse
            else:
                merge_(out_HTe[:, here], lse_HT[:, here], part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        return out_HTe

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        heads, tokens, _ = q.shape
        grad = grads[0].contiguous()
        delta = row_dot(grad, out[:-1].view_as(grad))[..., None]
        lse = lse[:-1].view(heads, tokens, 1)
        pieces = (*ctx.plan.own, *ctx.plan.prefix)
        # Every token is in one piece of its own, so writing those leaves nothing unwritten; a long span's
        # many pieces are summed, from zeros.
        long = any(len(p.queries) == 1 for p in ctx.plan.own)
        make = torch.zeros if long else torch.empty
        dtype = lse.dtype if len(pieces) > MANY else q.dtype
        totals = [make(len(x) * tokens + 1, x.shape[-1], dtype=dtype, device=x.device) for x in (q, k, v)]
        for piece in sorted(pieces, key=lambda p: len(p.queries) == 1):
            batch, rows = len(k) * len(piece.queries), piece.rows(tokens, heads, len(k))
            read_q, read_k = (rows.read_q, rows.read_k) if rows else (None, None)
            q_p, grad_p, lse_p, delta_p = (
                _part(x, piece.queries, read_q, batch) for x in (q, grad, lse, delta)
            )
            k_p, v_p = (_part(x, piece.keys, read_k, batch) for x in (k, v))
            if piece.padded:
                # What padding reads is some row's: its gradient is none, and against other keys that row's
                # log-sum-exp could be far too small.
                assert rows is not None
                real = (rows.write_q < heads * tokens).view(batch, -1, 1)
                grad_p, delta_p = grad_p * real, delta_p * real
                lse_p = lse_p.masked_fill(~real, torch.inf)
            where = (piece.positions, ctx.window, ctx.scale)
            terms = attend_backward(q_p, k_p, v_p, grad_p, lse_p[..., 0], delta_p[..., 0], *where)
            for total, term, at in zip(totals, terms, "qkk", strict=True):
                if rows is not None:
                    write = rows.write_q if at == "q" else rows.write_k
                    total.index_copy_(0, write, term.view(-1, term.shape[-1]).to(dtype))
                    continue
                places = piece.queries if at == "q" else piece.keys
                first, length = int(places[0, 0]), places.shape[1]
                whole = total[:-1].view(-1, tokens, term.shape[-1])
                whole[:, first : first + length] += term.view(len(whole), length, -1)
        grads_qkv = (t[:-1].view(x.shape).to(x.dtype) for t, x in zip(totals, (q, k, v), strict=True))
        return (*grads_qkv, None, None, None)


# --- transformers' interface --------------------------------------------------------------------------------


def as_mask(plan: AttentionPlan, device: torch.device) -> torch.Tensor:
    """The plan in the shape of a 4-D attention mask, which transformers hands to every layer as it is.

    An argument and no global, so that a layer computed again in the backward pass finds it too.
    """
    mask = torch.zeros((1, 1, 1, 1), device=device)
    mask.plan = plan  # type: ignore[attr-defined]
    return mask


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, with the signature that transformers calls: ``[1, H, T, d] → [1, T, H, e]``.

    Without a plan, transformers' SDPA. Raises ValueError for an argument with a value that a plan cannot
    express (soft-capping, attention sinks, a position bias): the layout check then chooses another layout.
    """
    plan: AttentionPlan | None = getattr(attention_mask, "plan", None)
    if plan is None:
        # The window is in the mask that sdpa_mask made.
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **further
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if further.get(name) is not None:
            raise ValueError(f"packed attention has no {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if uses_flex(query):
        masks = plan.block_mask(sliding_window)
        shared = query.shape[1] != key.shape[1]
        out = _flex()(query, key, value, block_mask=masks, scale=scale, enable_gqa=shared)
        return out.transpose(1, 2), None
    q, k, v = (x.squeeze(0).contiguous() for x in (query, key, value))
    out = _PackedAttention.apply(q, k, v, plan, scale, sliding_window)
    return out.transpose(0, 1).unsqueeze(0), None


def uses_flex(query: torch.Tensor) -> bool:
    """On a GPU one block-sparse kernel takes the place of the pieces."""
    return query.is_cuda


@functools.cache
def _flex() -> Callable[..., torch.Tensor]:
    # Shapes differ from batch to batch: compiled once, for all of them.
    return torch.compile(flex_attention, dynamic=True)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
