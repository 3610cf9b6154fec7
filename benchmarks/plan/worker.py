"""One run in a fresh process: ``python -m benchmarks.plan.worker METHOD MODEL_FOLDER WORK_FOLDER OPTIONS``.

Everything that the run imports is imported first. What the process holds then is the baseline; what it holds
at most while the run trains, above that, is the measured peak. Written to WORK_FOLDER/result.json.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.plan.cases import METHODS, REWARDED, STEPS
from benchmarks.plan.inputs import write_rows


def imported(family: str) -> None:
    """Import what a run would only import on its way."""
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    for name in (f"models.{family}.modeling_{family}", "models.qwen2.tokenization_qwen2", "masking_utils"):
        importlib.import_module(f"transformers.{name}")


def overrides(method: str, model: Path, work: Path, options: dict[str, str]) -> dict[str, Any]:
    """The run's options."""
    kind, own = METHODS[method]
    files = [(one, work / f"{one}.jsonl") for one in kind.split(" and ")]
    for one, file in files:
        write_rows(file, one)
    given: dict[str, Any] = {
        "model.path": str(model),
        "model.dtype": "bfloat16",
        "data.sources": [{"path": str(file)} for _, file in files],
        "run.out": str(work / "run"),
        "train.steps": STEPS,
        "train.kernels": "on",
        **own,
        **options,
    }
    if kind == "prompts":
        learned = {"name": "reward_model", "args": {"path": f"{model}-reward"}}
        # So that answers differ: where a group's do not, dapo samples another in its place.
        plain = {"name": "length", "args": {"limit": 0, "span": 2048, "unit": "characters"}}
        given["reward.terms"] = [learned if method in REWARDED else plain]
    return given


def main(method: str, model: str, work: str, options: str) -> None:
    """Plan the run, then run it, and write down both."""
    from trimtab import methods
    from trimtab.config import load_config
    from trimtab.training.memory import peak_rss_mb, reset_peak, resident_mb

    family = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["model_type"]
    module = methods.find(method)
    imported(family)
    config = load_config(module.Config, None, overrides(method, Path(model), Path(work), json.loads(options)))
    gc.collect()
    reset_peak()
    baseline = resident_mb()
    result = module.train(config)
    peak = peak_rss_mb() - baseline
    lines = (result.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {"measured_mb": peak, "baseline_mb": baseline, "metrics": [json.loads(line) for line in lines]}
    Path(work, "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
