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
"""Bytes of a number in gradients that are summed over devices, in masters and in Adam's moments."""


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


def sharded_states(model: Model, devices: Number, role: str = "policy") -> list[Part]:
    """Of a model that learns: fp32 parameters, gradients and Adam's moments; no rounded copy stays."""
    held = shard(model, devices) * REDUCED
    return [
        Part(role, "weights", held),
        Part(role, "gradients", held),
        Part(role, "optimiser", 2 * held),
    ]


def frozen_states(model: Model, devices: Number, size: Number, role: str) -> list[Part]:
    """Of a frozen role, or the base of an adapter, of ``size`` bytes a weight."""
    return [Part(role, "weights", shard(model, devices) * size)]


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
    alone = largest(0, job.devices - 1)
    root = size * outside(model)
    if not backward:
        return root + choose(alone, 3, 1) * size * model.layer
    layers = choose(alone, 2, 1) * size * model.layer
    if frozen:
        return root + layers
    # A head of its own: its gradient waits for its group's. A tied one's is the planner's head gradient.
    waiting = size * model.head
    return root + layers + waiting + (size + REDUCED) * model.layer


def last_reduction(job: Job) -> Number:
    """Bytes of buffers at the very end of a backward pass, when the root group's gradients are reduced.

    By then nothing else is kept: the fullest moment only where the vocabulary outweighs the activations.
    """
    if job.adapter.kind != "none":
        return 0
    root, size = outside(job.model), BYTES[job.compute]
    return (size + REDUCED) * root + REDUCED * job.model.layer


def whole(model: Model, compute: Compute) -> Number:
    """Bytes of all of a model gathered at once: sampling without a gather for each layer and token."""
    return BYTES[compute] * model.parameters
