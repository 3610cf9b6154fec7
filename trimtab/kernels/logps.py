"""Log-probability of one token a row, and the row's entropy, in one pass over the logits each way."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.kernels.call import call, compiled
from trimtab.kernels.call import wide as wide_of

Temperature = float | torch.Tensor
"""One for all rows, or ``[C]``, one a row."""


class _SelectedLogps(torch.autograd.Function):
    """With z = logits / T, p = softmax(z), H = −Σ p·log p:  ∂logp/∂z = onehot − p,  ∂H/∂z = −p·(log p + H).

    Only the logits themselves are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_CV: torch.Tensor,
        targets_C: torch.Tensor,
        temperature: Temperature,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV, targets_C = logits_CV.contiguous(), targets_C.contiguous()
        if isinstance(temperature, torch.Tensor):
            logps, lse, entropy = logits_CV.new_zeros(3, len(logits_CV), dtype=wide_of(logits_CV.dtype))
            ctx.parts = _rows_by(temperature)
            for value, rows in ctx.parts:
                made = _logps(logits_CV[rows], targets_C[rows], value, with_entropy)
                logps[rows], lse[rows], entropy[rows] = made
        else:
            ctx.parts = None
            logps, lse, entropy = _logps(logits_CV, targets_C, temperature, with_entropy)
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
        if ctx.parts is None:
            given = (logits_CV, targets_C, lse, entropy, grad, grad_entropy)
            return _logps_backward(*given, ctx.temperature), None, None, None
        out = torch.empty_like(logits_CV)
        for value, rows in ctx.parts:
            part = (logits_CV[rows], targets_C[rows], lse[rows], entropy[rows], grad[rows])
            of_entropy = None if grad_entropy is None else grad_entropy[rows]
            out[rows] = _logps_backward(*part, of_entropy, value)
        return out, None, None, None


def _rows_by(temperature_C: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Each temperature and its rows: a row's numbers are those of a call at its temperature alone."""
    values = temperature_C.unique().tolist()
    return [(value, (temperature_C == value).nonzero()[:, 0]) for value in values]


def _logps(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of the target, log Σ exp z and entropy, ``[C]`` each."""
    if not compiled(logits_CV):
        return _plain_logps(logits_CV, targets_C, temperature, with_entropy)
    rows, vocabulary = logits_CV.shape
    logps, lse, entropy = torch.zeros(3, rows)
    found = entropy if with_entropy else None
    call("logps", logits_CV, targets_C, logps, lse, found, rows, vocabulary, 1.0 / temperature)
    return logps, lse, entropy


def _logps_backward(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    if not compiled(logits_CV):
        return _plain_logps_backward(logits_CV, targets_C, lse, entropy, grad, grad_entropy, temperature)
    out = torch.empty_like(logits_CV)
    sizes = (*logits_CV.shape, 1.0 / temperature)
    call("logps_backward", logits_CV, targets_C, lse, entropy, grad, grad_entropy, out, *sizes)
    return out


def _plain_logps(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = logits_CV.to(wide_of(logits_CV.dtype), copy=True)
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
    logits_CV: torch.Tensor, targets_C: torch.Tensor, temperature: Temperature = 1.0, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and the distribution's entropy, both ``[C]``, in nats, fp32 or wider.

    ``temperature`` is one for all rows or ``[C]``, one a row. Without ``entropy`` the second tensor is zeros.
    """
    return _SelectedLogps.apply(logits_CV, targets_C, temperature, entropy)
