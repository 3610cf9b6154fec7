"""``trimtab pipeline``: stages in order, each starting from the policy that the one before it made.

    SFT → sample → label → reward model → GRPO …

A block of stages may be repeated: with new samples of the policy, a judge's labels on them, a reward model
that goes on with them and a share of old rows, and the policy as its own next reference, this is the outer
loop of iterative GRPO (DeepSeekMath, 2024, algorithm 1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trimtab.errors import InputError
from trimtab.evaluation.figures import MISSING, decimals, duration, signed
from trimtab.studies.config import (
    BASE,
    REWARD,
    EvaluationConfig,
    StudyFile,
    check_evaluation,
    replace_in,
    study_file,
)
from trimtab.studies.evaluate import Evaluator, ToEvaluate
from trimtab.studies.order import in_order
from trimtab.studies.planner import Planner
from trimtab.studies.publish import publish, write_json
from trimtab.studies.records import SAMPLE, Order, PipelineStage, Repeat, Step
from trimtab.studies.stages import Untrained, implicit_beta, make_base
from trimtab.studies.steps import check_sources, run_steps

FILE = "pipeline.toml"
HEADER = ("Stage", "Method", "Starts from", "Reference", "Steps", "Time", "Last figures", "Output")


class PipelineEvaluation(EvaluationConfig):
    """What every policy of a pipeline is measured on; the options are those of ``trimtab compare``."""

    reference: str = Field(BASE, description="stage that the others are compared with, or base")


class PipelineConfig(StudyFile):
    """Options of ``trimtab pipeline``."""

    title: str = Field("Pipeline", description="heading of the table and the report")
    out: str = Field("runs/pipeline", description="folder of the pipeline; {out} stands for it in any string")
    stages: dict[str, PipelineStage] = Field(description="what is run, in this order")
    repeat: list[Repeat] = Field([], description="blocks of stages that are run several times")
    evaluation: PipelineEvaluation | None = Field(None, description="what every policy is measured on")

    @model_validator(mode="after")
    def _some(self) -> PipelineConfig:
        if not self.stages:
            raise ValueError("stages is empty: add [stages.NAME] with a method")
        return self


def say_on_stderr(line: str) -> None:
    """Progress; standard output is for what a study ends in."""
    print(line, file=sys.stderr, flush=True)


def run_pipeline(config: PipelineConfig, say: Callable[[str], object] = say_on_stderr) -> dict[str, Any]:
    """Run every stage, write ``summary.json`` (and ``report.html`` with an evaluation); returns the summary.

    Raises InputError for anything that the user can mend, before the first stage wherever that can be known.
    """
    out = Path(config.out)
    refuse_held(out, FILE, config.resume, "a pipeline")
    order = in_order(config, config.stages, config.repeat)
    evaluation = None if config.evaluation is None else resolved(config, config.evaluation, order)
    check_sources(order.steps, None if evaluation is None else evaluation.evaluation, out)
    first = next((step for step in order.steps if step.kind != "data"), None)
    out.mkdir(parents=True, exist_ok=True)
    make_base(config, [] if first is None else first.fresh)
    (out / FILE).write_text(study_file(config, [step.folder for step in order.steps]), encoding="utf-8")
    rows = run_steps(order, out, config.seed, say, force=config.force)
    summary: dict[str, Any] = {
        "title": config.title,
        "seed": config.seed,
        "stages": [_row(step, order, config, rows[step.folder]) for step in order.steps],
        "final": order.model(config, order.policy),
    }
    if config.budget:
        summary["budget"] = config.budget
    if evaluation is None:
        write_json(out / "summary.json", summary)
    else:
        _evaluate(summary, order, config, evaluation, rows)
    return summary


def refuse_held(out: Path, file: str, resume: bool, what: str) -> None:
    """Raises InputError for a folder that another study is in, or this one without ``resume``."""
    if (out / file).exists() and not resume:
        raise InputError(f"{out} already holds {what}; give another out, or --resume auto to go on with it")
    others = [name for name in ("study.toml", "pipeline.toml", "sweep.toml") if name != file]
    for other in others:
        if (out / other).exists():
            raise InputError(f"{out} holds another study ({other}); give another out")


def resolved(config: StudyFile, options: EvaluationConfig, order: Order) -> ToEvaluate:
    """The evaluation with every name resolved. Raises InputError."""
    values = replace_in(options.model_dump(), order.places(config))
    for option in ("reference", "judge_stage"):
        if values[option] in order.latest:
            values[option] = order.latest[values[option]].folder
    Planner(config, order, "evaluation", PipelineStage(method=SAMPLE), "").check_paths(values)
    made = EvaluationConfig.model_validate(values)
    policies = [BASE, *(step.folder for step in order.steps if step.kind == "policy")]
    try:
        check_evaluation(made, policies, [s.folder for s in order.steps if s.stage.method == REWARD])
    except ValueError as error:
        raise InputError(str(error)) from None
    if not made.prompts and not made.pairs:
        raise InputError(
            "evaluation: nothing to measure on; add [[evaluation.prompts]] or [[evaluation.pairs]]"
        )
    return ToEvaluate(config.out, config.seed, made)


def stage_models(order: Order, config: StudyFile) -> dict[str, Any]:
    """What the evaluator loads, by folder: the configurations of steps that make a model, and the base."""
    models = {step.folder: step.config for step in order.steps if step.kind != "data"}
    some = next(iter(models.values()), None)
    if config.model is not None:
        return {BASE: Untrained(config.model), **models}
    assert some is not None, "a model from scratch comes with a stage that learns"
    return {BASE: Untrained(some.model.model_copy(update={"path": config.base_path})), **models}


def _evaluate(
    summary: dict[str, Any],
    order: Order,
    config: PipelineConfig,
    studied: ToEvaluate,
    rows: dict[str, dict[str, Any]],
) -> None:
    """Measure every model, put what was found into the summary, and write it with a report."""
    options = studied.evaluation
    betas = {
        step.folder: beta
        for step in order.steps
        if step.reference == options.reference and (beta := implicit_beta(step.stage.method, step.config))
    }
    evaluator = Evaluator(studied, stage_models(order, config), betas)
    reward_models = {
        step.folder: _figures(rows[step.folder]) | evaluator.reward_model(step.folder)
        for step in order.steps
        if step.stage.method == REWARD
    }
    table = {step.folder: _figures(rows[step.folder]) for step in order.steps if step.kind == "policy"}
    if options.reference == BASE:
        table = {BASE: {}, **table}
        summary["untrained"] = [BASE]
    evaluated = evaluator.policies(table)
    summary |= {
        "reference": options.reference,
        "methods": table,
        "sample_size": len(evaluated[options.reference].scores) if evaluated else 0,
        "score_name": options.score_name,
    }
    if reward_models:
        summary["reward_models"] = reward_models
    if options.judge_stage:
        summary["judge"] = reward_models[options.judge_stage]
    publish(Path(config.out), summary, evaluated, options.shown)


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "metrics"}


def _row(step: Step, order: Order, config: StudyFile, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of the summary's table."""
    folder = Path(config.out) / step.folder
    row: dict[str, Any] = {"stage": step.folder, "method": step.stage.method, "start": step.start}
    if step.reference:
        row["reference"] = step.reference
    if step.history and step.stage.replay:
        row["replay"] = step.stage.replay
    made = folder / "rows.jsonl" if step.kind == "data" else folder / "model"
    return {
        **row,
        "steps": facts.get("gradient_steps"),
        "wall_s": facts["wall_s"],
        "metrics": facts["metrics"],
        **{key: facts[key] for key in ("generated_tokens", "peak_rss_mb") if key in facts},
        **{key: facts[key] for key in ("rows", "judged", "repeated") if key in facts},
        "output": str(made),
    }


def stages_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and one row a stage, every cell in words."""
    rows = []
    for row in summary["stages"]:
        metrics = ", ".join(f"{_told(name)} {_figure(name, value)}" for name, value in row["metrics"].items())
        steps = MISSING if row["steps"] is None else f"{row['steps']:,}"
        cells = [row["stage"], row["method"], row["start"], row.get("reference", MISSING), steps]
        rows.append([*cells, duration(row["wall_s"]), metrics or MISSING, row["output"]])
    return list(HEADER), rows


def _told(name: str) -> str:
    return name.replace("_", " ")


def _figure(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "rows" else signed(decimals(value))
