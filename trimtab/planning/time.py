"""Seconds, tokens and cost of a run on a device: counts (``work.py``) over speeds (``devices.py``).

Each kind of work takes its count over the share of the peak that it reaches. On a CPU the kinds follow one
another and calls come on top. On a GPU calls run ahead of the kernels, and in a decode step weights are read
while others are computed with: the slower of the two counts (the roofline; Williams et al., 2009). What
devices send overlaps with the rest.
"""

from __future__ import annotations

from typing import Literal

from trimtab.errors import InputError
from trimtab.planning.counts import Amount
from trimtab.planning.devices import Device
from trimtab.planning.job import Compute, Job
from trimtab.planning.numbers import Number, choose, largest, smallest
from trimtab.planning.result import Time, Work
from trimtab.planning.work import Piece, once, pieces

Bound = Literal["compute", "memory", "link", "overhead"]


def time_of(job: Job, device: Device, *, price_per_hour: float | None = None) -> Time:
    """The whole run's time on ``job.devices`` devices; ``price_per_hour`` is of one of them.

    Raises InputError for a price or a number of devices below 0 (1), and for a device of the other engine.
    """
    check(job, device, price_per_hour)
    works = _works(pieces(job), job, device)
    before = _works(once(job), job, device)
    step_s = sum((work.seconds for work in works), 0.0)
    once_s = sum((work.seconds for work in before), 0.0)
    run_s = once_s + job.steps * step_s
    s = job.sampling
    generated: Number = 0
    if s is not None:
        rollouts = job.steps / job.steps_per_rollout
        generated = rollouts * s.prompts * s.samples * s.response
    return Time(
        device=device.name,
        works=(*works, *before),
        step_s=step_s,
        once_s=once_s,
        run_s=run_s,
        tokens=job.steps * job.batch.tokens,
        generated_tokens=generated,
        devices=job.devices,
        price_per_hour=price_per_hour,
        cost=None if price_per_hour is None else price_per_hour * job.devices * run_s / 3600,
    )


def check(job: Job, device: Device, price_per_hour: float | None = None) -> None:
    """Raises InputError for what cannot be meant. Numbers only: a quantity is taken as it is."""
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise InputError(f"price_per_hour is {price_per_hour}: a price is 0 or more")
    if device.engine != job.engine:
        raise InputError(
            f"the plan is for a {job.engine.upper()} and {device.name} is a {device.engine.upper()}: choose "
            f"a device card of a {job.engine.upper()}, or plan for the other engine"
        )
    for name, value in (("devices", job.devices), ("steps", job.steps), ("batch tokens", job.batch.tokens)):
        if isinstance(value, int | float) and value < 1:
            raise InputError(f"{name} is {value}: a plan needs at least 1")


def _works(parts: object, job: Job, device: Device) -> list[Work]:
    """The pieces of each phase together, in the order in which phases are first met."""
    by_phase: dict[str, list[Piece]] = {}
    for piece in parts:  # type: ignore[attr-defined]
        by_phase.setdefault(piece.phase, []).append(piece)
    order = ("sampling", "scoring", "training", "update", "loading", "reference once")
    return [_work(phase, by_phase[phase], job, device) for phase in order if phase in by_phase]


def _work(phase: str, parts: list[Piece], job: Job, device: Device) -> Work:
    seconds: Number = 0.0
    kinds: dict[Bound, Number] = dict.fromkeys(("compute", "memory", "link", "overhead"), 0.0)
    for piece in parts:
        spent = spent_on(piece.amount, device, piece.compute, job)
        seconds = seconds + together(spent, device)
        for kind, value in spent.items():
            kinds[kind] = kinds[kind] + value
    flops = sum((piece.amount.flops for piece in parts), 0)
    moved = sum((piece.amount.bytes + piece.amount.read for piece in parts), 0)
    bound: Bound = "compute"
    if all(isinstance(value, int | float) for value in kinds.values()):
        bound = max(kinds, key=lambda kind: kinds[kind])
    return Work(phase, flops, moved, seconds, bound)


def links_of(device: Device, devices: Number, sharers: Number) -> tuple[Number, Number]:
    """10⁹ bytes/s that a device sends to those that share its copy of the weights, and to other copies.

    Collectives go around in rings, and as many rings as a machine has network cards: each passes from a
    machine to the next once, so that all cards of a machine carry them together, up to the speed within it.
    Copies of which each machine holds one only have the cards of their own devices.
    """
    near, far, each = device.link, device.node_link, device.node_devices
    within = choose(sharers - each, smallest(near, far * each), near)
    between = smallest(near, far * largest(1, each / sharers))
    return within, choose(devices - each, between, near)


def spent_on(amount: Amount, device: Device, compute: Compute, job: Job | None = None) -> dict[Bound, Number]:
    """Seconds by what they are bound by. On a GPU the smaller of a decode step's two counts nothing.

    ``job``: whose processes send; without one there is one.
    """
    peak, bandwidth, reached = device.flops(compute), device.bandwidth * 1e9, device.reached
    decode_flops = amount.decode_flops / (peak * reached.decode)
    decode_bytes = amount.decode_bytes / (bandwidth * reached.weights)
    if device.engine == "gpu":
        computes = decode_flops - decode_bytes
        decode_flops, decode_bytes = choose(computes, decode_flops, 0), choose(computes, 0, decode_bytes)
    devices, sharers = (1, 1) if job is None else (job.devices, job.sharers)
    within, between = (speed * 1e9 * reached.link for speed in links_of(device, devices, sharers))
    return {
        "compute": (amount.products + amount.slow) / (peak * reached.products)
        + amount.scores / (peak * reached.scores)
        + amount.narrow / (peak * reached.narrow)
        + decode_flops,
        "memory": amount.passes / (bandwidth * reached.passes)
        + amount.logits / (bandwidth * reached.logits)
        + amount.draws / (bandwidth * reached.draws)
        + amount.updates / (bandwidth * reached.updates)
        + amount.read / (device.disk * 1e9)
        + decode_bytes,
        "link": amount.link / within + amount.across / between + amount.hops * device.hop_s,
        "overhead": amount.calls * device.call_s
        + amount.decode_calls * device.decode_call_s
        + amount.rows * device.row_s,
    }


def together(spent: dict[Bound, Number], device: Device) -> Number:
    """Seconds of one piece: what overlaps counts by its longest."""
    busy = spent["compute"] + spent["memory"]
    if device.engine == "cpu":
        return largest(busy + spent["overhead"], spent["link"])
    return largest(busy, spent["overhead"], spent["link"])
