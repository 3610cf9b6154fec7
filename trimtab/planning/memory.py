"""Memory of a run, phase by phase, at the fullest moment of each.

The fullest moment of training is the start of a micro-batch's backward pass (what its forward pass kept, the
logits and their gradient) or, where layers are computed again, the first of those.
"""

from __future__ import annotations

from trimtab.planning import activations, gpu, shards
from trimtab.planning.job import BYTES, Compute, Job, Model
from trimtab.planning.numbers import Number, ceil, choose, largest, smallest
from trimtab.planning.result import Memory, Part, Phase, PhaseName
from trimtab.planning.states import policy_states, role_states

MIB = 2**20
BLOCK = 32
"""Tokens of a block of the cache (``kernels/decode.py``)."""
PREFILL = 4096
"""Prompt tokens of one pass (``rollouts/engine.py``)."""
FRAMEWORK = 95 * MIB
"""What a process on a CPU comes to hold beside its tensors: code, the tokenizer, threads. Measured."""
HOLES = 0.9
"""Holes that the C library keeps between tensors of different sizes, in bytes of the layers' weights …"""
HOLES_OF_EMBEDDING = 2.4
"""… and of the embedding's, whose gradients come and go whole. Measured, as all of these."""
HOLES_UNDER_ADAPTER = 300 * MIB
"""Where no weight of the base has a gradient, and tensors are many and small."""


def memory_of(job: Job) -> Memory:
    """What each phase holds. See docs/plan.md for the terms."""
    phases = [_phase(job, "loading", _loading(job))]
    if job.sampling is not None:
        phases.append(_phase(job, "sampling", _sampling(job)))
    if job.reference_pass or job.old_pass or job.sampling is not None:
        phases.append(_phase(job, "scoring", _scoring(job)))
    phases.append(_phase(job, "training", _training(job)))
    phases.append(_phase(job, "update", _update(job)))
    return Memory(tuple(phases))


def _phase(job: Job, name: PhaseName, parts: list[Part]) -> Phase:
    if job.engine == "gpu":
        used = sum((part.bytes for part in parts if part.kind != "file"), 0)
        parts = [part for part in parts if part.kind != "file"]
        more = Part("", "allocator", gpu.gpu_workspace(used)), Part("", "framework", gpu.gpu_framework())
        return Phase(name, (*parts, *more))
    more = Part("", "allocator", holes(job)), Part("", "framework", FRAMEWORK)
    return Phase(name, (*parts, *(more if name != "loading" else more[1:])))


def holes(job: Job) -> Number:
    """Bytes that a process on a CPU holds and does not use, between its tensors."""
    b = BYTES[job.compute]
    embedding = HOLES_OF_EMBEDDING * b * job.model.vocabulary * job.model.width
    if job.adapter.kind != "none":
        return HOLES_UNDER_ADAPTER + embedding / 3
    return HOLES * b * job.model.linear + embedding


def states(job: Job, *, before: bool = False) -> list[Part]:
    """Of every model that is in memory while the run trains; ``before``: also those that leave by then."""
    parts = policy_states(job)
    for role in job.roles:
        if before or role.when != "before":
            parts += role_states(job, role)
    return parts


def _loading(job: Job) -> list[Part]:
    """Masters, gradient buffers and rounded weights are made while the file that they come from is mapped."""
    parts = [part for part in states(job, before=True) if part.kind != "optimiser"]
    if job.adapter.kind != "none":
        return [*parts, Part("policy", "file", _mapped(job))]
    return [
        *parts,
        Part("policy", "file", job.file_bytes * job.model.parameters / (job.devices if job.shard else 1)),
    ]


def _mapped(job: Job) -> Number:
    """Pages of a frozen base's file: with the dtype of the run they are the weights themselves."""
    b = BYTES[job.compute]
    if job.adapter.quantise != "none":
        return job.file_bytes * job.model.parameters
    return choose(abs_difference(job.file_bytes, b), job.file_bytes * job.model.parameters, 0)


def abs_difference(a: Number, b: Number) -> Number:
    """|a − b|."""
    return largest(a - b, b - a)


