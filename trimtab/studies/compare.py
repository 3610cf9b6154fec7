"""Compare methods on equal terms: stages from one model, one evaluation, one table, one page.

A study is a file of stages. Each stage is a run of a method that starts from the base model or from an
earlier stage; then every stage's model answers the same held-out prompts with the same sampling noise.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator

from trimtab import methods
from trimtab.config import Section, dump_toml, load_config
from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_demonstrations, as_pairs, as_prompts, convert
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig, split_by_prompt
from trimtab.errors import InputError
from trimtab.evaluation.policy import Evaluation, comparison_row, evaluate_policy
from trimtab.evaluation.preferences import pair_logps, preference_accuracy
from trimtab.evaluation.report import write_report
from trimtab.groups import Group, prompt_text
from trimtab.methods.setup import settle_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import ModelConfig, load_model
from trimtab.models.scratch import ScratchConfig, make_model
from trimtab.rewards.base import RewardConfig, response_text
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.training.metrics import read_metrics


class StageConfig(Section):
    """One run of one method. All other keys are that method's own sections ([stages.NAME.train] …)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: str = Field(description="sft, dpo, grpo, …")
    start: str = Field("", description="stage whose model this one starts from; empty takes the base model")
    reward_seen: str = Field("", description="what the table says this stage learned from")


class EvaluationConfig(Section):
    """What every stage's model is measured on."""

    reference: str = Field("sft", description="stage that the others are compared with")
    prompts: list[SourceConfig] = Field([], description="prompts that are answered and scored")
    limit: int = Field(0, ge=0, description="answer this many of the prompts; 0 all")
    reward: RewardConfig | None = Field(None, description="the gold score of an answer")
    accuracy_term: str = Field("", description="reward term whose mean is the accuracy in the table")
    samples: int = Field(1, ge=1, description="answers a prompt")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how answers are drawn")
    pairs: list[SourceConfig] = Field([], description="preference pairs for held-out accuracy")
    heldout_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="evaluate on this share of the prompts only: what stages that name it left out",
    )
    shown: int = Field(6, ge=0, description="prompts shown side by side in the report")


class StudyConfig(Section):
    """Options of ``trimtab compare``."""

    title: str = Field("Comparison", description="heading of the report")
    out: str = Field("runs/compare", description="folder of the study; {out} stands for it in any string")
    data_root: str = Field(".", description="folder of the data; {data_root} stands for it in any string")
    seed: int = Field(0, ge=0, description="of every stage, split and evaluation")
    resume: bool = Field(False, description="go on with an interrupted study in the same folder")
    budget: dict[str, Any] = Field({}, description="the stated budget, shown with the table")
    model: ModelConfig | None = Field(None, description="the base model")
    scratch: ScratchConfig | None = Field(None, description="make a new base model instead")
    stages: dict[str, StageConfig] = Field(description="what is run, in this order")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        """Put the folders where any string names them: ``{out}`` and ``{data_root}``."""
        if not isinstance(values, dict):
            return values
        out, root = values.get("out", "runs/compare"), values.get("data_root", ".")
        return _replace(values, {"{out}": str(out), "{data_root}": str(root)})

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give either [model] or [scratch]")
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if name in ("base", "world") or name.startswith(".") or "/" in name or "\\" in name:
                raise ValueError(f"stages.{name}: a stage is a folder; this name is taken or no folder name")
            if stage.method not in methods.names():
                raise ValueError(
                    f"stages.{name}.method: {stage.method!r} is none of {', '.join(methods.names())}"
                )
            if stage.start and stage.start not in earlier:
                raise ValueError(f"stages.{name}.start: {stage.start!r} is no earlier stage")
            earlier.append(name)
        if self.evaluation.reference not in earlier:
            raise ValueError(f"evaluation.reference: {self.evaluation.reference!r} is no stage")
        if self.evaluation.prompts and self.evaluation.reward is None:
            raise ValueError("evaluation.prompts needs [evaluation.reward], the score of an answer")
        return self


BeforeStage = Callable[[str], dict[str, float]]
"""Called with a stage's name before it runs; may make its data. Returns what that cost: ``wall_s``,
``generated_tokens``."""


