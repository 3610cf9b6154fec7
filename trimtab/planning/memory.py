"""Memory of a run, phase by phase, at the fullest moment of each.

The fullest moment of training is the start of a micro-batch's backward pass (what its forward pass kept, the
logits and their gradient) or, where layers are computed again, the first of those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.planning import activations, gpu, rollout, shards
from trimtab.planning.job import BYTES, Adapter, Compute, Job, Role
from trimtab.planning.numbers import Number, apart, ceil, choose, largest, smallest
from trimtab.planning.result import Memory, Part, Phase, PhaseName
from trimtab.planning.states import policy_states, role_bytes, role_states, wide

MIB = 2**20
FRAMEWORK = 95 * MIB
"""What a process on a CPU comes to hold beside its tensors: code, the tokenizer, threads. Measured."""
HOLES = 0.9
"""Holes that the C library keeps between tensors of different sizes, in bytes of the layers' weights …"""
HOLES_OF_EMBEDDING = 3.6
"""… and of the embedding's, whose gradients come and go whole, chunk by chunk. Measured, as all of these."""
MESSAGE = 64 * MIB
"""Gradients that are added up over processes in one message (``parallel/world.py``) …"""
SUMMED = {"cpu": 2, "gpu": 1}
"""… and how often it is held meanwhile: once as it is sent, and by gloo as it comes in."""
HOLES_OF_PASSES, LEAST_HOLES = 0.18, 60 * MIB
"""Under an adapter, where the base has no gradients: of what a pass keeps if no layer is computed again."""


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
        framework = gpu.gpu_framework() + choose(job.devices - 1, gpu.LINKED, 0)
        more = Part("", "allocator", gpu.gpu_workspace(used)), Part("", "framework", framework)
        return Phase(name, (*parts, *more))
    more = Part("", "allocator", holes(job)), Part("", "framework", FRAMEWORK)
    return Phase(name, (*parts, *(more if name != "loading" else more[1:])))


def holes(job: Job) -> Number:
    """Bytes that a process on a CPU holds and does not use, between its tensors."""
    model, b = job.model, BYTES[job.compute]
    embedding = HOLES_OF_EMBEDDING * b * model.vocabulary * model.width
    if job.scalar:
        embedding = embedding / 2  # chunks of logits leave the other half
    if job.adapter.kind != "none":
        whole = model.layers * activations.per_layer(job, model) + activations.ends(job, model)
        return LEAST_HOLES + HOLES_OF_PASSES * widest(job)[0] * whole + embedding / 7
    return HOLES * b * model.linear + embedding


def widest(job: Job) -> tuple[Number, Number]:
    """Tokens of a device's largest micro-batch, and how many of them are predicted: devices share a step.

    Whole groups are dealt out, so that the fullest device has as many as do not divide evenly.
    """
    batch = job.batch
    share = smallest(batch.widest, ceil(batch.tokens * rollout.share_of(job, batch.groups)))
    tokens = choose(job.devices - 1, share, batch.widest)
    return tokens, batch.widest_targets * tokens / batch.widest


def states(job: Job, *, before: bool = False) -> list[Part]:
    """Of every model that is in memory while the run trains; ``before``: also those that leave by then."""
    parts = policy_states(job)
    for role in job.roles:
        if before or role.when != "before":
            parts += role_states(job, role)
    return parts


def _loading(job: Job) -> list[Part]:
    """Masters, gradient buffers and rounded weights are made while the file that they come from is mapped.

    What is sharded is read whole into the host's memory first, by one process of a machine after another.
    """
    parts = [part for part in states(job, before=True) if part.kind != "optimiser"]
    file = job.file_bytes * job.model.parameters if job.adapter.kind == "none" else _mapped(job)
    parts += [Part("policy", "file", file), *_files(job)]
    if job.engine == "gpu" or not _cut(job):
        return parts
    read = BYTES[job.compute] if job.adapter.kind != "none" else wide(job)
    return [*parts, Part("policy", "workspace", read * job.model.parameters)]


