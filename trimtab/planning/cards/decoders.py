"""Llama and what was made after it: one reader of configurations, told apart by a Style.

Sizes are those of the modules that transformers 5 builds: experts are stacked into two tensors a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import InputError
from trimtab.planning.cards.parts import Anatomy, Fields, Layer, Linear

Rule = Callable[[int], bool]
"""Layer i has the sliding window."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a family differs from Llama. A bias that is text is the field that says whether there is one."""

    bias: bool | str = False
    """Of queries, keys and values."""
    out_bias: bool | str = False
    out: str = "o_proj"
    own_width: bool = True
    """It heeds a head_dim other than hidden_size / heads."""
    fused: bool = False
    """One matrix for queries, keys and values, and one for gate and up."""
    mlp: tuple[str, str] | None = None
    """Names of the two matrices of an MLP without a gate."""
    mlp_bias: bool | str = False
    expert_inner: str = ""
    """Field with an expert's width; "" for a dense model."""
    some_dense: bool = False
    """It heeds mlp_only_layers and decoder_sparse_step: layers without experts."""
    expert_bias: bool = False
    router: str = "gate"
    router_adapts: bool = False
    """transformers has the router as a linear module."""
    shared_expert: bool = False
    sinks: bool = False
    window_in_mask: bool = False
    """Its attention is not told of the window, which then cannot be packed."""
    norm: Literal["rms", "layer"] = "rms"
    norm_rows: int = 1
    """Vectors of a norm: 1, 2 with a bias, 0 without weights."""
    norms: int = 2
    head_norm: Literal["", "width", "rows", "whole"] = ""
    """Queries and keys are normed by weights of one head's width (rows: and biases) or of all heads."""
    head_norm_if: str = ""
    """Field that says whether they are."""
    parallel_if: str = ""
    """Field that says that attention and MLP share one norm."""
    head_bias: bool | str = False
    rule: Callable[[Fields], Rule | None] | None = None
    """Which layers have the window, where the file has no layer_types."""
    layer_types: bool = True
    """It heeds layer_types."""

    def __call__(self, f: Fields) -> Anatomy:
        """The decoder of a configuration."""
        width, heads = f.size("hidden_size"), heads_of(f, self.own_width)
        norms = self.norms - (1 if self.parallel_if and f.flag(self.parallel_if) else 0)
        normed = self.head_norm if not self.head_norm_if or f.flag(self.head_norm_if) else ""
        whole = heads.query + heads.key
        rows = {"": 0, "width": 2 * heads.width, "rows": 4 * heads.width, "whole": whole}
        other = norms * self.norm_rows * width + rows[normed] + (heads.count if self.sinks else 0)
        attention = self._attention(f, width, heads)
        layers = []
        for i in range(f.size("num_hidden_layers")):
            parts, inner = self._mlp(f, i, width)
            layers.append(Layer((*attention, *parts), other, inner))
        sparse = any(part.copies > 1 for layer in layers for part in layer.linears)
        experts, used = experts_of(f) if sparse else (0, 0)
        window, windowed = windows_of(f, self.rule, self.layer_types)
        return Anatomy(
            layers=tuple(layers),
            width=width,
            heads=heads.count,
            kv_heads=heads.keys,
            head_width=heads.width,
            key=heads.key,
            value=heads.key,
            vocabulary=f.size("vocab_size"),
            context=f.size("max_position_embeddings"),
            tied=f.flag("tie_word_embeddings"),
            other=self.norm_rows * width,
            head_bias=_holds(f, self.head_bias),
            window=window,
            windowed=windowed,
            experts=experts,
            experts_used=used,
            matrices=2 if self.mlp else 3,
            norms=norms,
            head_norms=1 if normed else 0,
            norm=self.norm,
            gate="none" if self.mlp else gate_of(f),
            packed=not self.sinks
            and not (self.window_in_mask and windowed)
            and f.values.get("attn_logit_softcapping") is None,
        )

    def _attention(self, f: Fields, width: int, heads: Heads) -> tuple[Linear, ...]:
        bias = _holds(f, self.bias)
        out = Linear(self.out, heads.query, width, _holds(f, self.out_bias))
        if self.fused:
            return Linear("qkv_proj", width, heads.query + 2 * heads.key, bias), out
        keys, values = (Linear(name, width, heads.key, bias) for name in ("k_proj", "v_proj"))
        return Linear("q_proj", width, heads.query, bias), keys, values, out

    def _mlp(self, f: Fields, i: int, width: int) -> tuple[tuple[Linear, ...], int]:
        """Of layer i, and its inner width."""
        if self.expert_inner and (not self.some_dense or _sparse(f, i)):
            inner, used = f.size(self.expert_inner), experts_of(f)[1]
            parts = experts(f, width, inner, self.router, bias=self.expert_bias, adapts=self.router_adapts)
            if not self.shared_expert:
                return parts, used * inner
            own = f.size("shared_expert_intermediate_size")
            gate = Linear("shared_expert_gate", width, 1)
            return (*parts, *gated(width, own), gate), used * inner + own
        inner, bias = f.size("intermediate_size"), _holds(f, self.mlp_bias)
        if self.fused:
            return (Linear("gate_up_proj", width, 2 * inner), Linear("down_proj", inner, width)), inner
        if self.mlp:
            return two(width, inner, self.mlp, bias), inner
        return gated(width, inner, bias), inner


