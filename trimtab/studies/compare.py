"""Compare methods on equal terms: stages from one model, one evaluation, one table, one page.

A study is a file of stages. Each stage is a run of a method that starts from the base model or from an
earlier stage; then every policy answers the same held-out prompts with the same sampling noise. Stages of
the method "reward" are no policies: they are measured on held-out comparisons as soon as they are trained,
so that a judge's quality is known before anything is claimed with it.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.evaluation.figures import display_name
from trimtab.evaluation.policy import Evaluation, win_rate_against
from trimtab.evaluation.reward_model import judge_lines
from trimtab.methods.shared.relative_options import RelativeConfig
from trimtab.registry.ancestry import finished
from trimtab.studies.config import (
    REWARD,
    EvaluationConfig,
    StageConfig,
    StudyConfig,
    study_file,
)
from trimtab.studies.evaluate import Evaluator
from trimtab.studies.publish import publish, rewrite_report
from trimtab.studies.stages import make_base, run_stage, stage_config
from trimtab.training.metrics import read_metrics

__all__ = ["EvaluationConfig", "StageConfig", "StudyConfig", "rewrite_report", "run_study"]

WITHOUT_CONTRAST = 0.5
"""From this share of groups on, whose responses all got one reward, the summary notes it."""

BeforeStage = Callable[[str], dict[str, float]]
"""Called with a stage's name before it runs; may make its data. Returns what that cost: ``wall_s``,
``generated_tokens``."""


def run_study(config: StudyConfig, before_stage: BeforeStage | None = None) -> dict[str, Any]:
    """Run every stage, evaluate, write ``summary.json`` and ``report.html``; returns the summary."""
    out = Path(config.out)
    if (out / "study.toml").exists() and not config.resume:
        raise InputError(f"{out} already holds a study; give another out, or --resume true to go on with it")
    # Every stage's options are checked before the first one spends any time.
    stages = {name: _stage_config(config, name) for name in config.stages}
    out.mkdir(parents=True, exist_ok=True)
    make_base(config, next(iter(stages.values())).data.sources)
    # Only now: data that cannot be read must not leave a folder that "already holds a study".
    (out / "study.toml").write_text(study_file(config), encoding="utf-8")
    evaluator = Evaluator(config, stages)
    rows: dict[str, dict[str, Any]] = {}
    reward_models: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        cost = before_stage(name) if before_stage and not finished(out / name) else {}
        facts = run_stage(f"stages.{name}", config.stages[name], stage, cost, force=config.force)
        gc.collect()
        if config.stages[name].method == REWARD:
            reward_models[name] = facts | evaluator.reward_model(name)
            _say_quality(name, reward_models[name])
        else:
            rows[name] = facts | _learned_reward_cost(stage, out, reward_models)
    evaluated = evaluator.policies(rows)
    summary = {
        "title": config.title,
        "budget": config.budget,
        "reference": config.evaluation.reference,
        "methods": rows,
        "sample_size": len(evaluated[config.evaluation.reference].scores) if evaluated else 0,
        "seed": config.seed,
        **_further(config, stages, evaluated, reward_models),
    }
    publish(out, summary, evaluated, config.evaluation.shown)
    return summary


def _stage_config(config: StudyConfig, name: str) -> Any:
    stage = config.stages[name]
    parent = Path(config.out) / stage.start if stage.start else None
    return stage_config(
        config,
        f"stages.{name}",
        stage.method,
        stage.model_extra or {},
        out=Path(config.out) / name,
        start=config.base_path if parent is None else str(parent / "model"),
        parent=parent,
        seed=config.seed,
    )


def _learned_reward_cost(stage: Any, out: Path, reward_models: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds that training the reward models took which this stage learns from, if it does from any."""
    named = json.dumps(stage.model_dump(mode="json"))
    used = [name for name in reward_models if json.dumps(str(out / name / "model")) in named]
    return {"learned_reward_s": sum(reward_models[name]["wall_s"] for name in used)} if used else {}


def _say_quality(name: str, report: dict[str, Any]) -> None:
    """A reward model's quality, as soon as it is known; standard output is for what the study ends in."""
    if "accuracy" in report:
        for line in judge_lines(report, name):
            print(line, file=sys.stderr, flush=True)


def _further(
    config: StudyConfig,
    stages: dict[str, Any],
    evaluated: dict[str, Evaluation],
    reward_models: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Those parts of the summary that only some studies have."""
    options = config.evaluation
    found: dict[str, Any] = {}
    if evaluated:
        found["score_name"] = options.score_name
    if reward_models:
        found["reward_models"] = reward_models
    if options.judge_stage:
        found["judge"] = reward_models[options.judge_stage]
    others = [name for name in config.policy_stages if name in evaluated and name != options.reference]
    duels = {}
    for ours, theirs in itertools.combinations(others, 2):
        rate = win_rate_against(evaluated[ours], evaluated[theirs], seed=config.seed)
        duels[f"{ours}>{theirs}"] = {"win_rate": rate.rate, "ci95": list(rate.ci95)}
    if duels:
        found["head_to_head"] = duels
    if notes := [*_stage_notes(config, stages), *_score_notes(options, evaluated)]:
        found["notes"] = notes
    return found


def _stage_notes(config: StudyConfig, stages: dict[str, Any]) -> list[str]:
    """What happened in a stage that its figures do not show."""
    notes = []
    for name, stage in stages.items():
        lineage = json.loads((Path(config.out) / name / "lineage.json").read_text(encoding="utf-8"))
        told = display_name(name)
        tokens, steps = stage.train.token_budget, stage.train.steps
        share = lineage["optimiser_tokens"] / tokens if tokens else lineage["steps"] / (steps or 1)
        if share < 1 and (tokens or steps) and not (steps and lineage["steps"] >= steps):
            what = f"{tokens:,} optimiser tokens" if tokens else f"{steps:,} steps"
            notes.append(f"{told} was stopped by its time limit after {100 * share:.0f} % of its {what}.")
        metrics = read_metrics(Path(config.out) / name / "metrics.jsonl")
        # One response has no contrast of its own; only relative rewards need one within the group.
        shares = [line["groups_without_contrast"] for line in metrics if "groups_without_contrast" in line]
        relative = isinstance(stage, RelativeConfig)
        if relative and shares and (mean := sum(shares) / len(shares)) >= WITHOUT_CONTRAST:
            same = "all responses got the same reward, so it learned nothing from them"
            notes.append(f"{told}: in {100 * mean:.0f} % of its groups {same}.")
        if skipped := lineage.get("skipped_groups"):
            notes.append(f"{told}: {skipped:,} groups were left out, since the reward could not score them.")
    return notes


def _score_notes(options: EvaluationConfig, evaluated: dict[str, Evaluation]) -> list[str]:
    """What makes the deciding score say less than it seems."""
    notes = [
        f"{display_name(name)}: {found.unscored:,} of its answers could not be scored and were left out."
        for name, found in evaluated.items()
        if found.unscored
    ]
    scores = {score for found in evaluated.values() for score in found.scores}
    if evaluated and len(scores) == 1:
        notes.append(f"{options.score_name} is {scores.pop():g} for every answer: it tells no two apart.")
    return notes