def _files(job: Job) -> list[Part]:
    """Pages of the roles' own files: where weights are kept as they are read, those are the weights."""
    found = []
    for role in job.roles:
        if role.file:
            # What learns is read in fp32 and rounded afterwards; a base under an adapter is not.
            read, held = role_bytes(job, role)
            if role.learns and not role.adapter:
                held = 8 if job.compute == "float64" else 4
            pages = choose(apart(read, held), read * role.model.parameters, 0)
            found.append(Part(role.name, "file", pages))
    return found


def _mapped(job: Job) -> Number:
    """Pages of a frozen base's file: with the dtype of the run they are the weights themselves."""
    b = BYTES[job.compute]
    if job.adapter.quantise != "none":
        return job.file_bytes * job.model.parameters
    return choose(apart(job.file_bytes, b), job.file_bytes * job.model.parameters, 0)


def _cache(job: Job) -> list[Part]:
    """Blocks stay allocated while the run trains; what the plain sampler holds goes with its rollout."""
    if job.sampling is None or job.sampling.engine == "plain":
        return []
    return [Part("policy", "cache", rollout.cache(job))]


def _sampling(job: Job) -> list[Part]:
    return [
        *states(job),
        Part("policy", "cache", rollout.cache(job)),
        Part("policy", "activations", rollout.moment(job)),
        Part("policy", "logits", rollout.logits(job)),
        *_whole(job),
    ]


def _whole(job: Job) -> list[Part]:
    """A sharded policy samples whole, gathered once a rollout, or a layer at a time for each token."""
    if not _cut(job) or any(role.name == "snapshot" for role in job.roles):
        return []  # a snapshot is whole, and is what is sampled from
    if job.gather == "layers":
        return [Part("policy", "gathered layer", shards.gathered(job, backward=False))]
    return [Part("policy", "gathered layer", shards.whole(job.model, job.compute))]


def _cut(job: Job) -> bool:
    """Layers are gathered before they run; a quantised base is whole on every device."""
    return job.shard and job.adapter.quantise == "none"


def _scoring(job: Job) -> list[Part]:
    """The widest of the passes without gradient: log-probabilities and values, or a reward model's scores."""
    batch = job.batch
    tokens = choose(batch.forward_widest, batch.forward_widest, batch.widest)
    targets = choose(batch.forward_widest, batch.forward_targets, batch.widest_targets)
    if job.sampling is not None:
        own = batch.tokens * job.steps_of_rollout * rollout.share_of(job, job.sampling.prompts)
        less = choose(job.devices - 1, smallest(1, own / tokens), 1)
        tokens, targets = tokens * less, targets * less
    held = states(job, before=True)
    if job.reference_once and not job.reference_each and job.sampling is None:
        # Before the first step, which makes the moments.
        held = [part for part in held if part.kind != "optimiser"]
    readers = [job, *(as_policy(job, role) for role in job.roles if role.name in ("reference", "critic"))]
    passes = [
        tokens * activations.layer_moment(reader, reader.model, job.compute)
        + activations.head_moment(reader, reader.model, targets)
        for reader in readers
    ]
    parts = [
        *held,
        *_cache(job),
        Part("", "activations", largest(*passes, *_scores(job))),
    ]
    if _cut(job):
        layer = largest(*(shards.gathered(reader, backward=False) for reader in readers))
        parts.append(Part("policy", "gathered layer", largest(layer, *_gathered_to_score(job))))
    return parts


def _gathered_to_score(job: Job) -> list[Number]:
    """Bytes gathered of each reward model that is spread: as a policy's for sampling, in its own dtype."""
    found = []
    for role in job.roles:
        if role.name == "reward model" and not role.watched:
            own = replace(job, compute="float32") if role.bytes == 4 else job
            layers = shards.gathered(own, role.model, backward=False)
            found.append(layers if job.gather == "layers" else shards.whole(role.model, own.compute))
    return found


