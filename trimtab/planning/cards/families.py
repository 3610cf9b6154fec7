"""The families of decoders that are known, by ``model_type``, and readers of those unlike Llama.

What a configuration leaves out is taken from ``defaults.json``: the defaults of transformers' configuration
classes, with which a test compares it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

from trimtab.planning.cards import decoders, older
from trimtab.planning.cards.decoders import Style, experts, experts_of, gate_of, gated, heads_of
from trimtab.planning.cards.parts import Anatomy, Fields, Layer, Linear

ALIASES = (
    ("num_hidden_layers", "n_layer", "num_layers"),
    ("num_attention_heads", "n_head", "num_heads"),
    ("hidden_size", "n_embd", "n_embed"),
    ("max_position_embeddings", "n_positions", "seq_length"),
    ("num_key_value_heads", "num_kv_heads"),
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
)
"""The first is what the readers ask for; the others are the same field in some family."""


DEFAULTS: dict[str, dict[str, Any]] = json.loads(
    files("trimtab.planning.cards").joinpath("defaults.json").read_text(encoding="utf-8")
)
"""Of each family, what its configuration class has where a file says nothing."""


def read(config: Mapping[str, Any], family: str, where: str) -> Anatomy:
    """The decoder of a configuration of a known family. Raises InputError for sizes that cannot be."""
    values = {**DEFAULTS[family], **config}
    for names in ALIASES:
        if given := [config[name] for name in names if config.get(name) is not None]:
            values[names[0]] = given[0]
    return FAMILIES[family](Fields(values, where))


# --- two that are not like Llama ---------------------------------------------------------------------------


def _deepseek(f: Fields) -> Anatomy:
    """Multi-head latent attention, the first layers dense, then shared and routed experts.

    Without the layers that predict further tokens, which transformers does not build. What is kept of a token
    is the latent and the rotary key, from which values too are computed: hence a value width of 0.
    """
    width, heads, count = f.size("hidden_size"), f.size("num_attention_heads"), f.size("num_hidden_layers")
    bias, mlp_bias = f.flag("attention_bias"), f.flag("mlp_bias")
    latent, rotary = f.size("kv_lora_rank"), f.size("qk_rope_head_dim")
    plain, value, rank = f.size("qk_nope_head_dim"), f.size("v_head_dim"), f.optional("q_lora_rank")
    queries = heads * (plain + rotary)
    query = (
        (Linear("q_proj", width, queries),)
        if rank is None
        else (Linear("q_a_proj", width, rank, bias), Linear("q_b_proj", rank, queries))
    )
    attention = (
        *query,
        Linear("kv_a_proj_with_mqa", width, latent + rotary, bias),
        Linear("kv_b_proj", latent, heads * (plain + value)),
        Linear("o_proj", heads * value, width, bias),
    )
    other = 2 * width + latent + (rank or 0)
    inner, dense = f.size("intermediate_size"), min(f.optional("first_k_dense_replace", least=0) or 0, count)
    layers = (Layer((*attention, *gated(width, inner, mlp_bias)), other, inner),) * dense
    many, used = 0, 0
    if dense < count:
        many, used = experts_of(f)
        own = f.size("moe_intermediate_size")
        shared = own * f.size("n_shared_experts")
        parts = (*attention, *experts(f, width, own), *gated(width, shared, mlp_bias))
        layers += (Layer(parts, other, used * own + shared),) * (count - dense)
    return Anatomy(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=f.optional("num_key_value_heads") or heads,
        head_width=plain + rotary,
        key=latent + rotary,
        value=0,
        latent=True,
        vocabulary=f.size("vocab_size"),
        context=f.size("max_position_embeddings"),
        tied=f.flag("tie_word_embeddings"),
        other=width,
        experts=many,
        experts_used=used,
        gate=gate_of(f),
    )


def _llama4(f: Fields) -> Anatomy:
    """Experts in some layers, with a shared one; chunks of attention_chunk_size count as a window."""
    width, heads, count = f.size("hidden_size"), heads_of(f), f.size("num_hidden_layers")
    bias, inner, own = f.flag("attention_bias"), f.size("intermediate_size_mlp"), f.size("intermediate_size")
    step, many = f.size("interleave_moe_layer_step"), experts_of(f)
    sparse = f.items("moe_layers")
    sparse = list(range(step - 1, count, step)) if sparse is None else sparse
    queries, out = Linear("q_proj", width, heads.query, bias), Linear("o_proj", heads.query, width, bias)
    keys, values = (Linear(name, width, heads.key, bias) for name in ("k_proj", "v_proj"))
    attention = (queries, keys, values, out)
    routed = (*attention, *experts(f, width, own, "router", adapts=True), *gated(width, own))
    kinds = (
        Layer((*attention, *gated(width, inner)), 2 * width, inner),
        Layer(routed, 2 * width, (many[1] + 1) * own),
    )
    each = f.size("no_rope_layer_interval")
    rotary = f.items("no_rope_layers") or [(i + 1) % each for i in range(count)]
    chunk = f.optional("attention_chunk_size") or 0
    chunked = f.items("layer_types") or ["chunked_attention" if r else "" for r in rotary]
    return Anatomy(
        layers=tuple(kinds[i in sparse] for i in range(count)),
        width=width,
        heads=heads.count,
        kv_heads=heads.keys,
        head_width=heads.width,
        key=heads.key,
        value=heads.key,
        vocabulary=f.size("vocab_size"),
        context=f.size("max_position_embeddings"),
        tied=f.flag("tie_word_embeddings"),
        other=width,
        window=chunk,
        windowed=chunked.count("chunked_attention") if chunk else 0,
        experts=many[0] if sparse else 0,
        experts_used=many[1] if sparse else 0,
        head_norms=1 if f.flag("use_qk_norm") else 0,
        gate=gate_of(f),
        packed=False,
    )


# --- all of them --------------------------------------------------------------------------------------------

_LLAMA = Style(bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GEMMA = replace(_LLAMA, mlp_bias=False)
_MISTRAL = Style(rule=decoders.every, layer_types=False)
_QWEN2 = Style(bias=True, rule=decoders.upper)
_QWEN3 = replace(_GEMMA, head_norm="width", rule=decoders.upper)
_OLMO2 = replace(_GEMMA, head_norm="whole")
_COHERE = replace(_GEMMA, norm="layer", norms=1)
_PHI = Style(
    bias=True, out_bias=True, out="dense", mlp=("fc1", "fc2"), mlp_bias=True, norm="layer", norm_rows=2
)
_STARCODER = replace(_MISTRAL, norm="layer", norm_rows=2, mlp=("c_fc", "c_proj"))

FAMILIES: dict[str, Callable[[Fields], Anatomy]] = {
    "bloom": older.bloom,
    "cohere": replace(_COHERE, head_norm="whole", head_norm_if="use_qk_norm"),
    "cohere2": replace(_COHERE, own_width=False, rule=decoders.but_each(4)),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "falcon": older.falcon,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, rule=decoders.alternate),
    "gemma3_text": replace(_GEMMA, norms=4, head_norm="width", rule=decoders.but_each(6)),
    "gpt2": older.gpt2,
    "gpt_bigcode": older.gpt2,
    "gpt_neo": older.gpt_neo,
    "gpt_neox": older.gpt_neox,
    "gpt_oss": replace(
        _GEMMA,
        expert_inner="intermediate_size",
        expert_bias=True,
        router="router",
        sinks=True,
        rule=decoders.alternate,
    ),
    "gptj": older.gptj,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "llama4_text": _llama4,
    "ministral": replace(_MISTRAL, layer_types=True),
    "ministral3": _MISTRAL,
    "mistral": _MISTRAL,
    "mixtral": replace(_MISTRAL, expert_inner="intermediate_size"),
    "olmo": replace(_GEMMA, norm="layer", norm_rows=0),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, rule=decoders.but_each(4)),
    "olmoe": replace(_OLMO2, expert_inner="intermediate_size"),
    "opt": older.opt,
    "phi": replace(_PHI, norms=1, head_norm="rows", head_norm_if="qk_layernorm", head_bias=True),
    "phi3": replace(_MISTRAL, fused=True),
    "phimoe": replace(
        _MISTRAL,
        bias="attention_bias",
        out_bias="attention_bias",
        norm="layer",
        norm_rows=2,
        expert_inner="intermediate_size",
        router="router",
        router_adapts=True,
        head_bias="lm_head_bias",
        window_in_mask=True,
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        bias="qkv_bias",
        expert_inner="moe_intermediate_size",
        some_dense=True,
        shared_expert=True,
        rule=decoders.odd,
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        expert_inner="moe_intermediate_size",
        some_dense=True,
        rule=decoders.if_used,
        layer_types=False,
    ),
    "smollm3": replace(_LLAMA, rule=decoders.without_rotation),
    "stablelm": Style(
        bias="use_qkv_bias",
        norm="layer",
        norm_rows=2,
        head_norm="whole",
        head_norm_if="qk_layernorm",
        parallel_if="use_parallel_residual",
        own_width=False,
    ),
    "starcoder2": replace(_STARCODER, bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"),
}
