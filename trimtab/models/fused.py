"""Puts the fused kernels into a loaded model: norms, gated activations, rotary embeddings.

What is replaced is the forward of a module on this instance, and only where a call on random numbers shows
that the kernel computes what the module computes. No class of transformers is touched, no weight moves, and a
tensor that the kernels do not take (another device, another dtype) goes the module's own way.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from trimtab.kernels.build import library
from trimtab.kernels.call import compiled
from trimtab.kernels.fused import Gate, adapted_linear, gated, linear, rms_norm, rotary
from trimtab.models.lean import KEPT, epsilon, gate_of, lean_layer, linear_of

ROTARY = "apply_rotary_pos_emb"
"""The name under which transformers' modelling files hold the function."""
TOLERANCE = 1e-5
CHECKED_ROWS = 16
"""Outputs of a layer with an adapter that its check computes."""


def fuse(model: nn.Module) -> dict[str, int]:
    """Use the kernels wherever they agree; the number of modules by what was replaced in them.

    What is replaced already (in a copy of a fused model) stays as it is.
    """
    counts = dict.fromkeys(BUILDERS, 0)
    if library() is None or next(model.parameters()).device.type != "cpu":
        return counts
    checked: dict[tuple[str, Hashable], Callable[..., Any] | None] = {}
    for module in model.modules():
        if (done := _replaced(module)) is not None:
            counts[done] += 1
            continue
        kind = _kind(module)
        for what, build in BUILDERS.items():
            key = (what, kind)
            if key not in checked:
                checked[key] = build(module)
                if checked[key] is not None:
                    checked[key].replaces = what  # type: ignore[union-attr]
            if (forward := checked[key]) is not None:
                module.forward = types.MethodType(forward, module)
                counts[what] += 1
    return counts


