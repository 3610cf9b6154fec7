"""Attention of a batch of pieces: on the matrix unit, or its softmax in one pass between two products."""

from __future__ import annotations

import torch

from trimtab.kernels.call import call, compiled, matrix_unit
from trimtab.kernels.call import wide as wide_of


def _hidden_keys(positions: torch.Tensor, rows: int, keys: int, window: int | None) -> torch.Tensor:
    """True where a row does not see a key, ``[rows, keys]``."""
    at = positions.to(torch.long).repeat(rows // len(positions))[:, None]
    key = torch.arange(keys, device=positions.device)[None]
    hidden = key > at
    return hidden if window is None else hidden | (at - key >= window)


def softmax_(scores: torch.Tensor, positions: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    """``scores [B, R, K]`` become probabilities, in place; returns the log-sum-exp ``[B, R]``, fp32 or wider.

    Row r stands at ``positions[r % len(positions)]`` (int32, counted from key 0) and sees the keys that are
    not after it and, with a window, nearer than the window. A row that sees none: zeros, and −inf.
    """
    batch, rows, keys = scores.shape
    if compiled(scores):
        lse = torch.empty(batch, rows)
        call("softmax", scores, lse, positions, batch, rows, keys, len(positions), window or 0, scale)
        return lse
    wide = scores.to(wide_of(scores.dtype)) * scale
    wide.masked_fill_(_hidden_keys(positions, rows, keys, window), -torch.inf)
    lse = wide.logsumexp(-1)
    scores.copy_(torch.exp(wide - lse[..., None]).nan_to_num_(0.0))
    return lse


def softmax_backward_(
    scores: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    scale: float,
) -> None:
    """In place: scores → p = exp(scale·scores − lse); grad → scale · p · (grad − delta).

    ``lse`` and ``delta`` (Σ grad_out · out) ``[B, R]`` are of the whole row of attention, of which these keys
    may be a part (FlashAttention-2, Dao, 2023, algorithm 2).
    """
    batch, rows, keys = scores.shape
    if compiled(scores, grad):
        sizes = (batch, rows, keys, len(positions), window or 0)
        call("softmax_backward", scores, grad, lse, delta, positions, *sizes, scale)
        return
    wide = scores.to(lse.dtype) * scale
    wide.masked_fill_(_hidden_keys(positions, rows, keys, window), -torch.inf)
    p = torch.exp(wide - lse[..., None]).nan_to_num_(0.0)
    scores.copy_(p)
    grad.copy_(scale * p * (grad - delta[..., None]))


def _in_tiles(*tensors: torch.Tensor) -> bool:
    """The matrix unit takes these pieces whole: bf16, and widths of whole tiles."""
    bf16 = tensors[0].dtype == torch.bfloat16 and all(x.shape[-1] % 32 == 0 for x in tensors)
    return bf16 and compiled(*tensors) and matrix_unit()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q [B, R, d]`` over ``k [B, K, d]`` and ``v [B, K, e]``: ``[B, R, e]``, and log-sum-exps.

    Rows see keys, and the log-sum-exps are, as in :func:`softmax_`.
    """
    (batch, rows, d), keys, e = q.shape, k.shape[1], v.shape[2]
    if _in_tiles(q, k, v):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = q.new_empty(batch, rows, e), torch.empty(batch, rows)
        room = q.new_empty(batch * ((keys + 31) // 32 * 32) * (d + e))
        sizes = (batch, rows, keys, d, e, len(positions), window or 0)
        call("attend", q, k, v, out, lse, positions, room, *sizes, scale)
        return out, lse
    scores = torch.bmm(q, k.transpose(1, 2))
    lse = softmax_(scores, positions, window, scale)
    return torch.bmm(scores, v), lse


def attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`attend`'s q, k and v; ``lse`` and ``delta`` as in :func:`softmax_backward_`."""
    lse, delta = lse.contiguous(), delta.contiguous()
    if _in_tiles(q, k, v, grad):
        q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        (batch, rows, d), keys, e = q.shape, k.shape[1], v.shape[2]
        sizes = (batch, rows, keys, d, e, len(positions), window or 0)
        call("attend_backward", q, k, v, grad, lse, delta, dq, dk, dv, positions, *sizes, scale)
        return dq, dk, dv
    p = torch.bmm(q, k.transpose(1, 2))
    ds = torch.bmm(grad, v.transpose(1, 2))
    softmax_backward_(p, ds, lse, delta, positions, window, scale)
    return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)


def merge_(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Attention over some keys becomes attention over those and further ones, in place.

    ``out [B, R, d]`` and ``lse [B, R]`` may be slices along R; ``more`` and ``more_lse`` are contiguous.
    """
    batch, rows, width = more.shape
    if compiled(out, more):
        call("merge", out, lse, more, more_lse, batch, rows, width, out.stride(0), lse.stride(0))
        return
    total = torch.logaddexp(lse, more_lse)
    mine, theirs = (torch.exp(x - total).nan_to_num_(0.0)[..., None] for x in (lse, more_lse))
    out.copy_(mine * out + theirs * more)
    lse.copy_(total)


def row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Σ a·b over the last dimension of two contiguous tensors, in fp32 or wider."""
    if compiled(a, b):
        out = torch.empty(a.shape[:-1])
        call("row_dot", a, b, out, out.numel(), a.shape[-1])
        return out
    wide = wide_of(a.dtype)
    return (a.to(wide) * b.to(wide)).sum(-1)
