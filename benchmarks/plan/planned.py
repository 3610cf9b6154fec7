"""The plan of a case, from the run's own options, as ``trimtab METHOD`` makes it before it starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.plan.inputs import model_folder
from benchmarks.plan.worker import overrides
from trimtab.planning.job import Job
from trimtab.planning.plan import plan

MIB = 2**20


def planned_job(method: str, model: str, options: dict[str, str], folder: Path) -> Job:
    """The job of the run that a worker makes of these."""
    from trimtab import methods
    from trimtab.config import load_config
    from trimtab.studies.job import job_of

    with tempfile.TemporaryDirectory() as work:
        given = overrides(method, model_folder(folder, model), Path(work), options)
        config = load_config(methods.find(method).Config, None, given)
        return job_of(method, config)[0]


def planned(method: str, model: str, options: dict[str, str], folder: Path) -> dict[str, Any]:
    """The plan's peak in MiB, and the phase that it is in."""
    memory = plan(planned_job(method, model, options, folder)).memory
    return {"planned_mb": round(memory.peak / MIB), "phase": memory.fullest.name}
