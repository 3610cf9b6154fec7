"""What a pass keeps for its backward pass, and what it needs for a moment: bytes on a CPU with our kernels.

Counted by hand from what each operation saves (``kernels/``, ``models/attention.py``, ``models/head.py``) and
held against what a process holds, in ``benchmarks/plan/``. A GPU, where transformers' own modules run, is
in ``gpu.py``.
"""

from __future__ import annotations

from trimtab.errors import InputError
from trimtab.planning import gpu
from trimtab.planning.job import BYTES, Adapter, Compute, Job, Model
from trimtab.planning.numbers import Number, ceil, choose, floor, largest, smallest

MIB = 2**20
CHUNK = 32 * MIB
"""``models/head.py``: logits of one chunk …"""
KEPT = 128 * MIB
"""… and the most that is kept whole."""

NEAR = 1.05
"""A run measures its least, which a plan may be so far above: in between the run decides."""


def layer_kept(model: Model, compute: Compute, adapter: Adapter) -> Number:
    """Bytes a token that one layer keeps for its backward pass.

    Norms keep what they read and its scale; a linear layer what it reads, which the norm made; attention its
    rotated queries and keys, its values, its output and one fp32 number a head; the output projection a copy
    of that output in its own order; a gated MLP gate, up and their product. Under an adapter the frozen layer
    needs no inputs, but the small matrices beside it do.
    """
    b = BYTES[compute]
    norms = model.norms * (b * model.width + 4)
    attention = b * (2 * model.query + model.attended_key + model.attended_value) + 4 * model.heads
    heads = model.head_norms * (b * (model.query + model.attended_key) + 4 * (model.heads + model.kv_heads))
    between = (model.matrices - 1) * b * model.inner
    if model.family in gpu.FUSED_GATE:
        # Not our fused gate: the activation's output is kept as well.
        between = between + b * model.inner
    if model.family in gpu.ONE_INPUT:
        norms = norms - b * model.width
    # The first two norms feed linear layers; those that a family adds feed the residual stream. An adapter
    # computes in the dtype of the run, so that it reads what its base reads.
    read = b * (2 * model.width + model.query + model.inner)
    return norms + attention + heads + between + read + adapter_kept(model, compute, adapter)


def adapter_kept(model: Model, compute: Compute, adapter: Adapter) -> Number:
    """Bytes a token and layer on top: what goes from the first small matrix to the second."""
    if adapter.kind == "none":
        return 0
    kept = adapter.rank * adapter.layers / model.layers
    if adapter.kind == "dora":
        # The base's output, which the rows' lengths multiply.
        kept = kept + adapter.ends / model.layers
    return BYTES[compute] * kept


def layer_moment(job: Job, model: Model, compute: Compute) -> Number:
    """Bytes a token that a layer needs at its fullest without gradient: the MLP's numbers and two others."""
    if job.engine == "gpu":
        return gpu.gpu_forward(model, compute)
    return BYTES[compute] * (2 * model.width + model.matrices * model.inner)


def ends(job: Job, model: Model) -> Number:
    """Bytes a token that is kept outside the layers: the final norm's input, scale and output."""
    if job.engine == "gpu":
        return gpu.gpu_ends(model, job.compute, job.adapter)
    return 2 * BYTES[job.compute] * model.width + 4


def trunk_kept(job: Job, model: Model, tokens: Number) -> Number:
    """Bytes kept at the end of a training micro-batch's forward pass through the trunk."""
    each, least = per_layer(job, model), BYTES[job.compute] * model.width
    whole = model.layers * each + ends(job, model)
    if job.recompute == "none":
        return tokens * whole
    return tokens * (whole - again(job, model) * (each - least))


def scores_kept(job: Job, model: Model) -> Number:
    """Bytes a token and layer of attention that is computed as one square, under soft-capping or with sinks.

    Per score and head: what the cap gave, its softmax in fp32 and rounded. A row is as wide as its tree.
    """
    if model.packed or job.layout == "packed":
        return 0
    return model.heads * (2 * BYTES[job.compute] + 4) * job.batch.widest / largest(1, job.batch.rows)


