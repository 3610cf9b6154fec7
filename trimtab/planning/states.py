"""What models hold whatever is computed: weights, masters, gradients, optimiser states, adapters."""

from __future__ import annotations

from trimtab.planning import shards
from trimtab.planning.job import BYTES, Job, Role
from trimtab.planning.numbers import Number, apart, ceil, choose
from trimtab.planning.result import Part

QUANTISED = {"nf4": 0.5 + 4 / 64 + 1 / 16384, "int8": 1.0}
"""Bytes of a weight of the layers; nf4: with its share of a scale of 64 weights (bitsandbytes)."""


def adapter_size(job: Job) -> Number:
    """Parameters of one adapter: rank × (inputs + outputs), with DoRA a length for each row."""
    lengths = job.adapter.outputs if job.adapter.kind == "dora" else 0
    return job.adapter.rank * job.adapter.ends + lengths


def learning(job: Job, role: str, count: Number) -> list[Part]:
    """fp32 masters, gradients and Adam's two moments of ``count`` parameters, and the weights computed with.

    A model that computes in fp32 or fp64 is its own master (``training/optimiser.py``).
    """
    size = wide(job)
    rest = [Part(role, "gradients", count * size), Part(role, "optimiser", 2 * count * size)]
    if job.compute != "bfloat16" or job.shard:  # a gathered layer is the rounded copy
        return [Part(role, "weights", count * size), *rest]
    return [Part(role, "weights", count * 2), Part(role, "master weights", count * size), *rest]


def wide(job: Job) -> int:
    """Bytes of a number in masters, gradients and moments."""
    return 8 if job.compute == "float64" else 4


def policy_states(job: Job) -> list[Part]:
    """Of the model that learns."""
    if job.adapter.kind != "none":
        return [Part("policy", "weights", base_bytes(job)), *adapter_states(job, "policy", learns=True)]
    if job.shard:
        return shards.sharded_states(job.model, job.sharers, size=wide(job))
    return learning(job, "policy", job.model.parameters)


def base_bytes(job: Job) -> Number:
    """Of a frozen base, quantised or not."""
    model, b = job.model, BYTES[job.compute]
    if job.adapter.quantise != "none":
        layers = model.linear * QUANTISED[job.adapter.quantise]
        # Not cut: quantised weights are whole on every device.
        return layers + (model.parameters - model.linear) * b
    return shards.shard(model, job.sharers) * b if job.shard else model.parameters * b


def adapter_states(job: Job, role: str, *, learns: bool, size: Number | None = None) -> list[Part]:
    """Of an adapter: what computes, and where it learns its masters, gradients and moments.

    ``size``: bytes a number where it does not learn; left out as many as are computed with.
    """
    count = adapter_size(job)
    if job.shard:
        count = ceil(count / job.sharers)
    if not learns:
        return [Part(role, "adapter", count * (BYTES[job.compute] if size is None else size))]
    parts = learning(job, role, count)
    return [Part(role, "adapter" if part.kind == "weights" else part.kind, part.bytes) for part in parts]


def role_bytes(job: Job, role: Role) -> tuple[Number, Number]:
    """Of a weight of the role: in the file that it is read from, and as it is computed with."""
    read = job.file_bytes if role.file_bytes is None else role.file_bytes
    return read, BYTES[job.compute] if role.bytes is None else role.bytes


def role_states(job: Job, role: Role) -> list[Part]:
    """Of a model beside the policy."""
    if role.shares_base and role.whole and job.shard:
        # Its base cannot be the policy's, of which each process has a part.
        size = BYTES[job.compute]
        base = Part(role.name, "weights", role.model.parameters * size)
        return [base, Part(role.name, "adapter", adapter_size(job) * size)]
    if role.shares_base:
        return adapter_states(job, role.name, learns=role.learns, size=role.bytes) if role.adapter else []
    read, b = role_bytes(job, role)
    if role.learns and not role.adapter:
        if job.shard:
            return shards.sharded_states(role.model, job.sharers, role.name, size=wide(job))
        return learning(job, role.name, role.model.parameters)
    cut = job.shard and not role.whole
    held = shards.shard(role.model, job.sharers) if cut else role.model.parameters
    if role.file and job.engine == "cpu":
        # Kept as it was read it stays mapped, and of the embedding only rows that some text uses are touched.
        same = choose(apart(read, b), 0, 1)
        held = held - same * role.model.vocabulary * role.model.width
    parts = [Part(role.name, "weights", held * b)]
    return parts + (adapter_states(job, role.name, learns=role.learns) if role.adapter else [])