def _holds(f: Fields, option: bool | str) -> bool:
    return f.flag(option) if isinstance(option, str) else option


def _sparse(f: Fields, i: int) -> bool:
    """Layer i of a Qwen model has experts."""
    step = f.optional("decoder_sparse_step") or 1
    return i not in (f.items("mlp_only_layers") or []) and (i + 1) % step == 0


# --- pieces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention's sizes."""

    count: int
    keys: int
    """Key and value heads."""
    width: int

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.count * self.width

    @property
    def key(self) -> int:
        """Width of all keys; values have the same."""
        return self.keys * self.width


def heads_of(f: Fields, own_width: bool = True) -> Heads:
    """Without key heads as many as query heads; without a head width (or none of its own) an equal share."""
    count, width = f.size("num_attention_heads"), f.size("hidden_size")
    keys = f.optional("num_key_value_heads") or count
    f.divided("num_attention_heads", "num_key_value_heads", count, keys)
    given = f.optional("head_dim") if own_width else None
    return Heads(count, keys, given or f.divided("hidden_size", "num_attention_heads", width, count))


def gated(width: int, inner: int, bias: bool = False) -> tuple[Linear, ...]:
    """down(act(gate) · up)."""
    return (
        Linear("gate_proj", width, inner, bias),
        Linear("up_proj", width, inner, bias),
        Linear("down_proj", inner, width, bias),
    )


def two(width: int, inner: int, names: tuple[str, str], bias: bool = True) -> tuple[Linear, ...]:
    """down(act(up))."""
    return Linear(names[0], width, inner, bias), Linear(names[1], inner, width, bias)


def experts(
    f: Fields, width: int, inner: int, router: str = "gate", *, bias: bool = False, adapts: bool = False
) -> tuple[Linear, ...]:
    """A router and its experts, which transformers stacks into two tensors."""
    count, used = experts_of(f)
    return (
        Linear(router, width, count, bias, adapts=adapts),
        Linear("gate_up_proj", width, 2 * inner, bias, count, used, adapts=False),
        Linear("down_proj", inner, width, bias, count, used, adapts=False),
    )


def experts_of(f: Fields) -> tuple[int, int]:
    """How many a layer has, and how many a token goes through."""
    count, used = f.size("num_experts"), f.size("num_experts_per_tok")
    if used > count:
        raise InputError(f"{f.where}: num_experts_per_tok is {used}, but a layer has {count} experts")
    return count, used


def gate_of(f: Fields) -> Literal["silu", "gelu"]:
    """The activation of a gated MLP."""
    return "gelu" if "gelu" in (f.text("hidden_activation") or f.text("hidden_act")) else "silu"


# --- sliding windows ----------------------------------------------------------------------------------------


def windows_of(
    f: Fields, rule: Callable[[Fields], Rule | None] | None, layer_types: bool = True
) -> tuple[int, int]:
    """The window, and how many layers have it."""
    layers, found = f.size("num_hidden_layers"), rule(f) if rule else None
    window = f.optional("sliding_window", least=0) or 0
    if rule is None or not window:
        return 0, 0
    kinds = f.items("layer_types") if layer_types else None
    if kinds is not None:
        if len(kinds) != layers:
            raise InputError(f"{f.where}: layer_types names {len(kinds)} layers of {layers}")
        return window, sum(kind == "sliding_attention" for kind in kinds)
    return window, sum(map(found, range(layers))) if found else 0


def every(f: Fields) -> Rule:
    """All layers."""
    return lambda i: True


def alternate(f: Fields) -> Rule:
    """Every other one, the first included."""
    return lambda i: i % 2 == 0


def but_each(n: int) -> Callable[[Fields], Rule]:
    """All but each n-th layer; sliding_window_pattern may say another n."""

    def rule(f: Fields) -> Rule:
        each = f.optional("sliding_window_pattern") or n
        return lambda i: (i + 1) % each != 0

    return rule


def upper(f: Fields) -> Rule | None:
    """Those from max_window_layers on (Qwen 2 and 3), if at all."""
    first = f.optional("max_window_layers", least=0) or 0
    return (lambda i: i >= first) if _used(f) else None


def odd(f: Fields) -> Rule | None:
    """Every other one below max_window_layers (Qwen2-MoE), if at all."""
    last = f.optional("max_window_layers", least=0) or 0
    return (lambda i: i % 2 == 0 and i < last) if _used(f) else None


def if_used(f: Fields) -> Rule | None:
    """All layers (Qwen3-MoE), if at all."""
    return every(f) if _used(f) else None


def without_rotation(f: Fields) -> Rule | None:
    """Those without rotary positions (SmolLM3), if at all."""
    each, layers = f.size("no_rope_layer_interval"), f.size("num_hidden_layers")
    rotary = f.items("no_rope_layers") or [(i + 1) % each for i in range(layers)]
    return (lambda i: not rotary[i]) if f.flag("use_sliding_window") else None


def _used(f: Fields) -> bool:
    """Qwen drops the window itself where it is not used, whatever layer_types says."""
    if not f.flag("use_sliding_window"):
        f.values["sliding_window"] = None
        return False
    return True
