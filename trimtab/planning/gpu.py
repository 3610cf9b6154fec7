"""Memory of a run on a GPU: what autograd keeps of transformers' own modules, the head, and CUDA's share.

For ``memory.py`` and ``activations.py`` where ``job.engine`` is "gpu". Derived from the source code of torch
2.13, transformers 5.23 and PEFT 0.21, and counted on a CPU with attention that keeps what FlexAttention and
FlashAttention keep (``tests/planning/test_plan_gpu.py``). No GPU was at hand: ``docs/plan-gpu.md`` says what
that leaves open. FSDP2's shards are in ``shards.py``.

Bytes; "a token" says when they are to be multiplied by the tokens of a micro-batch.
"""

from __future__ import annotations

from typing import Literal

from trimtab.planning.job import BYTES, Adapter, Compute, Model
from trimtab.planning.numbers import Number, choose, floor, largest, smallest

WIDE_NORM = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "gpt_oss", "cohere", "cohere2")
"""Norms that multiply by their weight in fp32 and round afterwards; the others round first."""
NO_ROTARY = ("gpt2", "gpt_neo", "gpt_bigcode", "bloom", "opt")
"""Queries and keys go to attention as they were projected."""
FUSED_QKV = ("phi3", "gpt_neox", "falcon")
"""One projection for queries, keys and values: the values keep all of it alive."""
FUSED_GATE = ("phi3", "glm", "glm4")
"""One projection for gate and up."""
WRITTEN_GELU = ("gpt2", "gpt_neo", "gptj", "phi", "codegen")
"""gelu_new, which transformers writes out in seven operations."""
RELU = ("opt",)
ONE_INPUT = ("gpt_neox",)
"""Two norms of the same input."""
WIDE = 4
"""Bytes of a number in what is fp32 in any case: log-sum-exps, statistics, a norm's copy, an adapter."""
FULL = Adapter()


def gpu_kept(model: Model, compute: Compute, adapter: Adapter = FULL, *, widened: bool = True) -> Number:
    """A token and layer: what autograd keeps for the backward pass, of transformers' own modules.

    ``adapter``: of a model that learns by one; frozen weights need no inputs, but PEFT keeps a copy of each
    adapted layer's input in fp32. Not ``widened``: the adapter computes in the run's dtype, as ours do, and
    reads the very inputs that full training keeps; the norms are frozen all the same.
    """
    size, frozen = BYTES[compute], adapter.kind != "none"
    out = 0 if frozen and widened else size
    kept = _norms(model, size, out, frozen) + _attention(model, size) + _mlp(model, size, out)
    if not frozen or widened:
        return kept if not frozen else kept + _adapted(model, adapter, size)
    kept = kept + size * adapter.rank * adapter.layers / model.layers
    # DoRA scales the base's output by its rows' lengths.
    return kept + (size * adapter.ends / model.layers if adapter.kind == "dora" else 0)


def gpu_kept_layer_recomputed(model: Model, compute: Compute) -> Number:
    """A token and layer that is computed again in the backward pass: its input."""
    return BYTES[compute] * model.width


def gpu_ends(model: Model, compute: Compute, adapter: Adapter = FULL) -> Number:
    """A token: ids, positions, rotary tables, and what the final norm keeps."""
    return _tables(model, compute) + _last_norm(model, compute, adapter)


def gpu_activations(
    model: Model, compute: Compute, tokens: Number, again: Number = 0, adapter: Adapter = FULL
) -> Number:
    """Bytes kept once ``tokens`` have gone forward; ``again``: how many layers are computed again."""
    kept = gpu_kept(model, compute, adapter) * (model.layers - again)
    return tokens * (
        kept + gpu_kept_layer_recomputed(model, compute) * again + gpu_ends(model, compute, adapter)
    )


def gpu_in_backward(
    model: Model, compute: Compute, tokens: Number, again: Number = 0, adapter: Adapter = FULL
) -> Number:
    """Bytes on top of :func:`gpu_activations` at the fullest moment of the trunk's backward pass.

    That is in the final norm or in the first layer that goes backward, which may have to be computed again.
    """
    norm = (20 if model.norm == "rms" else 3 * BYTES[compute]) * model.width
    restored = choose(again, gpu_kept(model, compute, adapter), 0)
    layer = restored + gpu_backward(model, compute, adapter) - _last_norm(model, compute, adapter)
    return tokens * largest(norm, layer)


