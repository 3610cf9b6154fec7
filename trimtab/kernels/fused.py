"""The elementwise parts of a training step: each a plain form, and one pass over memory where it is compiled.

Forward functions are differentiable. Which path runs is decided by the tensors: the compiled one for fp32 and
bf16 on CPU, the plain one otherwise. Both compute in fp32 (fp64 for fp64) and round once, at the end.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Literal

import torch
from torch.nn import functional as F

from trimtab.kernels.build import library

Gate = Literal["silu", "gelu_tanh"]
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


def compiled(*tensors: torch.Tensor) -> bool:
    """There is a compiled kernel for these tensors: all of one dtype it knows, on CPU."""
    dtype = tensors[0].dtype
    if dtype not in SUFFIX or library() is None:
        return False
    # A loop and no generator: a decode step asks some fifty times.
    for tensor in tensors:  # noqa: SIM110
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            return False
    return True


_functions: dict[tuple[str, torch.dtype], Any] = {}


def call(name: str, *arguments: Any) -> None:
    """Run a kernel in the dtype of the first argument, a tensor; its signature fixes the others' dtypes.

    A tensor is passed as a pointer, an int as a C long.
    """
    key = (name, arguments[0].dtype)
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = getattr(library(), name + SUFFIX[arguments[0].dtype])
        function.restype = None
        # None, for an absent tensor, is a null pointer.
        function.argtypes = [_C_TYPES.get(type(a), ctypes.c_void_p) for a in arguments]
    function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])


_C_TYPES: dict[type, Any] = {int: ctypes.c_long, float: ctypes.c_float}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
    wide = x.to(_wide(x.dtype))
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
    wide = gate.to(_wide(gate.dtype))
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


# --- Softmax over the keys that a row sees, and its backward pass: in place, for attention ------------------


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
    wide = scores.to(_wide(scores.dtype)) * scale
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
    wide = _wide(a.dtype)
    return (a.to(wide) * b.to(wide)).sum(-1)


# --- Linear layers: the weight's gradient as a product of matrices that lie as it wants them ----------------

TRANSPOSE_ROWS, TRANSPOSE_WIDTH = 256, 1024
"""Smaller products gain less than the transposition costs."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_MN = grads[0].reshape(-1, weight.shape[0])
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MN @ weight).view(x.shape)
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


@functools.cache
def matrix_unit() -> bool:
    """This CPU has AMX for bf16, and the system lets this process use it."""
    built = library()
    return built is not None and bool(built.skinny_available())


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


# --- Log-probability of one token a row, and the row's entropy ----------------------------------------------


class _SelectedLogps(torch.autograd.Function):
    """With z = logits / T, p = softmax(z), H = −Σ p·log p:  ∂logp/∂z = onehot − p,  ∂H/∂z = −p·(log p + H).

    Only the logits themselves are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV, targets_C = logits_CV.contiguous(), targets_C.contiguous()
        rows, vocabulary = logits_CV.shape
        if compiled(logits_CV):
            logps, lse, entropy = torch.zeros(3, rows)
            found = entropy if with_entropy else None
            call("logps", logits_CV, targets_C, logps, lse, found, rows, vocabulary, 1.0 / temperature)
        else:
            logps, lse, entropy = _plain_logps(logits_CV, targets_C, temperature, with_entropy)
        ctx.save_for_backward(logits_CV, targets_C, lse, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits_CV, targets_C, lse, entropy = ctx.saved_tensors
        grad, grad_entropy = grads[0].contiguous(), None
        # A loss that does not use the entropy sends zeros, and then its term costs nothing.
        if ctx.with_entropy and grads[1] is not None and bool(grads[1].any()):
            grad_entropy = grads[1].contiguous()
        if compiled(logits_CV):
            out = torch.empty_like(logits_CV)
            sizes = (*logits_CV.shape, 1.0 / ctx.temperature)
            call("logps_backward", logits_CV, targets_C, lse, entropy, grad, grad_entropy, out, *sizes)
        else:
            out = _plain_logps_backward(
                logits_CV, targets_C, lse, entropy, grad, grad_entropy, ctx.temperature
            )
        return out, None, None, None


def _plain_logps(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = logits_CV.to(_wide(logits_CV.dtype), copy=True)
    if temperature != 1.0:
        z /= temperature
    lse = torch.logsumexp(z, dim=-1)
    logps = z.gather(-1, targets_C[:, None])[:, 0] - lse
    entropy = torch.zeros_like(lse)
    if with_entropy:
        # −inf logits (forbidden tokens) carry no mass: 0·(−inf) must be 0 here, not NaN.
        z.sub_(lse[:, None]).clamp_(min=torch.finfo(z.dtype).min)
        entropy = -(torch.exp(z).mul_(z)).sum(-1)
    return logps, lse, entropy


def _plain_logps_backward(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    z = logits_CV.to(lse.dtype, copy=True)
    if temperature != 1.0:
        z /= temperature
    z -= lse[:, None]
    weight = -grad[:, None]
    if grad_entropy is not None:
        z.clamp_(min=torch.finfo(z.dtype).min)
        out = torch.exp(z) * (weight - grad_entropy[:, None] * (z + entropy[:, None]))
    else:
        out = z.exp_().mul_(weight)
    out.scatter_add_(-1, targets_C[:, None], grad[:, None].to(out.dtype))
    if temperature != 1.0:
        out /= temperature
    return out.to(logits_CV.dtype)


def selected_logps(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and the distribution's entropy, both ``[C]``, in nats, fp32 or wider.

    Without ``entropy`` the second tensor is zeros.
    """
    return _SelectedLogps.apply(logits_CV, targets_C, temperature, entropy)
