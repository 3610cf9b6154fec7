"""``trimtab compare --model M --data FILE --budget 30m``: which method, by how much, at what cost?

The prompts are split first: held out / judge / methods. The judging reward model learns from its own part,
which no method sees; a second reward model learns from the methods' part, and PPO and GRPO learn from it.
Every method starts from one SFT model and trains on the same number of tokens. What the study is made of
is written to ``out/data``, ``out/plan.json`` and ``out/study.toml`` before anything is trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trimtab.config import Section, load_config
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_model
from trimtab.studies.compare import run_study
from trimtab.studies.config import StudyConfig
from trimtab.studies.measure import measure
from trimtab.studies.own_split import read_own_data
from trimtab.studies.own_study import Made, plan_lines, study_values
from trimtab.studies.plan import (
    Limits,
    parse_budget,
    shape_of,
    solve,
)
from trimtab.studies.recipes import RECIPES, SUPERVISED, Speeds, learning_rate

QUICK_LOAD_S = 5.0


class OwnDataConfig(Section):
    """Options of ``trimtab compare --model … --data …``."""

    model: ModelConfig
    data: SourceConfig
    budget: str = Field(
        "30m", description='time for everything ("30m", "2h"), or tokens for each method ("200k tokens")'
    )
    methods: list[str] = Field(
        ["sft", *RECIPES], description="what is compared, as sft,dpo,…; all start from SFT, the reference"
    )
    out: str = Field("runs/own", description="folder of the study")
    title: str = Field("Comparison on my own data", description="heading of the report")
    seed: int = Field(0, ge=0, description="of the split, every stage and the evaluation")
    resume: bool = Field(False, description="go on with an interrupted comparison in the same folder")
    force: bool = Field(False, description="train methods too that the plan says cannot fit into memory")
    heldout_share: float = Field(
        0.2, gt=0, lt=1, description="share of the prompts that only evaluation sees"
    )
    judge_share: float = Field(0.3, gt=0, lt=1, description="share of the prompts that only the judge sees")
    max_tokens: int = Field(
        1024, ge=2, description="longest prompt with one response; longer rows are left out and counted"
    )
    max_new_tokens: int = Field(
        0, ge=0, description="longest sampled response; 0 takes the data's 95th percentile"
    )
    max_epochs: float = Field(3.0, ge=1, description="passes over the data at most, however large the budget")
    max_prompts: int = Field(300, ge=20, description="held-out prompts that are answered, at most")
    eval_share: float = Field(0.2, gt=0, lt=1, description="share of the time that evaluation may take")
    lr: dict[str, float] = Field(
        {},
        description="peak learning rate of a method, as --lr.dpo 1e-6; others go by the model's size: at 0.5 "
        "billion parameters reward 1e-5, sft 2e-5, dpo, ppo and grpo 2e-6",
    )

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(names := values.get("methods"), str):
            values = {**values, "methods": [name.strip() for name in names.split(",") if name.strip()]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> OwnDataConfig:
        known = ["sft", *RECIPES]
        for name in self.methods:
            if name not in known:
                raise ValueError(f"methods: {name!r} is none of {', '.join(known)}")
            if self.methods.count(name) > 1:
                raise ValueError(f"methods: {name!r} is named twice")
        if not set(self.methods) - {"sft"}:
            raise ValueError("methods: name one besides sft, which is what the others are compared with")
        for name, rate in self.lr.items():
            if name not in (*SUPERVISED, *RECIPES):
                raise ValueError(f"lr.{name}: is none of {', '.join((*SUPERVISED, *RECIPES))}")
            if name in RECIPES and name not in self.methods:
                raise ValueError(f"lr.{name} has no effect: {name} is not among the methods")
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"lr.{name}: give a number above 0")
        if self.heldout_share + self.judge_share >= 1:
            raise ValueError(
                "heldout_share and judge_share leave the methods nothing; their sum must be below 1"
            )
        if self.data.weight != 1.0:
            raise ValueError("data.weight has no effect on a single source; remove it")
        parse_budget(self.budget)
        return self

    @property
    def compared(self) -> list[str]:
        """The methods besides SFT."""
        return [name for name in self.methods if name != "sft"]


def run_own_data(config: OwnDataConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Split, plan, run and evaluate; returns the summary. ``say`` gets what is to be known before the table.

    Raises InputError for too little data, too small a budget, and a folder that holds another comparison.
    """
    began = time.perf_counter()
    out = Path(config.out)
    kept = _kept(config)
    values = _prepare(config, began) if kept is None else kept
    for line in values["lines"]:
        say(line)
    given = {"out": config.out, "resume": config.resume, "force": config.force}
    study = load_config(StudyConfig, None, {**values["study"], **given})
    if kept is None:
        # Last, so that a plan that is there is whole.
        _write(out / "plan.json", json.dumps(values, indent=2) + "\n")
    return run_study(study)