def unfuse(model: nn.Module) -> None:
    """The inverse of :func:`fuse`."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
        module.__dict__.pop(KEPT, None)


def _replaced(module: nn.Module) -> str | None:
    """What :func:`fuse` replaced in the module, in this tree or in the one it was copied from."""
    return getattr(getattr(module.__dict__.get("forward"), "__func__", None), "replaces", None)


def _kind(module: nn.Module) -> Hashable:
    """Equal for modules that one check can stand for: they differ in the values of their weights only.

    Not the class alone: Gemma 3n has norms with and without a weight, and dense and sparse layers, in one;
    SmolLM3 has attention with and without rotary positions.
    """
    children = {name: (type(child), _numbers(child)) for name, child in module.named_children()}
    parameters = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    # An adapter may be in some layers only, deeper down.
    below = tuple(type(m) for m in module.modules())
    return type(module), _numbers(module), frozenset((parameters | children).items()), below


def _numbers(module: nn.Module) -> Hashable:
    simple = {name: v for name, v in vars(module).items() if isinstance(v, bool | int | float | str)}
    return frozenset((name, v) for name, v in simple.items() if name not in ("layer_idx", "training"))


@torch.no_grad()
def _norm(module: nn.Module) -> Callable[..., Any] | None:
    weight, eps = getattr(module, "weight", None), epsilon(module)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or eps is None:
        return None
    if "RMSNorm" not in type(module).__name__ or len(list(module.parameters())) != 1:
        return None
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, len(weight), generator=draw) for n in (3, 1))
    own = torch.func.functional_call(module, {"weight": w[0]}, (x,))
    for offset in (0.0, 1.0):
        if _agree(own, rms_norm(x, w[0], eps, offset)):

            def forward(self: Any, x: torch.Tensor, offset: float = offset) -> torch.Tensor:
                if compiled(x, self.weight):
                    return rms_norm(x, self.weight, epsilon(self), offset)  # type: ignore[arg-type]
                return type(self).forward(self, x)

            return forward
    return None


@torch.no_grad()
def _gate(module: nn.Module) -> Callable[..., Any] | None:
    weight = getattr(getattr(module, "gate_proj", None), "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    kind = gate_of(module)
    if kind is None:
        return None

    def forward(self: Any, x: torch.Tensor, kind: Gate = kind) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), kind))

    return forward


@torch.no_grad()
def _attention(module: nn.Module) -> Callable[..., Any] | None:
    own = type(module).forward
    names = getattr(getattr(own, "__code__", None), "co_names", ())
    function = getattr(own, "__globals__", {}).get(ROTARY)
    if ROTARY not in names or function is None:
        return None
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=draw) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, 3, 8, generator=draw)
    try:
        if not all(map(_agree, function(q, k, cos, sin), (rotary(q, cos, sin), rotary(k, cos, sin)))):
            return None
    except (TypeError, RuntimeError, ValueError):
        return None

    def apply(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        plain = not rest and not named and len(q) == 1 and q.shape[-1] == cos.shape[-1]
        if plain and compiled(q, k, cos, sin):
            return rotary(q, cos, sin), rotary(k, cos, sin)
        return function(q, k, cos, sin, *rest, **named)

    # The same code with one name standing for another function, for this module only.
    scope = {**own.__globals__, ROTARY: apply}
    forward = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


@torch.no_grad()
def _activation(module: nn.Module) -> Callable[..., Any] | None:
    """The tanh form of gelu, which some families write out in seven operations."""
    if "GELU" not in type(module).__name__ or isinstance(module, nn.GELU):
        return None
    x = torch.linspace(-6, 6, 25)
    try:
        same = _agree(module(x), nn.functional.gelu(x, approximate="tanh"))
    except (TypeError, RuntimeError, ValueError):
        return None
    return (lambda self, x: nn.functional.gelu(x, approximate="tanh")) if same else None


def _linear(module: nn.Module) -> Callable[..., Any] | None:
    # The class itself, not an adapter's or a quantised one; nothing to check, the forward pass is PyTorch's.
    if type(module) is not nn.Linear:
        return None
    return lambda self, x: linear(x, self.weight, self.bias)


@torch.no_grad()
def _adapter(module: nn.Module) -> Callable[..., Any] | None:
    """A linear layer with a plain adapter; what computes it is chosen at each call, by its dtypes."""
    if not hasattr(module, "lora_A"):
        return None
    try:
        part = linear_of(module)
    except AttributeError:
        return None
    assert part.lora is not None
    draw = torch.Generator().manual_seed(0)
    # Of few rows, in fp32: a layer of a large model need not be drawn whole to be checked.
    rows, inputs = min(CHECKED_ROWS, part.weight.shape[0]), part.weight.shape[1]
    rank = part.lora[0].shape[0]
    x, w, a, b = (
        torch.randn(shape, generator=draw)
        for shape in ((3, inputs), (rows, inputs), (rank, inputs), (rows, rank))
    )
    # A new adapter's B is 0, and would agree whatever came of it.
    names = {id(t): name for name, t in module.named_parameters()}
    given = {names[id(old)]: new for old, new in zip((part.weight, *part.lora[:2]), (w, a, b), strict=True)}
    bias = None if part.bias is None else part.bias[:rows].float()
    if bias is not None:
        given[names[id(part.bias)]] = bias
    own = torch.func.functional_call(module, given, (x,))
    if not _agree(own, adapted_linear(x, w, bias, a, b, part.lora[2]), 1e-4):
        return None

    def forward(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        with contextlib.suppress(AttributeError):
            weight, bias, lora = linear_of(self)
            if lora is not None and not rest and not named and not weight.requires_grad:
                a, b, scale = lora
                if compiled(x) and x.dtype == weight.dtype == a.dtype == b.dtype:
                    return adapted_linear(x, weight, bias, a, b, scale)
        return type(self).forward(self, x, *rest, **named)

    return forward


def _layer(module: nn.Module) -> Callable[..., Any] | None:
    return lean_layer(module) if hasattr(module, "self_attn") else None


BUILDERS = {
    "norms": _norm,
    "gates": _gate,
    "rotary": _attention,
    "activations": _activation,
    "linears": _linear,
    "adapters": _adapter,
    "layers": _layer,
}


def _agree(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(a.abs().max())))