def run_study(config: StudyConfig, before_stage: BeforeStage | None = None) -> dict[str, Any]:
    """Run every stage, evaluate, write ``summary.json`` and ``report.html``; returns the summary."""
    out = Path(config.out)
    if (out / "study.toml").exists() and not config.resume:
        raise InputError(f"{out} already holds a study; give another out, or --resume true to go on with it")
    # Every stage's options are checked before the first one spends any time.
    base_path = str(out / "base") if config.model is None else config.model.path
    stages = {name: _stage_config(config, name, base_path) for name in config.stages}
    out.mkdir(parents=True, exist_ok=True)
    if config.scratch is not None and not (out / "base" / "config.json").exists():
        first = next(iter(stages.values()))
        make_model(out / "base", config.scratch, _texts(first.data.sources), config.seed)
    # Only now: data that cannot be read must not leave a folder that "already holds a study".
    (out / "study.toml").write_text(dump_toml(config), encoding="utf-8")
    rows: dict[str, dict[str, Any]] = {}
    for name, stage_config in stages.items():
        finished = (out / name / "lineage.json").exists()
        cost = before_stage(name) if before_stage and not finished else {}
        rows[name] = _run_stage(name, config.stages[name], stage_config, cost)
        gc.collect()
    evaluated = _evaluate(config, stages, rows)
    summary = {
        "title": config.title,
        "budget": config.budget,
        "reference": config.evaluation.reference,
        "methods": rows,
        "sample_size": len(evaluated[config.evaluation.reference].scores) if evaluated else 0,
        "seed": config.seed,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    samples = _samples(evaluated, config.evaluation.shown)
    (out / "samples.json").write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
    rewrite_report(out)
    return summary


def rewrite_report(folder: str | Path) -> Path:
    """``report.html`` from the study's files. Raises InputError for a folder that holds no finished study."""
    out = Path(folder)
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        samples = json.loads((out / "samples.json").read_text(encoding="utf-8"))
        curves = {name: read_metrics(out / name / "metrics.jsonl") for name in summary["methods"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{out}: no finished study here ({error}); run trimtab compare first") from None
    write_report(
        out / "report.html", summary, curves=curves, samples=samples, title=summary.get("title", "Comparison")
    )
    return out / "report.html"


def _replace(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in places.items():
            value = value.replace(name, text)
        return value
    if isinstance(value, dict):
        return {key: _replace(inner, places) for key, inner in value.items()}
    return [_replace(inner, places) for inner in value] if isinstance(value, list) else value


def _stage_config(config: StudyConfig, name: str, base_path: str) -> Any:
    stage = config.stages[name]
    start = str(Path(config.out) / stage.start / "model") if stage.start else base_path
    values: dict[str, Any] = json.loads(json.dumps(stage.model_extra or {}))
    base = {} if config.model is None else config.model.model_dump(exclude={"path", "tokenizer"})
    values["model"] = {**base, **values.get("model", {}), "path": start}
    parent = str(Path(config.out) / stage.start) if stage.start else ""
    values["run"] = {
        "out": str(Path(config.out) / name),
        "parent": parent,
        "resume": config.resume,
        **values.get("run", {}),
    }
    values.setdefault("train", {}).setdefault("seed", config.seed)
    try:
        return load_config(methods.find(stage.method).Config, None, values)
    except InputError as error:
        raise InputError(f"stages.{name}: {str(error).removeprefix('configuration: ')}") from None


def _run_stage(name: str, stage: StageConfig, config: Any, cost: dict[str, float]) -> dict[str, Any]:
    lineage_file = Path(config.run.out) / "lineage.json"
    cost_file = Path(config.run.out) / "cost.json"
    if not lineage_file.exists():
        try:
            methods.find(stage.method).train(config)
        except InputError as error:
            raise InputError(f"stages.{name}: {error}") from None
        cost_file.write_text(json.dumps(cost) + "\n", encoding="utf-8")
    lineage = json.loads(lineage_file.read_text(encoding="utf-8"))
    if cost_file.exists():
        cost = json.loads(cost_file.read_text(encoding="utf-8"))
    return {
        "reward_seen": stage.reward_seen,
        "wall_s": lineage["wall_s"] + cost.get("wall_s", 0.0),
        "generated_tokens": lineage.get("generated_tokens", 0) + int(cost.get("generated_tokens", 0)),
        "peak_rss_mb": lineage["peak_rss_mb"],
        "models_in_memory": lineage["models_in_memory"],
        "gradient_steps": lineage["steps"],
    }


def _evaluate(
    config: StudyConfig, stages: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> dict[str, Evaluation]:
    """Fill each row's measured part; the reference stage first, since the others are compared with it."""
    options = config.evaluation
    order = [options.reference, *(name for name in stages if name != options.reference)]
    evaluated: dict[str, Evaluation] = {}
    reference: LanguageModel | None = None
    ref_P2: torch.Tensor | None = None
    for name in order:
        began = time.perf_counter()
        stage = stages[name]
        lm = load_model(stage.model.model_copy(update={"path": str(Path(stage.run.out) / "model")}))
        settle_layout(lm, stage.model.layout)
        if options.prompts:
            prompts = _heldout(options.prompts, config, lm, "prompts")[: options.limit or None]
            sampler, _ = choose_sampler(lm, options.sampling, probe_groups(lm.vocab_size))
            assert options.reward is not None
            evaluated[name] = evaluate_policy(
                lm,
                sampler,
                build_mixture(options.reward),
                prompts,
                options.sampling,
                samples=options.samples,
                seed=config.seed,
                end_tokens=end_tokens(
                    lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None)
                ),
                reference=reference,
            )
            against = None if reference is None else evaluated[options.reference]
            rows[name] |= comparison_row(evaluated[name], against, seed=config.seed)
            if term := options.accuracy_term:
                rows[name]["accuracy"] = _mean_term(evaluated[name], term)
        if options.pairs:
            pairs = _heldout(options.pairs, config, lm, "pairs")
            accuracy = preference_accuracy(lm, pairs, ref_P2=ref_P2)
            rows[name] |= {
                "preference_accuracy": accuracy["likelihood"],
                "preference_accuracy_ci95": accuracy["likelihood_ci95"],
                "preference": accuracy,
            }
            if "implicit_reward" in accuracy:
                rows[name] |= {
                    "implicit_accuracy": accuracy["implicit_reward"],
                    "implicit_accuracy_ci95": accuracy["implicit_reward_ci95"],
                }
            if reference is None:
                ref_P2 = pair_logps(lm, pairs)
        if reference is None:
            reference = lm
        rows[name]["evaluation_s"] = time.perf_counter() - began
    return evaluated


def _heldout(sources: list[SourceConfig], config: StudyConfig, lm: LanguageModel, kind: str) -> list[Group]:
    groups: list[Group] = []
    for source in sources:
        read, _ = source.read()
        to, what = (as_pairs, "a pair") if kind == "pairs" else (as_prompts, "a prompt")
        read = convert(read, to, what)
        if config.evaluation.heldout_fraction:
            _, read = split_by_prompt(read, config.evaluation.heldout_fraction, config.seed)
        groups += read
    if kind == "pairs":
        return tokenise(groups, lm.tokenizer, max_tokens=lm.context, on_long="truncate")[0]
    room = lm.context - config.evaluation.sampling.max_new_tokens
    if room < 1:
        raise InputError(
            f"evaluation.sampling.max_new_tokens: {config.evaluation.sampling.max_new_tokens} leaves no room "
            f"for a prompt in the model's {lm.context} tokens; lower it"
        )
    return tokenise(groups, lm.tokenizer, max_prompt_tokens=room, on_long="skip")[0]


def _mean_term(evaluation: Evaluation, term: str) -> float:
    responses = [r for group in evaluation.groups for r in group.responses]
    if term not in responses[0].reward_terms:
        known = ", ".join(responses[0].reward_terms)
        raise InputError(f"evaluation.accuracy_term: no reward term {term!r}; there are {known}")
    return sum(r.reward_terms[term] for r in responses) / len(responses)


def _samples(evaluated: dict[str, Evaluation], count: int) -> list[dict[str, Any]]:
    """The first answers to the first prompts, side by side."""
    if not evaluated:
        return []
    out = []
    for place, group in enumerate(next(iter(evaluated.values())).groups[:count]):
        answers = {name: e.groups[place].responses[0] for name, e in evaluated.items()}
        out.append(
            {
                "prompt": prompt_text(group.prompt),
                "columns": {k: v for k, v in group.columns.items() if isinstance(v, str | int | float)},
                "outputs": {
                    n: {"text": response_text(r.text), "score": r.reward} for n, r in answers.items()
                },
            }
        )
    return out


def _texts(sources: list[SourceConfig]) -> list[str]:
    """All text of some sources, to train a tokenizer on."""
    texts = []
    for source in sources:
        for group in as_demonstrations(source.read()[0]):
            texts.append(prompt_text(group.prompt) + response_text(group.responses[0].text))
    return texts