def _kept(config: OwnDataConfig) -> dict[str, Any] | None:
    """The stored plan of an interrupted comparison. Raises InputError where the folder is taken."""
    file = Path(config.out) / "plan.json"
    if not file.exists():
        if (Path(config.out) / "study.toml").exists():
            raise InputError(f"{config.out} holds another study; give another out")
        return None
    if not config.resume:
        raise InputError(
            f"{config.out} already holds a comparison; give another out, or --resume true to go on with it"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        before, _, _ = (values[key] for key in ("options", "lines", "study"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged plan ({error}); remove {config.out} and start again") from None
    for key, value in _options(config).items():
        if before.get(key) != value:
            raise InputError(
                f"{key}: the comparison in {config.out} was planned with {before.get(key)!r}, not {value!r}; "
                "resume it with the same options, or give another out"
            )
    return values


def _options(config: OwnDataConfig) -> dict[str, Any]:
    """What a plan depends on, with dotted keys."""
    values = config.model_dump(mode="json", exclude={"out", "resume", "force", "title"})
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("model", "data"):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _prepare(config: OwnDataConfig, began: float) -> dict[str, Any]:
    """Read, split, measure, plan; writes the data files. What ``plan.json`` holds."""
    budget = parse_budget(config.budget)
    lm, load_s = _load(config.model)
    if load_s < QUICK_LOAD_S:
        # The first time, importing the architecture's code may have taken longer than the model.
        lm, load_s = _load(config.model)
    data = read_own_data(
        config.data,
        lm.tokenizer,
        heldout_share=config.heldout_share,
        judge_share=config.judge_share,
        max_tokens=min(config.max_tokens, lm.context),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    layout = lm.layout
    speeds = measure(lm, data.sample, data.new, load_s)
    del lm
    used = time.perf_counter() - began
    limits = Limits(
        methods=config.compared,
        rows=data.expected("methods"),
        judge_rows=data.expected("judge"),
        heldout_rows=data.expected("heldout"),
        heldout_prompts=data.expected_prompts("heldout"),
        max_epochs=config.max_epochs,
        eval_share=config.eval_share,
        max_prompts=config.max_prompts,
    )
    shape = shape_of(data.sample, data.new)
    plan = solve(budget, shape, speeds, limits, used)
    written = data.write(
        Path(config.out) / "data",
        methods=plan.rows,
        judge=plan.judge_rows,
        heldout=plan.heldout_rows,
        prompts=plan.heldout_prompts,
    )
    plan.rows, plan.judge_rows, plan.heldout_rows, plan.heldout_prompts = written
    rates = _rates(config, speeds)
    made = Made(budget, plan, data, speeds, rates, config.model, layout, used)
    return {
        "options": _options(config),
        "lines": [*data.lines, *plan_lines(made)],
        "plan": dataclasses.asdict(plan),
        "shape": dataclasses.asdict(shape),
        "speeds": dataclasses.asdict(speeds),
        "study": study_values(made, config.title, config.seed),
    }


def _load(model: ModelConfig) -> tuple[LanguageModel, float]:
    """The model in its layout, and the seconds that this took."""
    began = time.perf_counter()
    lm = load_model(model)
    settle_layout(lm, model.layout)
    return lm, time.perf_counter() - began


def _rates(config: OwnDataConfig, speeds: Speeds) -> dict[str, float]:
    stated = {**SUPERVISED, **{name: (RECIPES[name].lr, RECIPES[name].power) for name in config.compared}}
    return {
        name: config.lr.get(name, learning_rate(lr, power, speeds.parameters))
        for name, (lr, power) in stated.items()
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
