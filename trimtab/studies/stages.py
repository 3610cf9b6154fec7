"""One stage of a study: its configuration from the file's sections, and its run.

``trimtab compare``, ``trimtab pipeline`` and ``trimtab sweep`` share these, so that a stage means the same
in each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import methods
from trimtab.config import load_config
from trimtab.data.convert import as_demonstrations
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.evaluation.watching.during import heldout_evaluation
from trimtab.groups import prompt_text
from trimtab.models.load import ModelConfig
from trimtab.models.scratch import make_model
from trimtab.registry.ancestry import finished
from trimtab.rewards.base import response_text
from trimtab.studies import launch
from trimtab.studies.config import BASE, REWARD, StageConfig, StudyFile

NO_REFERENCE = ("simpo", "orpo")
"""Methods with a β that anchors to nothing."""
BRADLEY_TERRY = ("sigmoid", "robust", "listwise", "pairs")
"""Losses that fit σ(β·Δ) to how often a response is preferred."""


@dataclass(frozen=True, slots=True)
class Untrained:
    """A model of a study that no stage of it made; where a stage's configuration would stand."""

    model: ModelConfig


def stage_config(
    study: StudyFile,
    key: str,
    method: str,
    sections: dict[str, Any],
    *,
    out: Path,
    start: str,
    parent: Path | None,
    seed: int,
) -> Any:
    """The method's own configuration of a stage, every option checked.

    ``sections``: what the file says of it; ``start``: folder or hub name of the model that it starts from;
    ``parent``: the run that made that model. Raises InputError that begins with ``key``.
    """
    values: dict[str, Any] = json.loads(json.dumps(sections))
    check_sections(key, values, ("model", "run", "train"))
    values["model"] = {**model_options(study, start), **values.get("model", {}), "path": start}
    values["run"] = {
        "out": str(out),
        "parent": "" if parent is None else str(parent),
        "resume": study.resume,
        **values.get("run", {}),
    }
    values.setdefault("train", {}).setdefault("seed", seed)
    try:
        return load_config(methods.find(method).Config, None, values)
    except InputError as error:
        raise InputError(f"{key}: {without_place(error)}") from None


def check_sections(key: str, values: dict[str, Any], names: Iterable[str]) -> None:
    """Raises InputError for one of ``names`` that is no section."""
    for name in names:
        if not isinstance(values.get(name, {}), dict):
            raise InputError(f"{key}.{name}: {values[name]!r} is no section; write [{key}.{name}]")


def without_place(error: InputError) -> str:
    """A configuration's error without where it stands: sections handed over are no file's nor a command's."""
    return re.sub(r"^(configuration|--[^\s:]+): ", "", str(error))


def model_options(study: StudyFile, start: str) -> dict[str, Any]:
    """What [model] says of every stage's model; a stage's own folder has a tokenizer of its own."""
    if study.model is None:
        return {}
    alone = {"path"} if start == study.base_path else {"path", "tokenizer"}
    return study.model.model_dump(exclude=alone)


def run_stage(
    key: str,
    stage: StageConfig,
    config: Any,
    cost: dict[str, float],
    *,
    on_eval: Callable[[Any], Any] | None = None,
    force: bool = False,
    swept: Collection[str] = (),
) -> dict[str, Any]:
    """Run the stage unless it has been run; what it took, from its lineage.

    ``cost``: seconds and tokens that making its data took. ``on_eval``: makes the evaluation while it runs
    from its configuration. ``force``: also where its plan does not fit; ``swept``: options that a sweep
    varies. Raises InputError that begins with ``key``.
    """
    out = Path(config.run.out)
    if not finished(out):
        try:
            if on_eval is None and config.watch.in_use:
                on_eval = heldout_evaluation  # asked for by the stage itself
            evaluate = None if on_eval is None else on_eval(config)
            place = key.split(" with ")[0]  # a sweep's run names its point too
            launch.train(stage.method, config, on_eval=evaluate, force=force, stage=place, swept=swept)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        (out / "cost.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")
    return facts_of(stage, out)


def facts_of(stage: StageConfig, out: Path) -> dict[str, Any]:
    """What a finished stage took."""
    lineage = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    cost = {}
    if (out / "cost.json").exists():
        cost = json.loads((out / "cost.json").read_text(encoding="utf-8"))
    facts = {
        "wall_s": lineage["wall_s"] + cost.get("wall_s", 0.0),
        "peak_rss_mb": lineage["peak_rss_mb"],
        **memory_of(lineage),
        "gradient_steps": lineage["steps"],
        "optimiser_tokens": lineage["optimiser_tokens"],
        "feedback_items": lineage.get("feedback_items"),
    }
    if stage.method == REWARD:
        return facts
    return {
        "reward_seen": stage.reward_seen,
        "sees_judge": stage.sees_judge,
        "generated_tokens": lineage.get("generated_tokens", 0) + int(cost.get("generated_tokens", 0)),
        "models_in_memory": lineage["models_in_memory"],
        **facts,
    }


def memory_of(lineage: dict[str, Any]) -> dict[str, float]:
    """The planned and the measured peak of a finished run above what its process held before, in MiB."""
    plan = lineage.get("plan")
    if not isinstance(plan, dict) or "measured_peak_mb" not in plan:
        return {}
    return {"planned_peak_mb": plan["peak_mb"], "measured_peak_mb": plan["measured_peak_mb"]}


def implicit_beta(method: str, config: Any) -> float | None:
    """The β by which β·(log π − log π_ref) is what a stage's policy takes a response to be worth.

    None for a method without such a reading: no β or one that followed the measured KL, no reference or one
    that moved, log-probabilities averaged over tokens, or a loss that fits something else than a probability
    (IPO's is a gap in nats).
    """
    options = getattr(config, method.replace("-", "_"), None)
    if options is None or method in (*NO_REFERENCE, "ipo"):
        return None
    moves = getattr(options, "refresh_reference_every", 0) or getattr(options, "iterations", 1) > 1
    moves = moves or getattr(options, "kl_control", "fixed") != "fixed"
    if moves or getattr(options, "reference_free", False) or getattr(options, "logps", "sum") != "sum":
        return None
    if getattr(options, "loss", BRADLEY_TERRY[0]) not in BRADLEY_TERRY:
        return None
    beta = getattr(options, "beta_end", None)
    beta = getattr(options, "beta", None) if beta is None else beta
    return float(beta) if isinstance(beta, int | float) and beta > 0 else None


def make_base(study: StudyFile, sources: list[SourceConfig]) -> None:
    """Make the study's own base model, if it has one that is not there yet, with words from ``sources``."""
    folder = Path(study.out) / BASE
    if study.scratch is None or (folder / "config.json").exists():
        return
    make_model(folder, study.scratch, _texts(sources), study.seed)


def _texts(sources: list[SourceConfig]) -> list[str]:
    """All text of some sources, to train a tokenizer on."""
    texts = []
    for source in sources:
        for group in as_demonstrations(source.read()[0]):
            texts.append(prompt_text(group.prompt) + response_text(group.responses[0].text))
    return texts
