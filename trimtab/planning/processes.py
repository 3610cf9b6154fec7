"""A job on many processes: how its weights are held and how it samples, as a run under torchrun decides.

What is "auto" the run's own rules say (``parallel/rule.py``), for ``gather`` by this planner's count of what
is free as sampling begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trimtab.errors import InputError
from trimtab.parallel.rule import Held, gathers_whole, idle_option, replicates, whole_bytes
from trimtab.parallel.rule import told as compared
from trimtab.planning.job import BYTES, Job
from trimtab.planning.memory import memory_of, states
from trimtab.planning.states import role_bytes


@dataclass(frozen=True, slots=True)
class Processes:
    """How many, one on each device, and the options of ``[parallel]``."""

    count: int = 1
    weights: str = "auto"
    shard_over: int = 0
    gather: str = "auto"


def spread(job: Job, on: Processes, *, available: float | None = None) -> tuple[Job, str]:
    """The job as ``on.count`` processes share it, and why its weights are held so where that was decided.

    ``available``: bytes that a process has free before it loads; None where nobody knows. Raises InputError
    for what cannot be shared so.
    """
    if on.count == 1:
        return replace(job, devices=1, shard=False), ""
    if on.shard_over and on.count % on.shard_over:
        raise InputError(
            f"shard_over = {on.shard_over} does not divide the number of processes, {on.count}: choose one "
            f"of {', '.join(str(n) for n in range(2, on.count + 1) if on.count % n == 0)}"
        )
    shard, why = _sharded(job, on, available)
    if not shard and (option := idle_option(on.shard_over, on.gather)):
        said = f" ({why})" if why else ""
        raise InputError(f'{option} has no effect, since weights are whole{said}; set weights = "shard"')
    job = replace(job, devices=on.count, shard=shard, shard_over=on.shard_over if shard else 0)
    if shard and job.sampling is not None:
        job = _gathering(job, on.gather, available)
    return job, why


def _sharded(job: Job, on: Processes, available: float | None) -> tuple[bool, str]:
    """Whether weights are, and why where "auto" decided it."""
    if job.adapter.quantise != "none":
        if on.weights == "shard":
            raise InputError(
                'weights = "shard" cannot cut a quantised base: use "replicate", or another base'
            )
        return False, "a quantised base is not cut"
    if on.weights != "auto":
        return on.weights == "shard", ""
    if available is None:
        return False, "what is free is not known"
    need = whole_bytes(held_by(job), BYTES[job.compute])
    return not replicates(need, available), compared(need, available)


def held_by(job: Job) -> Held:
    """Its models, as ``parallel/rule.py`` counts them: not those that are there for a while only."""
    size, own = BYTES[job.compute], float(job.model.parameters)
    adapted = job.adapter.kind != "none"
    learns, frozen = (0.0, [(own, float(size))]) if adapted else (own, [])
    for role in job.roles:
        if role.watched or role.shares_base or role.when == "before":
            continue
        count = float(role.model.parameters)
        if role.learns and not role.adapter:
            learns += count
        else:
            frozen.append((count, float(role_bytes(job, role)[1])))
    return Held(learns, tuple(frozen))


def told(job: Job) -> dict[str, Any]:
    """Of a job on many processes: how many, and how they hold the weights. Empty for one."""
    if job.devices == 1:
        return {}
    facts: dict[str, Any] = {"processes": job.devices, "weights": _held(job)}
    if job.shard and job.sampling is not None:
        facts["samples_from"] = SAMPLES[job.gather]
    return facts


SAMPLES = {
    "whole": "whole weights, gathered once a rollout",
    "layers": "layers, each gathered for each token",
}


def _held(job: Job) -> str:
    if not job.shard:
        return "replicated in each"
    if job.sharers == job.devices:
        return f"sharded over all {job.devices}"
    return f"sharded over {job.sharers}, {job.devices // job.sharers} copies"


def _gathering(job: Job, asked: str, available: float | None) -> Job:
    """``asked``, or as a run decides by what its models leave free."""
    whole, layers = replace(job, gather="whole"), replace(job, gather="layers")
    if asked != "auto":
        return layers if asked == "layers" else whole
    held = [*states(job), *memory_of(job).phases[0].parts[-1:]]  # the framework's part is the last
    free = None if available is None else available - float(sum(part.bytes for part in held))
    size = float(BYTES[job.compute] * job.model.parameters)
    return whole if gathers_whole(size, free) else layers
