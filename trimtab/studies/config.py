"""What a study's file may say. ``{out}`` and ``{data_root}`` stand for its folders in any string."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import ConfigDict, Field, field_validator, model_validator

from trimtab import methods
from trimtab.config import Section, dump_toml, toml_value
from trimtab.data.sources import SourceConfig
from trimtab.models.load import ModelConfig
from trimtab.models.scratch import ScratchConfig
from trimtab.rewards.base import RewardConfig
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rollouts.sampling import SamplingConfig

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""A name that TOML takes without quotes."""
FOLDER_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,60}")
"""A name that is one folder, and neither a hidden one nor the study's own."""
REWARD = "reward"
"""The method whose stages are reward models and no policies."""
PROCESS_REWARD = "process-reward"
"""The method whose stages are reward models of steps, and no policies."""
BASE = "base"
"""What the model is called that everything starts from, and its folder where a study makes it."""
TAKEN = (BASE, "world", "data", "eval")
"""Folders of a study that no stage may have."""


def check_folder(key: str, name: str) -> None:
    """Raises ValueError for a stage's name that is no folder's, or another's."""
    if name in TAKEN or not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{key}: a stage is a folder; this name is taken or no folder name")


class StageConfig(Section):
    """One run of one method. All other keys are that method's own sections ([stages.NAME.train] …)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: str = Field(description="sft, reward, dpo, ppo, grpo, …")
    start: str = Field("", description="stage whose model this one starts from; empty takes the base model")
    reward_seen: str = Field("", description="what the table says this stage learned from")
    sees_judge: bool = Field(
        False, description="it learned from the score that decides: marked in the table, never the winner"
    )


class EvaluationConfig(Section):
    """What every stage's model is measured on."""

    reference: str = Field("sft", description="stage that the others are compared with")
    prompts: list[SourceConfig] = Field([], description="prompts that are answered and scored")
    limit: int = Field(0, ge=0, description="answer this many of the prompts; 0 all")
    reward: RewardConfig | None = Field(None, description="the gold score of an answer")
    score_name: str = Field("Gold reward", description="what the gold score is called in table and report")
    proxy: RewardConfig | None = Field(
        None, description="the learned reward that methods were trained on, scored on the same answers"
    )
    judge: JudgeConfig | None = Field(
        None, description="a pairwise judge who compares every method's answers with the reference's"
    )
    judge_stage: str = Field(
        "",
        description="reward stage whose model judges: measured on pairs and shown before anything is claimed",
    )
    accuracy_term: str = Field("", description="reward term whose mean is the accuracy in the table")
    samples: int = Field(1, ge=1, description="answers a prompt")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how answers are drawn")
    pairs: list[SourceConfig] = Field(
        [], description="held-out preferences: accuracy of policies and reward models"
    )
    pairs_for: Literal["all", "rewards"] = Field(
        "all", description="whom pairs measure: policies and reward models, or reward models only"
    )
    heldout_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="evaluate on this share of the prompts only: what stages that name it left out",
    )
    shown: int = Field(6, ge=0, description="prompts shown side by side in the report")


def check_evaluation(options: EvaluationConfig, policies: list[str], rewards: list[str]) -> None:
    """Raises ValueError for options that name what is not there, or that do nothing.

    ``policies`` and ``rewards`` are the names of what answers prompts and of what scores answers.
    """
    if options.reference not in policies:
        what = "a reward model" if options.reference in rewards else "no stage"
        raise ValueError(f"evaluation.reference: {options.reference!r} is {what}")
    if options.prompts and options.reward is None:
        raise ValueError("evaluation.prompts needs [evaluation.reward], the score of an answer")
    if options.proxy is not None and not options.prompts:
        raise ValueError("evaluation.proxy has no effect without evaluation.prompts")
    if options.accuracy_term and (options.reward is None or not options.prompts):
        raise ValueError("evaluation.accuracy_term has no effect without evaluation.prompts")
    if options.accuracy_term and options.reward is not None:
        terms = [term.label or term.name.rpartition(":")[2] for term in options.reward.terms]
        if options.accuracy_term.split("/")[0] not in [term.split("/")[0] for term in terms]:
            known = ", ".join(terms)
            raise ValueError(
                f"evaluation.accuracy_term: no reward term {options.accuracy_term!r}; there are {known}"
            )
    if options.judge is not None and not options.prompts:
        raise ValueError("evaluation.judge needs [[evaluation.prompts]], whose answers it compares")
    if options.judge is not None and options.judge.mode != "pairwise":
        raise ValueError('evaluation.judge compares two answers: it needs mode = "pairwise"')
    if options.judge_stage and options.judge_stage not in rewards:
        raise ValueError(f"evaluation.judge_stage: {options.judge_stage!r} is no stage of method reward")
    if options.pairs_for != "all" and not options.pairs:
        raise ValueError("evaluation.pairs_for has no effect without [[evaluation.pairs]]")
    if options.judge_stage and not options.pairs:
        raise ValueError("evaluation.judge_stage needs [[evaluation.pairs]], which measure the judge")


