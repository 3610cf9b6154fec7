"""A decoder layer as one plain function, for passes without gradient over few tokens: a decode step.

There a layer's arithmetic takes a tenth of a millisecond and the calls of its dozen modules half of one. The
function below is the usual layer (RMSNorm before attention and before a gated MLP, rotary positions); it
stands in for a layer only where a pass over random numbers shows that it computes what the layer computes.
Nothing else about the model changes: the same weights, the same attention function. A linear layer may have a
LoRA adapter of PEFT's plainest kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.kernels.call import compiled
from trimtab.kernels.fused import SKINNY_ROWS, Gate, gated, linear, rms_norm, rotary

KEPT = "_lean"
"""Where a layer keeps its :class:`Lean`."""
GATES: tuple[Gate, ...] = ("silu", "gelu_tanh")
Norm = tuple[torch.Tensor, float, float]
"""Weight, epsilon, offset."""


class Linear(NamedTuple):
    """A linear layer, and the factors and scale of its adapter if it has one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight, self.bias)
        if self.lora is None:
            return y
        a, b, scale = self.lora
        return (y + linear(linear(x.to(a.dtype), a), b) * scale).to(y.dtype)


class Lean:
    """What the function needs of a layer. Parameters are held, not copied: an update shows at once.

    Raises AttributeError for a layer that is built otherwise.
    """

    def __init__(self, layer: Any, offset: float, kind: Gate) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self.norms = [_norm(n, offset) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.head_norms = [
            None if (norm := getattr(attention, name, None)) is None else _norm(norm, offset)
            for name in ("q_norm", "k_norm")
        ]
        projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        gates = [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        self.linears = [linear_of(p) for p in (*projections, *gates)]
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = self.linears
        self.kind: Gate = kind
        self.scaling: float = attention.scaling
        self.width: int = attention.head_dim

    @property
    def window(self) -> int | None:
        """The sliding window; Mistral's layers read theirs from the configuration."""
        of_model = getattr(self.attention.config, "sliding_window", None)
        return getattr(self.attention, "sliding_window", of_model)

    def __call__(
        self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """``[1, L, D] → [1, L, D]``."""
        attention, (cos, sin) = self.attention, positions
        length = hidden.shape[1]
        x = rms_norm(hidden, *self.norms[0])
        heads = [part(x).view(1, length, -1, self.width) for part in (self.q, self.k, self.v)]
        for i, norm in enumerate(self.head_norms):
            if norm is not None:
                heads[i] = rms_norm(heads[i], *norm)
        q, k, v = (h.transpose(1, 2) for h in heads)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        out, _ = attend(
            *(attention, rotary(q, cos, sin), rotary(k, cos, sin), v, mask),
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.window,
        )
        hidden = hidden + self.o(out.reshape(1, length, -1))
        x = rms_norm(hidden, *self.norms[1])
        return hidden + self.down(gated(self.gate(x), self.up(x), self.kind))


def epsilon(module: Any) -> float | None:
    """A norm's epsilon, under either name that transformers' families give it."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _norm(module: Any, offset: float) -> Norm:
    eps = epsilon(module)
    if eps is None:
        raise AttributeError("a norm without epsilon")
    return module.weight, eps, offset


def linear_of(module: Any) -> Linear:
    """The weights of a linear layer, with or without an adapter. Raises AttributeError for another module."""
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    # Not imported for this: a model without adapters needs no PEFT.
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(module) is not lora.Linear or type(module.base_layer) is not nn.Linear:
        raise AttributeError("no plain linear layer")
    (name,) = module.active_adapters if len(module.active_adapters) == 1 else (None,)
    if name not in module.lora_A or module.lora_variant or module.merged or module.disable_adapters:
        raise AttributeError("no plain adapter")
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if b.bias is not None or not isinstance(dropout, nn.Identity):
        raise AttributeError("no plain adapter")
    return Linear(
        module.base_layer.weight, module.base_layer.bias, (a.weight, b.weight, module.scaling[name])
    )


@torch.no_grad()
def lean_layer(layer: nn.Module) -> Callable[..., Any] | None:
    """A forward for layers of this class that takes the lean way where it may; None where it would differ."""
    found = _recognised(layer)
    if found is None:
        return None
    own = type(layer).forward
    offset, kind = found

    def forward(self: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        positions = named.get("position_embeddings")
        if (
            torch.is_grad_enabled()
            or rest
            or positions is None
            or named.get("past_key_values") is not None
            or len(hidden_states) != 1
            or hidden_states.shape[1] > SKINNY_ROWS
            or self.self_attn.config._attn_implementation == "eager"
            or not compiled(hidden_states, positions[0])
        ):
            return own(self, hidden_states, *rest, **named)
        lean = self.__dict__.get(KEPT)
        if lean is None:
            lean = self.__dict__[KEPT] = Lean(self, offset, kind)
        return lean(hidden_states, positions, named.get("attention_mask"))

    forward.recipe = found  # type: ignore[attr-defined]
    return forward


def lean_of(layer: nn.Module) -> Lean | None:
    """What the function needs of a layer that :func:`lean_layer` recognised; None of another."""
    recipe = getattr(getattr(layer.__dict__.get("forward"), "__func__", None), "recipe", None)
    return None if recipe is None else Lean(layer, *recipe)


def _recognised(layer: Any) -> tuple[float, Gate] | None:
    """The norms' offset and the gate with which the function agrees with the layer."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if config is None or getattr(config, "_attn_implementation", "eager") == "eager":
        return None
    for offset in (0.0, 1.0):
        for kind in GATES:
            try:
                lean = Lean(layer, offset, kind)
                draw = torch.Generator().manual_seed(0)
                like = lean.q.weight
                hidden = torch.randn(1, 3, like.shape[1], generator=draw).to(like)
                cos, sin = torch.randn(2, 1, 3, lean.width, generator=draw).to(like)
                named = {"attention_mask": None, "position_embeddings": (cos, sin)}
                result = type(layer).forward(layer, hidden, **named)
                truth = result[0] if isinstance(result, tuple) else result
                tolerance = 1e-4 if like.dtype == torch.float32 else 2e-2
                gap = float((lean(hidden, (cos, sin), None) - truth).abs().max())
            except (AttributeError, TypeError, RuntimeError, ValueError, KeyError, IndexError):
                return None
            if gap <= tolerance * max(1.0, float(truth.abs().max())) and not isinstance(result, tuple):
                return offset, kind
    return None
