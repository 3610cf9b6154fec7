"""The elementwise parts of a training step: each a plain form, and one pass over memory where it is compiled.

Forward functions are differentiable. Which path runs is decided by the tensors: the compiled one for fp32 and
bf16 on CPU, the plain one otherwise. Both compute in fp32 (fp64 for fp64) and round once, at the end. Linear
layers stand here too: what is compiled of them is what PyTorch does slowly around its matrix products.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional as F

from trimtab.kernels.call import call, compiled, matrix_unit
from trimtab.kernels.call import wide as wide_of

Gate = Literal["silu", "gelu_tanh"]


# --- RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x²) + eps) · (w + offset) ----------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        x = x.contiguous()
        out, scale = _rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, width = grads[0].contiguous(), x.shape[-1]
        grad_x, parts = torch.empty_like(x), torch.zeros(torch.get_num_threads(), width)
        call("rms_norm_backward", grad, x, weight, scale, grad_x, parts, scale.numel(), width, ctx.offset)
        return grad_x, parts.sum(0).to(weight.dtype), None, None


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    out, scale = torch.empty_like(x), torch.empty(rows)
    call("rms_norm", x, weight, out, scale, rows, width, eps, offset)
    return out, scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """``x [..., D]`` over its root mean square, times ``weight [D] + offset`` (Gemma's offset is 1)."""
    if compiled(x, weight):
        if not torch.is_grad_enabled():
            return _rms_norm(x.contiguous(), weight, eps, offset)[0]
        return _RMSNorm.apply(x, weight, eps, offset)
    wide = x.to(wide_of(x.dtype))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * (weight.to(wide.dtype) + offset)).to(x.dtype)


# --- Gated activations (Shazeer, 2020): act(gate) · up ------------------------------------------------------


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: int) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = _gated(gate, up, kind)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        call("gated_backward", grads[0].contiguous(), gate, up, grad_gate, grad_up, gate.numel(), ctx.kind)
        return grad_gate, grad_up, None


def _gated(gate: torch.Tensor, up: torch.Tensor, kind: int) -> torch.Tensor:
    out = torch.empty_like(gate)
    call("gated", gate, up, out, gate.numel(), kind)
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, kind: Gate) -> torch.Tensor:
    """``act(gate) · up``, all of one shape; SwiGLU's gate is silu, GeGLU's gelu (its tanh form)."""
    if compiled(gate, up):
        if not torch.is_grad_enabled():
            return _gated(gate.contiguous(), up.contiguous(), int(kind == "gelu_tanh"))
        return _Gated.apply(gate, up, int(kind == "gelu_tanh"))
    wide = gate.to(wide_of(gate.dtype))
    active = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    return (active * up).to(gate.dtype)


# --- Rotary embedding (Su et al., 2021), the half-split form: x·cos + (−x₂, x₁)·sin -------------------------


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, *, heads_first: bool
) -> torch.Tensor:
    """``[1, H, L, d]`` in any strides to the same shape, in memory ``[H, L, d]`` or ``[L, H, d]``."""
    _, heads, length, width = x.shape
    if heads_first:
        out = x.new_empty(1, heads, length, width)
    else:
        out = x.new_empty(1, length, heads, width).transpose(1, 2)
    strides = (x.stride(2), x.stride(1), out.stride(2), out.stride(1))
    call("rotary", x, cos, sin, out, length, heads, width, *strides, sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0, heads_first=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # In memory as the projections read it, so that their backward needs no copy.
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return _rotate(grad, cos, sin, -1.0, heads_first=False), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each head's pairs ``(i, i + d/2)`` by the angles of its position.

    ``x [B, H, L, d]``, ``cos`` and ``sin [B, L, d]``. Differentiable with respect to ``x`` only.
    """
    if x.shape[0] == 1 and x.stride(-1) == 1 and x.shape[-1] == cos.shape[-1] and compiled(x, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        if not torch.is_grad_enabled():
            return _rotate(x, cos, sin, 1.0, heads_first=True)
        return _Rotary.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


# --- Linear layers: the weight's gradient as a product of matrices that lie as it wants them ----------------

TRANSPOSE_ROWS, TRANSPOSE_WIDTH = 256, 1024
"""Smaller products gain less than the transposition costs."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Under an adapter the weight is frozen, and nobody needs what went into it.
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.biased, ctx.shape = bias is not None, x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_MN = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MN @ weight).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            # PyTorch's product with a transposed first factor runs at half the speed of its others.
            grad_NM = grad_MN.new_empty(grad_MN.shape[::-1])
            call("transpose", grad_MN.contiguous(), grad_NM, *grad_MN.shape)
            grad_w = grad_NM @ x.reshape(-1, weight.shape[1])
        if ctx.biased and ctx.needs_input_grad[2]:
            grad_b = grad_MN.sum(0)
        return grad_x, grad_w, grad_b


SKINNY_ROWS = 192
"""Above this PyTorch's product, which reorders the weights at every call, is as fast."""


def _skinny(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer on few rows, the weights read where and as they are."""
    (n, k), x = weight.shape, x.contiguous()
    rows = x.numel() // k
    out = x.new_empty(*x.shape[:-1], n)
    call("skinny", x, weight, bias, out, x.new_empty((rows + 15) // 16 * 16 * k), rows, n, k)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., K] @ weight [N, K].T + bias [N]``.

    Faster than PyTorch's for bf16 on CPU: the backward pass of many rows, the forward pass of few.
    """
    if x.dtype == torch.bfloat16 and compiled(x, weight):
        n, k = weight.shape
        rows = x.numel() // k
        if torch.is_grad_enabled():
            if rows >= TRANSPOSE_ROWS and max(n, k) >= TRANSPOSE_WIDTH:
                return _Linear.apply(x, weight, bias)
        elif (
            0 < rows <= SKINNY_ROWS
            and n % 16 == 0
            and k % 32 == 0
            and weight.is_contiguous()
            and matrix_unit()
        ):
            return _skinny(x, weight, bias)
    return F.linear(x, weight, bias)


# --- A linear layer and its adapter (LoRA; Hu et al., 2021): W·x + bias + scale·B·A·x -----------------------


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        out, down = _adapted(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, down, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, down_MR, weight, a, b = ctx.saved_tensors
        grad_MN = grads[0].reshape(-1, weight.shape[0])
        # Scaled once, while it is small.
        grad_MR = (grad_MN @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MN @ weight).addmm_(grad_MR, a).view(x.shape)
        grad_a = grad_MR.t() @ x.reshape(-1, x.shape[-1])
        grad_b = (grad_MN.t() @ down_MR).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


def _adapted(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # What is kept comes first, and nothing is made only to be added: temporaries of three sizes between what
    # stays left a heap with half as much in holes as in use.
    down_MR = x.reshape(-1, x.shape[-1]) @ a.t()
    out = F.linear(x, weight, bias)
    out.view(-1, weight.shape[0]).addmm_(down_MR, b.t(), alpha=scale)
    return out, down_MR


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``x [..., K]`` through a frozen ``weight [N, K]`` and an adapter ``b [N, r] @ a [r, K]`` that learns.

    All of one dtype. Differentiable with respect to ``x``, ``a`` and ``b``.
    """
    if torch.is_grad_enabled():
        return _Adapted.apply(x, weight, bias, a, b, scale)
    return _adapted(x, weight, bias, a, b, scale)[0]
