"""The plan of a case, from the run's own options, as ``trimtab METHOD`` makes it before it starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.plan.inputs import model_folder
from benchmarks.plan.worker import overrides

MIB = 2**20


def planned(method: str, model: str, options: dict[str, str], folder: Path) -> dict[str, Any]:
    """The plan's peak in MiB, and the phase that it is in."""
    from trimtab import methods
    from trimtab.config import load_config
    from trimtab.planning.plan import plan
    from trimtab.studies.job import job_of

    with tempfile.TemporaryDirectory() as work:
        given = overrides(method, model_folder(folder, model), Path(work), options)
        config = load_config(methods.find(method).Config, None, given)
        job, _, _ = job_of(method, config)
    memory = plan(job).memory
    return {"planned_mb": round(memory.peak / MIB), "phase": memory.fullest.name}