def _scores(job: Job) -> list[Number]:
    """Bytes of each reward model's pass."""
    drawn = 1 if job.sampling is None else rollout.share_of(job, job.sampling.prompts)
    seen = smallest(job.reward_tokens, job.batch.tokens * job.steps_of_rollout * drawn)
    found = []
    for role in job.roles:
        if role.name == "reward model":
            wide: Compute = "float32" if role.bytes == 4 else job.compute
            found.append(seen * activations.layer_moment(job, role.model, wide))
    return found


def as_policy(job: Job, role: Role) -> Job:
    """The role in the policy's place: what it computes, the policy's formulas say."""
    adapter = job.adapter if role.adapter else Adapter()
    return replace(job, model=role.model, adapter=adapter, scalar=role.name == "critic", roles=())


@dataclass(frozen=True, slots=True)
class _Pass:
    """Of a training micro-batch: what each kind comes to at the fullest moment."""

    role: str
    kept: Number
    logits: Number
    moment: Number
    gathered: Number

    @property
    def bytes(self) -> Number:
        return self.kept + self.logits + self.moment + self.gathered


def _pass(job: Job, role: str) -> _Pass:
    model, (tokens, targets) = job.model, widest(job)
    kept = activations.trunk_kept(job, model, tokens)
    logits, begin = activations.head_kept(job, model, targets)
    later = activations.head_gradient(job, model) + activations.backward_moment(job, model, tokens)
    # As the head's backward pass begins, or as the first layer's does, when the logits are gone.
    moment = largest(begin, later - logits)
    return _Pass(role, kept, logits, moment, shards.gathered(job) if _cut(job) else 0)


def _training(job: Job) -> list[Part]:
    """The policy's pass or another learning role's, whichever holds more: they take turns."""
    passes = [_pass(job, "policy")]
    # A critic on the policy's own trunk keeps no more than the policy: there is no vocabulary.
    passes += [_pass(as_policy(job, r), r.name) for r in job.roles if r.learns and not r.shares_base]
    parts = [*states(job), *_cache(job)]
    for place, one in enumerate(passes):
        kinds = [("activations", one.kept), ("logits", one.logits), ("workspace", one.moment)]
        if _cut(job):
            kinds.append(("gathered layer", one.gathered))
        parts += [Part(one.role, kind, _if_fullest(passes, place, size)) for kind, size in kinds]
    return [*parts, *_beside(job)]


def _if_fullest(passes: list[_Pass], place: int, size: Number) -> Number:
    """``size`` where this pass is the first of the fullest, else 0: which it is, is a quantity."""
    own, earlier, later = passes[place].bytes, passes[:place], passes[place + 1 :]
    if earlier:
        size = choose(own - largest(*(one.bytes for one in earlier)), size, 0)
    return choose(largest(*(one.bytes for one in later)) - own, 0, size) if later else size


def _beside(job: Job) -> list[Part]:
    """With a snapshot the next rollout is drawn, then scored, while the policy learns."""
    if job.sampling is None or all(role.name != "snapshot" for role in job.roles):
        return []
    drawn, made = rollout.moment(job), rollout.logits(job)
    scored = largest(0, *_scores(job))
    more = scored - drawn - made
    parts = [
        Part("snapshot", "activations", choose(more, scored, drawn)),
        Part("snapshot", "logits", choose(more, 0, made)),
    ]
    if job.sampling.engine == "plain":
        parts.append(Part("snapshot", "cache", rollout.cache(job)))
    return parts


def _update(job: Job) -> list[Part]:
    """At the end the masters are copied once, into the model's file; from a GPU, into the host's memory."""
    parts = [*states(job), *_cache(job)]
    if not job.shard:
        learns = [part.bytes for part in parts if part.kind == "gradients"]
        message = smallest(MESSAGE, largest(0, *learns))
        parts.append(Part("policy", "workspace", choose(job.devices - 1, message * SUMMED[job.engine], 0)))
    if job.engine == "gpu":
        return parts
    learnt = sum((p.bytes for p in parts if p.role == "policy" and p.kind == "gradients"), 0)
    return [*parts, Part("policy", "workspace", learnt)]
