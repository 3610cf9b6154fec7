"""One process of a run: ``python -m benchmarks.scale.worker METHOD WORK_FOLDER``, started by the command.

Reads WORK_FOLDER/options.json, trains, and writes WORK_FOLDER/RANK.json: its largest resident memory while it
trained, what it held once all was imported, when each step ended, and the seconds of its messages.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.plan.worker import imported

PARALLEL = ("torch.distributed.fsdp", "torch.distributed.tensor", "trimtab.spread.shard")


def main(method: str, folder: str) -> None:
    """Run it, and write down what it took."""
    from benchmarks.scale.messages import Messages
    from trimtab import methods
    from trimtab.config import load_config
    from trimtab.parallel.start import joined
    from trimtab.training.memory import peak_rss_mb, reset_peak, resident_mb
    from trimtab.training.run import Run

    work = Path(folder)
    given = json.loads((work / "options.json").read_text(encoding="utf-8"))
    family = json.loads(Path(given["model.path"], "config.json").read_text(encoding="utf-8"))["model_type"]
    module = methods.find(method)
    imported(family)
    for name in PARALLEL:  # in every way, so that all begin with the same
        importlib.import_module(name)
    config = load_config(module.Config, None, given)
    messages = Messages()
    ends: list[float] = []
    calls: list[list[float]] = []
    log = Run.log

    def watched(self: Run, state: Any, metrics: dict[str, Any]) -> None:
        if metrics:
            ends.append(time.perf_counter())
            calls.append(list(messages.seconds))
            messages.seconds.clear()
        log(self, state, metrics)

    gc.collect()
    reset_peak()
    baseline = resident_mb()
    with joined(), messages.timed(), patch.object(Run, "log", watched):
        module.train(config)
    found = {"peak_mb": peak_rss_mb() - baseline, "baseline_mb": baseline, "ends": ends, "calls": calls}
    rank = os.environ.get("RANK", "0")
    (work / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