class StudyFile(Section):
    """What the files of ``trimtab compare``, ``trimtab pipeline`` and ``trimtab sweep`` have in common."""

    title: str = Field("Comparison", description="heading of the report")
    out: str = Field("runs/compare", description="folder of the study; {out} stands for it in any string")
    data_root: str = Field(".", description="folder of the data; {data_root} stands for it in any string")
    seed: int = Field(0, ge=0, description="of every stage, split and evaluation")
    resume: bool = Field(
        False, description="go on with an interrupted study in the same folder; true or auto"
    )
    force: bool = Field(False, description="train stages too that the plan says cannot fit into memory")
    budget: dict[str, Any] = Field({}, description="the stated budget, shown with the table")
    model: ModelConfig | None = Field(None, description="the base model")
    scratch: ScratchConfig | None = Field(None, description="make a new base model instead")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        """Put the folders where any string names them: ``{out}`` and ``{data_root}``."""
        if not isinstance(values, dict):
            return values
        usual = {name: cls.model_fields[name].default for name in ("out", "data_root")}
        given = {f"{{{name}}}": str(values.get(name, default)) for name, default in usual.items()}
        return replace_in(values, given)

    @field_validator("resume", mode="before")
    @classmethod
    def _auto(cls, value: object) -> object:
        return True if value == "auto" else value

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give either [model] or [scratch]")
        return self

    @property
    def base_path(self) -> str:
        """The base model: a hub name or a folder."""
        return str(Path(self.out) / BASE) if self.model is None else self.model.path


class StudyConfig(StudyFile):
    """Options of ``trimtab compare``."""

    stages: dict[str, StageConfig] = Field(description="what is run, in this order")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            self._check_stage(name, stage, earlier)
            earlier.append(name)
        check_evaluation(self.evaluation, self.policy_stages, self.reward_stages)
        return self

    def _check_stage(self, name: str, stage: StageConfig, earlier: list[str]) -> None:
        check_folder(f"stages.{name}", name)
        if stage.method not in methods.names():
            raise ValueError(
                f"stages.{name}.method: {stage.method!r} is none of {', '.join(methods.names())}"
            )
        if stage.method == PROCESS_REWARD:
            raise ValueError(
                f"stages.{name}: {PROCESS_REWARD} makes no policy, so there is nothing to compare; train it "
                "before, or in a pipeline"
            )
        if stage.start and stage.start not in earlier:
            raise ValueError(f"stages.{name}.start: {stage.start!r} is no earlier stage")
        if stage.start and stage.start in self.reward_stages:
            raise ValueError(
                f"stages.{name}.start: {stage.start!r} is a reward model, no policy; a critic may start from "
                f'it, with critic.path = "{{out}}/{stage.start}/model"'
            )
        if stage.sees_judge and stage.method == REWARD:
            raise ValueError(f"stages.{name}.sees_judge has no effect on a reward model")

    @property
    def policy_stages(self) -> list[str]:
        """The stages whose models answer prompts: the rows of the table."""
        return [name for name, stage in self.stages.items() if stage.method != REWARD]

    @property
    def reward_stages(self) -> list[str]:
        """The stages whose models score answers."""
        return [name for name, stage in self.stages.items() if stage.method == REWARD]


def study_file(config: StudyFile, made: Iterable[str] = ()) -> str:
    """The resolved study as TOML, which repeats it in another folder.

    What the study itself makes ({out}/rm/model) keeps the placeholder, so that a repetition uses its own;
    ``made``: folders that it makes besides those named after its stages.
    """
    stages = [name for name, info in type(config).model_fields.items() if _holds_stages(info.annotation)]
    folders = [*(name for field in stages for name in getattr(config, field)), *made]
    if config.scratch is not None:
        folders.append(BASE)
    plain = stand_in(
        config.model_dump(), {str(Path(config.out) / name): f"{{out}}/{name}" for name in folders}
    )
    values = plain | {name: {} for name in stages} | {"resume": False, "force": False}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            kept = name in ("model", "scratch")
            values[name] = section if kept else type(section).model_validate(plain[name])
    # Not validated again: that would put the folders back in.
    shown = type(config).model_construct(**values)
    # Stages have no fixed fields to be written by: each section of theirs becomes a table.
    lines = [line for line in dump_toml(shown).splitlines() if line.split(" = ")[0] not in stages]
    for field in stages:
        for name, stage in plain[field].items():
            kind = type(getattr(config, field)[name])
            usual = {key: info.default for key, info in kind.model_fields.items() if key != "method"}
            given = {key: value for key, value in stage.items() if key not in usual or value != usual[key]}
            lines += _tables(f"{field}.{name if BARE_KEY.fullmatch(name) else toml_value(name)}", given)
    return "\n".join(lines) + "\n"


def _holds_stages(annotation: Any) -> bool:
    """Whether a field is a table of stages by name."""
    inner = get_args(annotation)
    return get_origin(annotation) is dict and isinstance(inner[1], type) and issubclass(inner[1], StageConfig)


def _tables(name: str, values: dict[str, Any]) -> list[str]:
    """A table and the tables within it, as lines of TOML."""
    lines = ["", f"[{name}]"]
    lines += [f"{key} = {toml_value(v)}" for key, v in values.items() if not isinstance(v, dict)]
    for key, inner in values.items():
        if isinstance(inner, dict):
            lines += _tables(f"{name}.{key if BARE_KEY.fullmatch(key) else toml_value(key)}", inner)
    return lines


def stand_in(value: Any, places: dict[str, str]) -> Any:
    """Paths within one of ``places``, in any string, as its stand-in."""
    if isinstance(value, str):
        for path, name in places.items():
            if value == path or value.startswith(f"{path}/"):
                return name + value[len(path) :]
        return value
    if isinstance(value, dict):
        return {key: stand_in(inner, places) for key, inner in value.items()}
    return [stand_in(inner, places) for inner in value] if isinstance(value, list) else value


def replace_in(value: Any, places: dict[str, str]) -> Any:
    """Every key of ``places`` as its text, in any string."""
    if isinstance(value, str):
        for name, text in places.items():
            value = value.replace(name, text)
        return value
    if isinstance(value, dict):
        return {key: replace_in(inner, places) for key, inner in value.items()}
    return [replace_in(inner, places) for inner in value] if isinstance(value, list) else value
