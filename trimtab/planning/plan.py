"""The plan of a job: its memory and, on a known device, its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.planning.devices import Device
from trimtab.planning.job import Job
from trimtab.planning.memory import memory_of
from trimtab.planning.result import Plan
from trimtab.planning.time import time_of


def plan(
    job: Job,
    device: Device | None = None,
    available: float | None = None,
    *,
    price_per_hour: float | None = None,
    title: str = "",
    facts: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> Plan:
    """What the job takes. ``available``: bytes that the device has for it; without it nobody knows.

    Raises InputError for a price without a device, and as ``time_of`` does.
    """
    if price_per_hour is not None and device is None:
        raise InputError(
            "a price needs a device, whose hours it is of: give --device, or measure this machine"
        )
    time = None if device is None else time_of(job, device, price_per_hour=price_per_hour)
    return Plan(
        title=title or f"{job.method}, {job.model.name}",
        memory=memory_of(job),
        time=time,
        available=available,
        facts=dict(facts or {}),
        warnings=tuple(warnings),
    )