def gpu_backward(model: Model, compute: Compute, adapter: Adapter = FULL) -> Number:
    """A token: gradients and temporaries at the fullest moment of a layer's backward pass.

    It is where the gradients of a gated product's two factors stand beside each other.
    """
    size = BYTES[compute]
    if model.matrices == 3:
        # What the experts' outputs were weighted from has been freed by then.
        inner = 2 * size * model.inner - size * model.experts_used * model.width
    else:
        inner = (2 if model.family in WRITTEN_GELU else 1) * size * model.inner
    if adapter.kind != "none" and size < WIDE:
        # The adapter's part of a gradient is fp32 and is rounded before it is added.
        inner = inner + WIDE * model.inner
    if model.norms == 4:
        # So has what the norm of the MLP's output kept, or that norm's own backward pass is the fullest.
        return largest(size * model.width + inner - 2 * WIDE * model.width, 4 * WIDE * model.width)
    return size * model.width + inner


def gpu_forward(model: Model, compute: Compute, adapter: Adapter = FULL) -> Number:
    """A token of a pass without gradient: one layer's temporaries, ids and hidden states."""
    size, width = BYTES[compute], model.width
    parts = 3 if model.matrices == 3 else 2
    if model.family in FUSED_GATE or model.family in WRITTEN_GELU:
        parts = 4
    routed = choose(model.experts, size * (model.inner + 2 * model.experts_used * width), 0)
    states = (6 if model.family in WRITTEN_GELU else 4) * size * width
    keys = 2 * size * (model.query + model.attended_key)
    attention = states + keys + size * model.attended_value
    moment = largest(states + parts * size * model.inner + routed, attention)
    if adapter.kind != "none":
        # Of a projection: its result, the adapter's in fp32 and that scaled.
        made = 2 if model.family in FUSED_GATE else 1
        parts = 2 if model.matrices == 3 else 1
        moment = largest(moment, (2 * WIDE * made + parts * size) * model.inner + 3 * WIDE * width)
    return _tables(model, compute) + moment


# --- what a layer keeps -------------------------------------------------------------------------------------


def _tables(model: Model, compute: Compute) -> Number:
    return 16 if model.family in NO_ROTARY else 8 + 2 * BYTES[compute] * model.head_width


def _last_norm(model: Model, compute: Compute, adapter: Adapter) -> Number:
    size = BYTES[compute]
    if model.norm == "layer":
        return size * model.width + 8
    return (WIDE + (_scaled(model, size) if adapter.kind == "none" else 0)) * model.width + WIDE


def _scaled(model: Model, size: int) -> int:
    """Bytes of a number that a norm multiplies by its weight."""
    return WIDE if model.family in WIDE_NORM else size


def _norms(model: Model, size: int, out: int, frozen: bool) -> Number:
    """``out``: bytes of a number that the layer behind keeps of a norm's output; ``frozen``: the norm is."""
    if model.norm == "layer":
        inputs = 1 if model.family in ONE_INPUT else model.norms
        return size * model.width * inputs + (out * model.width + 8) * model.norms
    scaled = 0 if frozen else _scaled(model, size)
    # Gemma's second and fourth norm go into the residual stream, which nobody keeps.
    outputs = 2 if model.norms == 4 else model.norms
    kept = ((WIDE + scaled) * model.width + WIDE) * model.norms + out * model.width * outputs
    if model.head_norms:
        heads = (WIDE + scaled) * (model.query + model.key)
        kept = kept + heads + WIDE * (model.heads + model.kv_heads)
    return kept


def _attention(model: Model, size: int) -> Number:
    """Queries, keys, values, output and log-sum-exps: what FlexAttention and FlashAttention keep."""
    kept = size * (2 * model.query + model.attended_key + model.attended_value) + WIDE * model.heads
    return kept + (size * (model.query + model.attended_key) if model.family in FUSED_QKV else 0)