def check_budget(job: Job, option: str = "activation_mb", micro_batch: str = "micro_batch_tokens") -> None:
    """Raises InputError for a budget that no choice of layers meets, as a run does; the options by name."""
    if job.recompute != "some":
        return
    least = BYTES[job.compute] * job.model.width * job.model.layers + ends(job, job.model)
    budget, tokens = job.activation_mb * MIB, job.micro_batch_tokens
    if least * tokens > NEAR * budget:
        raise InputError(
            f"{option} = {job.activation_mb} is too small for {micro_batch} = {tokens}: with all layers "
            f"computed again it takes {ceil(least * tokens / MIB)}; raise it or lower {micro_batch} to "
            f"{largest(1, floor(budget / least))}"
        )


def again(job: Job, model: Model) -> Number:
    """Layers that are computed again: as ``training/recompute.py`` chooses them, by a full micro-batch."""
    each, least = per_layer(job, model), BYTES[job.compute] * model.width
    if job.recompute == "all":
        return model.layers
    whole = job.micro_batch_tokens * (model.layers * each + ends(job, model))
    more = whole - job.activation_mb * MIB
    return smallest(model.layers, largest(0, ceil(more / (job.micro_batch_tokens * (each - least)))))


def backward_moment(job: Job, model: Model, tokens: Number) -> Number:
    """Bytes beside what is kept, in the backward pass of the first layer that it comes to.

    Of one that is computed again, all that it would have kept is among them.
    """
    if job.engine == "gpu":
        layers = 0 if job.recompute == "none" else again(job, model)
        return gpu.gpu_in_backward(model, job.compute, tokens, layers)
    # The gradients that are alive in a layer are of as many numbers as its forward pass has at its fullest.
    moment = tokens * layer_moment(job, model, job.compute)
    if job.recompute == "none":
        return moment
    each, least = per_layer(job, model), BYTES[job.compute] * model.width
    over = choose(again(job, model), tokens * (each - least), 0)
    # By then the layers that keep theirs have let go of it.
    kept = tokens * (model.layers - again(job, model)) * (each - least)
    return largest(moment, moment + over - kept)


def per_layer(job: Job, model: Model) -> Number:
    """Bytes a token and layer, by the engine that runs."""
    if job.engine == "gpu":
        # An adapter computes in the dtype of the run here, where PEFT alone would widen what it reads.
        kept = gpu.gpu_kept(model, job.compute, job.adapter, widened=False)
    else:
        kept = layer_kept(model, job.compute, job.adapter)
    return kept + scores_kept(job, model)


def head_kept(job: Job, model: Model, targets: Number) -> tuple[Number, Number]:
    """Of the head: bytes kept at the end of the forward pass, and those more as its backward pass begins."""
    b = BYTES[job.compute]
    if job.scalar:
        return targets * 4 * model.width, targets * 4 * model.width
    rows, hidden = targets * b * model.vocabulary, targets * b * model.width
    learns = 0 if job.adapter.kind != "none" else b * model.vocabulary * model.width
    if job.engine == "gpu" or job.head == "whole":
        style = "whole" if job.head == "whole" else "chunked"
        how = {"entropy": job.entropy, "learns": job.adapter.kind == "none"}
        fullest = gpu.gpu_head(model, job.compute, targets, style=style, **how)  # type: ignore[arg-type]
        kept = hidden + (rows if job.head == "whole" else choose(rows - KEPT, 0, rows))
        return kept, fullest - kept
    # Past KEPT a chunk's logits are made again. Each chunk's gradient of the head is added to the last in
    # what the heap has free by then: ``memory.holes`` counts it.
    chunks = smallest(rows, CHUNK) * 2
    return hidden + choose(rows - KEPT, 0, rows), hidden + choose(rows - KEPT, chunks, rows + learns)


def head_moment(job: Job, model: Model, targets: Number) -> Number:
    """Without gradient: one chunk's logits, and the hidden states that they are made of."""
    b = BYTES[job.compute]
    if job.scalar:
        return targets * 4 * model.width
    if job.engine == "gpu" and job.head == "chunked":
        return gpu.gpu_head_forward(model, job.compute, targets)
    rows = targets * b * model.vocabulary
    chunk = rows if job.head == "whole" else smallest(rows, CHUNK)
    return targets * b * model.width + chunk * (1 if job.engine == "cpu" else 3)


def head_gradient(job: Job, model: Model) -> Number:
    """Of a head tied to the embedding: its gradient waits for the embedding's through the backward pass.

    On a CPU it lies in what ``memory.holes`` counts.
    """
    if job.scalar or not model.tied or job.adapter.kind != "none" or job.engine == "cpu":
        return 0
    return BYTES[job.compute] * model.vocabulary * model.width
