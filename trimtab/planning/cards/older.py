"""Readers of decoders older than Llama: LayerNorm, an MLP of two matrices, layers all alike."""

from __future__ import annotations

from typing import Any

from trimtab.planning.cards.decoders import Heads, heads_of, two
from trimtab.planning.cards.parts import Anatomy, Fields, Layer, Linear


def _older(f: Fields, heads: Heads, layer: Layer, norms: int, *, packed: bool = True, **more: Any) -> Anatomy:
    """Layers all alike, LayerNorm, an MLP of two matrices."""
    return Anatomy(
        layers=(layer,) * f.size("num_hidden_layers"),
        width=f.size("hidden_size"),
        heads=heads.count,
        kv_heads=heads.keys,
        head_width=heads.width,
        key=heads.key,
        value=heads.key,
        vocabulary=f.size("vocab_size"),
        context=f.size("max_position_embeddings"),
        tied=f.flag("tie_word_embeddings"),
        matrices=2,
        norms=norms,
        norm="layer",
        gate="none",
        packed=packed,
        **{"other": 2 * f.size("hidden_size"), **more},
    )


def _heads(f: Fields, keys: int | None = None) -> Heads:
    """As many key heads as heads unless ``keys`` says so, whatever a file has under that name."""
    f.values["num_key_value_heads"] = keys
    return heads_of(f, own_width=False)


def gpt2(f: Fields) -> Anatomy:
    """GPT-2, and GPT-BigCode with one key head."""
    width = f.size("hidden_size")
    inner = f.optional("intermediate_size") or 4 * width
    heads = _heads(f, 1 if f.flag("multi_query") else None)
    attention = (
        Linear("c_attn", width, width + 2 * heads.key, True),
        Linear("c_proj", width, width, True),
    )
    layer = Layer((*attention, *two(width, inner, ("c_fc", "c_proj"))), 4 * width, inner)
    return _older(f, heads, layer, 2, positions=f.size("max_position_embeddings"))


def gpt_neo(f: Fields) -> Anatomy:
    """Its local layers are masked, but computed and kept whole: no window that would save anything."""
    width = f.size("hidden_size")
    inner, heads = f.optional("intermediate_size") or 4 * width, _heads(f)
    attention = [Linear(name, width, width) for name in ("k_proj", "v_proj", "q_proj")]
    out = Linear("out_proj", width, width, True)
    layer = Layer((*attention, out, *two(width, inner, ("c_fc", "c_proj"))), 4 * width, inner)
    return _older(f, heads, layer, 2, packed=False, positions=f.size("max_position_embeddings"))


def gptj(f: Fields) -> Anatomy:
    """Attention and MLP share a norm; the head has a bias."""
    width = f.size("hidden_size")
    inner, heads = f.optional("intermediate_size") or 4 * width, _heads(f)
    attention = [Linear(name, width, width) for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    layer = Layer((*attention, *two(width, inner, ("fc_in", "fc_out"))), 2 * width, inner)
    return _older(f, heads, layer, 1, packed=False, head_bias=True)


def gpt_neox(f: Fields) -> Anatomy:
    """One matrix for queries, keys and values."""
    width, inner, bias = f.size("hidden_size"), f.size("intermediate_size"), f.flag("attention_bias")
    heads = _heads(f)
    attention = (
        Linear("query_key_value", width, 3 * width, bias),
        Linear("dense", width, width, bias),
    )
    layer = Layer((*attention, *two(width, inner, ("dense_h_to_4h", "dense_4h_to_h"))), 4 * width, inner)
    return _older(f, heads, layer, 2)


def opt(f: Fields) -> Anatomy:
    """Positions begin at the third row of their table; the embedding may be narrower than the layers."""
    width, inner, bias = f.size("hidden_size"), f.size("intermediate_size"), f.flag("enable_bias")
    heads = _heads(f)
    norm = 2 * width if f.flag("layer_norm_elementwise_affine") else 0
    attention = [Linear(name, width, width, bias) for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    layer = Layer((*attention, *two(width, inner, ("fc1", "fc2"), bias)), 2 * norm, inner)
    embedded = f.optional("word_embed_proj_dim") or width
    ends = (Linear("project_out", width, embedded), Linear("project_in", embedded, width))
    last = f.flag("do_layer_norm_before") and not f.flag("_remove_final_layer_norm")
    return _older(
        f,
        heads,
        layer,
        2,
        positions=f.size("max_position_embeddings") + 2,
        embedded=embedded,
        outside=ends if embedded != width else (),
        other=norm if last else 0,
    )


def falcon(f: Fields) -> Anatomy:
    """Three ways to share keys, and one or two norms where attention and MLP are parallel."""
    width, bias, grouped = f.size("hidden_size"), f.flag("bias"), f.flag("new_decoder_architecture")
    inner = f.optional("intermediate_size") or 4 * width
    if not grouped:
        f.values["num_key_value_heads"] = 1 if f.flag("multi_query") else None
    heads = heads_of(f, own_width=False)
    norms = f.optional("num_ln_in_parallel_attn") or (2 if grouped else 1)
    norms = norms if f.flag("parallel_attn") else 2
    attention = (
        Linear("query_key_value", width, heads.query + 2 * heads.key, bias),
        Linear("dense", width, width, bias),
    )
    parts = (*attention, *two(width, inner, ("dense_h_to_4h", "dense_4h_to_h"), bias))
    return _older(f, heads, Layer(parts, 2 * norms * width, inner), norms, packed=False)


def bloom(f: Fields) -> Anatomy:
    """ALiBi: no position has a limit; the length it was trained at stands for the context."""
    width, heads = f.size("hidden_size"), _heads(f)
    attention = (
        Linear("query_key_value", width, 3 * width, True),
        Linear("dense", width, width, True),
    )
    parts = (*attention, *two(width, 4 * width, ("dense_h_to_4h", "dense_4h_to_h")))
    layer = Layer(parts, 4 * width, 4 * width)
    return _older(f, heads, layer, 2, packed=False, other=4 * width)
