"""A run's job on the processes that its launcher started, or that a plan is asked for."""

from __future__ import annotations

from typing import Any

from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig
from trimtab.planning.job import Job
from trimtab.planning.processes import Processes, spread, told


def on_processes(
    job: Job, config: MethodConfig, count: int, available: float | None
) -> tuple[Job, dict[str, Any]]:
    """The job as so many processes share it by the options of ``[parallel]``, and the facts to show of that.

    ``available``: bytes that one process has free. Raises InputError for options that the run would refuse.
    """
    asked = config.parallel
    try:
        job, why = spread(
            job,
            Processes(count, asked.weights, asked.shard_over, asked.gather),
            available=available,
        )
    except InputError as error:
        line = str(error)
        raise InputError(line if line.startswith("parallel.") else f"parallel.{line}") from None
    facts = told(job)
    if why:
        facts["weights"] = f"{facts['weights']} ({why})"
    return job, facts