def cache(job: Job) -> Number:
    """Bytes of keys and values that a rollout comes to hold; they stay allocated while the run trains."""
    drawn = job.sampling
    assert drawn is not None
    model, b = job.model, BYTES[job.compute]
    # A value's width is rounded up to 16 in each head.
    values = model.kv_heads * 16 * ceil(model.value / model.kv_heads / 16)
    block = model.layers * BLOCK * (model.key + values) * b
    own = ceil((drawn.longest_response - 1) / BLOCK)
    rows = smallest(drawn.max_rows, drawn.prompts * drawn.samples)
    wanted = drawn.prompts * ceil(drawn.longest_prompt / BLOCK) + rows * own
    return smallest(wanted * block, drawn.cache_mb * MIB)


def _sampling(job: Job) -> list[Part]:
    drawn = job.sampling
    assert drawn is not None
    model, b = job.model, BYTES[job.compute]
    rows = smallest(drawn.max_rows, drawn.prompts * drawn.samples)
    prefill = smallest(PREFILL, drawn.prompts * drawn.prompt)
    return [
        *states(job),
        Part("policy", "cache", cache(job)),
        Part("policy", "activations", prefill * _moment(job, model)),
        Part("policy", "logits", rows * b * model.vocabulary),
        *_whole(job),
    ]


def _whole(job: Job) -> list[Part]:
    """A sharded policy samples whole: gathered once a rollout, not a layer at a time for each token."""
    return [Part("policy", "gathered layer", shards.whole(job.model, job.compute))] if job.shard else []


def _gathered(job: Job, *, backward: bool) -> list[Part]:
    return [Part("policy", "gathered layer", shards.gathered(job, backward=backward))] if job.shard else []


def _moment(job: Job, model: Model, compute: Compute | None = None) -> Number:
    return activations.layer_moment(job, model, compute or job.compute)


def _scoring(job: Job) -> list[Part]:
    """The widest of the passes without gradient: log-probabilities and values, or a reward model's scores."""
    model, batch = job.model, job.batch
    tokens = largest(batch.forward_widest, choose(batch.forward_widest, 0, batch.widest))
    targets = choose(batch.forward_widest, batch.forward_targets, batch.widest_targets)
    parts = states(job, before=True)
    if job.sampling is not None:
        parts.append(Part("policy", "cache", cache(job)))
    passes = [
        (tokens * _moment(job, model), activations.head_moment(job, model, targets)),
    ]
    for role in job.roles:
        if role.name == "reward model":
            wide: Compute = "float32" if role.bytes == 4 else job.compute
            seen = smallest(job.reward_tokens, job.batch.tokens * job.steps_of_rollout)
            passes.append((seen * _moment(job, role.model, wide), 0))
    kept = largest(*(a + b for a, b in passes))
    return [*parts, Part("", "activations", kept), *_gathered(job, backward=False)]


def _training(job: Job) -> list[Part]:
    model, batch = job.model, job.batch
    kept = activations.trunk_kept(job, model, batch.widest)
    logits, begin = activations.head_kept(job, model, batch.widest_targets)
    later = activations.head_gradient(job, model) + activations.backward_moment(job, model, batch.widest)
    parts = states(job)
    if job.sampling is not None:
        parts.append(Part("policy", "cache", cache(job)))
    # As the head's backward pass begins, or as the first layer's does, when the logits are gone.
    moment = largest(begin, later - logits)
    return [
        *parts,
        Part("policy", "activations", kept),
        Part("policy", "logits", logits),
        Part("policy", "workspace", moment),
        *_gathered(job, backward=True),
    ]


def _update(job: Job) -> list[Part]:
    """At the end the masters are copied once, into the model's file; from a GPU, into the host's memory."""
    parts = states(job)
    if job.sampling is not None:
        parts.append(Part("policy", "cache", cache(job)))
    if job.engine == "gpu":
        return parts
    learnt = sum((p.bytes for p in parts if p.role == "policy" and p.kind == "gradients"), 0)
    return [*parts, Part("policy", "workspace", learnt)]
