"""A decoder layer as one plain function, for passes without gradient over few tokens: a decode step.

There a layer's arithmetic takes a tenth of a millisecond and the calls of its dozen modules half of one. The
function below is the usual layer (RMSNorm before attention and before a gated MLP, rotary positions); it
stands in for a layer only where a pass of a small twin of the layer, over random numbers, shows that it
computes what the layer computes.
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
from trimtab.models.drawn import Draw, only, twin_of

KEPT = "_lean"
"""Where a layer keeps its :class:`Lean`."""
GATES: tuple[Gate, ...] = ("silu", "gelu_tanh")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")
WIDTH, INNER, RANK = 32, 16, 2
"""Of the twins that checks compute with."""
CHECKED_ROWS = 16
FAR = 64.0
"""How far a gate's inputs are taken in its check."""
TOLERANCE = 1e-5
"""Of the largest number. Roundings of fp32 make a fortieth of it, gelu's two forms differ by ten times it."""
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
        self.norms = [_norm(n, offset) for n in (getattr(layer, name) for name in LAYER_NORMS)]
        self.head_norms = [
            None if (norm := getattr(attention, name, None)) is None else _norm(norm, offset)
            for name in HEAD_NORMS
        ]
        projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        gates = [getattr(mlp, name) for name in PROJECTIONS]
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


def gate_of(mlp: Any) -> Gate | None:
    """The kernel's gate that stands between the MLP's projections; None where none computes what it does.

    Of its projections only the shapes are looked at, be they plain, quantised or with an adapter.
    """
    own = {name: getattr(mlp, name, None) for name in PROJECTIONS}
    if not all(hasattr(part, "in_features") for part in own.values()) or not hasattr(mlp, "act_fn"):
        return None
    draw = Draw()
    sizes = ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
    parts = {name: draw.linear(own[name], *size) for name, size in zip(PROJECTIONS, sizes, strict=True)}
    gate, up, down = parts.values()
    twin = twin_of(mlp, dict(parts))
    if not only(twin, parts.values()):
        return None
    x = draw(CHECKED_ROWS, WIDTH)
    # Where activations differ, and far out, where some families clamp.
    inputs = [x, 3 * x, x * (FAR / gate(x).abs().max())]
    try:
        truth = [twin(x) for x in inputs]
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return None
    for kind in GATES:
        ours = [down(gated(gate(x), up(x), kind)) for x in inputs]
        if all(map(_same, ours, truth)):
            return kind
    return None


def _recognised(layer: Any) -> tuple[float, Gate] | None:
    """The norms' offset and the gate with which the function agrees with the layer."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if config is None or getattr(config, "_attn_implementation", "eager") == "eager":
        return None
    draw = Draw()
    try:
        twin = _twin(layer, draw)
        kind = None if twin is None else gate_of(layer.mlp)
        if twin is None or kind is None:
            return None
        hidden = draw(1, 3, WIDTH)
        cos, sin = draw(2, 1, 3, layer.self_attn.head_dim)
        named = {"attention_mask": None, "position_embeddings": (cos, sin)}
        truth = type(layer).forward(twin, hidden, **named)
        for offset in (0.0, 1.0):
            # What the layer adds, so that what it leaves as it is makes nothing look alike.
            ours = Lean(twin, offset, kind)(hidden, (cos, sin), None)
            if isinstance(truth, torch.Tensor) and _same(ours - hidden, truth - hidden):
                return offset, kind
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError, IndexError):
        return None
    return None


def _twin(layer: Any, draw: Draw) -> Any:
    """The layer, :data:`WIDTH` wide, with the heads that it has; None where it holds more than is read here.

    Raises AttributeError for a layer that is built otherwise.
    """
    attention, mlp = layer.self_attn, layer.mlp
    width, heads = attention.q_proj.in_features, attention.o_proj.in_features
    outside = {n: _small_norm(getattr(layer, n), width, WIDTH, draw) for n in LAYER_NORMS}
    own = [name for name in HEAD_NORMS if getattr(attention, name, None) is not None]
    inside = {
        n: _small_norm(getattr(attention, n), attention.head_dim, attention.head_dim, draw) for n in own
    }
    projections = {
        name: _small(part := getattr(attention, name), WIDTH, part.out_features, draw)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    projections["o_proj"] = _small(attention.o_proj, heads, WIDTH, draw)
    gates = {name: _small(getattr(mlp, name), WIDTH, INNER, draw) for name in PROJECTIONS[:2]}
    gates["down_proj"] = _small(mlp.down_proj, INNER, WIDTH, draw)
    twin = twin_of(
        layer,
        {
            **outside,
            "self_attn": twin_of(attention, {**projections, **inside}),
            "mlp": twin_of(mlp, gates),
        },
    )
    parts = (*outside.values(), *inside.values(), *projections.values(), *gates.values())
    return twin if only(twin, parts) else None


def _small_norm(norm: Any, width: int, small: int, draw: Draw) -> nn.Module:
    if norm.weight.shape != (width,) or len(list(norm.parameters())) != 1:
        raise AttributeError("a norm of another form")
    return twin_of(norm, weights={"weight": draw(small)})


def _small(module: Any, inputs: int, outputs: int, draw: Draw) -> nn.Module:
    """A linear layer of that size, with an adapter that has an effect where the module has one."""
    if linear_of(module).lora is None:
        return draw.linear(module, inputs, outputs)
    (name,) = module.active_adapters
    adapter = {
        "lora_A": draw.linear(None, inputs, RANK),
        "lora_B": draw.linear(None, RANK, outputs),
    }
    parts: dict[str, nn.Module] = {key: nn.ModuleDict({name: part}) for key, part in adapter.items()}
    return twin_of(module, {**parts, "base_layer": draw.linear(module.base_layer, inputs, outputs)})


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