def _mlp(model: Model, size: int, out: int) -> Number:
    """``out``: as in :func:`_norms`, of the last product's input."""
    chosen = (out + size) * model.width + 40
    routed = choose(model.experts, model.experts_used * chosen + WIDE * model.experts, 0)
    if model.matrices == 3:
        return (3 * size + out) * model.inner + routed
    if model.family in RELU:
        return size * model.inner
    return ((4 if model.family in WRITTEN_GELU else 1) * size + out) * model.inner


def _adapted(model: Model, adapter: Adapter, size: int) -> Number:
    """Each adapted layer's input and that of its second factor, in fp32; DoRA: and what both give."""
    inputs = sum((i * count for _, i, _, count in model.linears), 0) / model.layers
    ends, share = model.linear_ends / model.layers, adapter.ends / largest(1, model.linear_ends)
    own = share * inputs
    # Where the input is fp32 already, layers that read the same one keep it once.
    read = own if size < WIDE else smallest(own, 2 * model.width + model.inner)
    kept = WIDE * (read + adapter.rank * adapter.layers / model.layers)
    return kept + ((size + WIDE) * share * (ends - inputs) if adapter.kind == "dora" else 0)


# --- the head -----------------------------------------------------------------------------------------------

CHUNK = 32 * 2**20
"""``models/head.py``: bytes of logits of one chunk …"""
WHOLE = 128 * 2**20
"""… and the most that is computed once and kept."""
PEER = 16
"""fp32 logits, their log-softmax, its gradient and theirs: a cross-entropy over whole logits, a logit."""


def gpu_head(
    model: Model,
    compute: Compute,
    rows: Number,
    *,
    style: Literal["chunked", "whole", "peer"] = "chunked",
    entropy: bool = False,
    learns: bool = True,
) -> Number:
    """Bytes at the fullest moment of the pass over ``rows`` of logits, forward or backward, all of it.

    chunked: ours; whole: ours with logits in one piece; peer: logits rounded, widened to fp32 and given to a
    cross-entropy, as trainers without a fused head do. ``learns``: the head's weight gets a gradient.
    """
    size = BYTES[compute]
    logits = rows * model.vocabulary * size
    # An fp32 copy and logsumexp's exponentials; with entropy the backward pass holds four copies.
    factor = 1 + (16 if entropy else 8) / size
    weight = size * model.vocabulary * model.width if learns else 0
    # The hidden states and their gradient.
    hidden = 2 * size * rows * model.width
    if style == "peer":
        return rows * model.vocabulary * (size + PEER) + weight + hidden
    if style == "whole":
        return logits * factor + weight + hidden
    chunk = largest(1, floor(CHUNK / (model.vocabulary * size))) * model.vocabulary * size
    # Each chunk's gradient of the weight is added to that of the chunks before.
    return hidden + choose(logits - WHOLE, chunk * factor + 2 * weight, logits * factor + weight)


def gpu_head_forward(model: Model, compute: Compute, rows: Number, *, entropy: bool = False) -> Number:
    """The same of a pass without gradient."""
    size = BYTES[compute]
    chunk = smallest(largest(1, floor(CHUNK / (model.vocabulary * size))), rows) * model.vocabulary
    return chunk * (size + 8) + size * rows * model.width


def gpu_head_gradient(model: Model, compute: Compute, *, learns: bool = True) -> Number:
    """The gradient of a tied head, which waits for the embedding's until the end of the backward pass."""
    return BYTES[compute] * model.vocabulary * model.width if model.tied and learns else 0


# --- CUDA ---------------------------------------------------------------------------------------------------

CONTEXT = 0.5 * 2**30
"""Of the driver, the libraries' and PyTorch's kernels; not in PyTorch's own count. docs/plan-gpu.md."""
BLAS = 2 * 32 * 2**20
"""cuBLAS's workspace on Hopper, of the thread that goes forward and of autograd's."""
LINKED = 0.3 * 2**30
"""NCCL's buffers and kernels, beside PyTorch's count, of a process that is one of several. Assumed."""
SLACK = 0.03
"""Of what is allocated: what PyTorch's allocator holds beyond it in a steady state. Assumed."""


def gpu_framework() -> Number:
    """What the device holds beside PyTorch's tensors and workspaces: CUDA's context."""
    return CONTEXT


def gpu_workspace(allocated: Number) -> Number:
    """cuBLAS's workspaces, and what the allocator holds beyond the ``allocated`` bytes of tensors."""
    return BLAS + SLACK * allocated
