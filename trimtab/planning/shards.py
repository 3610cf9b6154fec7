"""States that FSDP2 shards over devices, and the buffers that it needs while a layer is whole.

As ``torch.distributed.fsdp.fully_shard`` of torch 2.13 does it, on each decoder layer and on the model,
with ``MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=float32)``. Parameters are fp32 and cut along
their first dimension into equal pieces, the last padded. A layer is gathered in the compute dtype before its
forward and its backward pass. What belongs to no layer (embedding, head, final norm) is a group of its own,
whole from the forward pass to the end of the backward pass. All bytes are of one device.
"""

from __future__ import annotations

from trimtab.planning.job import BYTES, Compute, Job, Model
from trimtab.planning.numbers import Number, ceil, choose, largest
from trimtab.planning.result import Part

REDUCED = 4
"""Bytes of a number in gradients that are summed over devices, in masters and in Adam's moments; fp64: 8."""


def shard(model: Model, devices: Number) -> Number:
    """Numbers of the model's parameters that a device holds: rows of each tensor, rounded up."""
    own = sum((i * o * count for _, i, o, count in model.linears), 0)
    cut = sum((i * ceil(o / devices) * count for _, i, o, count in model.linears), 0)
    # Stacked experts are cut between experts: with more devices than experts some hold none, and all
    # reserve one.
    stacked = largest(0, model.linear - own)
    experts = largest(1, model.experts)
    stacked = choose(model.experts, stacked * ceil(experts / devices) / experts, stacked / devices)
    rest = model.parameters - model.embedding - model.head - largest(own, model.linear)
    rows = ceil(model.vocabulary / devices) / model.vocabulary
    return ceil(cut + stacked + (model.embedding + model.head) * rows + rest / devices)


def sharded_states(model: Model, devices: Number, role: str = "policy", *, size: int = REDUCED) -> list[Part]:
    """Of a model that learns: fp32 parameters, gradients and Adam's moments; no rounded copy stays."""
    held = shard(model, devices) * size
    return [
        Part(role, "weights", held),
        Part(role, "gradients", held),
        Part(role, "optimiser", 2 * held),
    ]


def outside(model: Model) -> Number:
    """Parameters that belong to no layer: FSDP's root group."""
    return model.embedding + model.head + model.width


def gathered(job: Job, model: Model | None = None, *, learns: bool = True, backward: bool = True) -> Number:
    """Bytes of FSDP's buffers at the fullest moment of a pass; ``model``: another role's than the policy.

    Without gradient: the layer that runs, the buffer it came in, kept until the next layer's copy is done,
    and the next layer's. Backward: the layer, the next one's buffer, the layer's gradients, and in fp32 the
    gradients of the layer before, which are being reduced. The root group is whole all the while.
    """
    model, size = model or job.model, BYTES[job.compute]
    frozen = not learns or job.adapter.kind != "none"
    alone = largest(0, job.sharers - 1)
    root = size * outside(model)
    if not backward:
        return root + choose(alone, 3, 1) * size * model.layer
    layers = choose(alone, 2, 1) * size * model.layer
    if frozen:
        return root + layers
    # A head of its own: its gradient waits for its group's. A tied one's is the planner's head gradient.
    waiting = size * model.head
    return root + layers + waiting + (size + _reduced(job)) * model.layer


def _reduced(job: Job) -> int:
    return 8 if job.compute == "float64" else REDUCED


def last_reduction(job: Job) -> Number:
    """Bytes of buffers at the very end of a backward pass, when the root group's gradients are reduced.

    By then nothing else is kept: the fullest moment only where the vocabulary outweighs the activations.
    """
    if job.adapter.kind != "none":
        return 0
    root, size = outside(job.model), BYTES[job.compute]
    return (size + _reduced(job)) * root + _reduced(job) * job.model.layer


def whole(model: Model, compute: Compute) -> Number:
    """Bytes of all of a model gathered at once: sampling without a gather for each layer and token."""
    return BYTES[compute] * model.parameters


def sent(job: Job, weights: Number) -> Number:
    """Bytes that a device sends while its sharers gather so many bytes of weights: all but its own part."""
    return weights * (job.sharers - 1) / job.sharers


def sent_by_training(job: Job, model: Model, weights: Number, learned: Number) -> Number:
    """Bytes that a device sends in a forward and backward pass over ``weights`` sharded numbers.

    Layers are gathered twice and the root group, which stays whole, once; gradients of the ``learned``
    numbers are reduced in fp32, for each micro-batch.
    """
    return sent(job, BYTES[job.compute] * (2 * weights - outside(model)) + _reduced(job) * learned)


def hops_of_pass(job: Job, model: Model, *, backward: bool) -> Number:
    """Messages that follow one another in these collectives: each goes once around the sharers."""
    groups = model.layers + 1
    # Forward: each group is gathered; backward: each layer again, and each group's gradients reduced.
    return (groups + (2 * groups - 1 if backward else 0)) * (job.sharers - 1)
