"""A plan → the study that it stands for, and the lines that tell a newcomer what will be run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab.batch import Layout
from trimtab.evaluation.figures import display_name, duration
from trimtab.models.load import ModelConfig
from trimtab.studies.own_split import OwnData
from trimtab.studies.plan import Budget, Plan, supervised_batch, supervised_steps
from trimtab.studies.recipes import RECIPES, Sizes, Speeds

NAMES = {
    "reward": "reward models",
    "judge": "the judge",
    "rm": "the learned reward",
    "evaluation": "evaluation",
}
MICRO_BATCH = 4096
CHECKPOINT_S = 120
"""Seconds between the checkpoints of a long stage."""


@dataclass(slots=True)
class Made:
    """What preparing gave: all that the study and the lines about it are made of."""

    budget: Budget
    plan: Plan
    data: OwnData
    speeds: Speeds
    rates: dict[str, float]
    """Peak learning rate by method."""
    model: ModelConfig
    layout: Layout
    used: float
    """Seconds that reading and measuring took."""


def study_values(made: Made, title: str, seed: int) -> dict[str, Any]:
    """The study as a file would state it, but for ``out`` and ``resume``."""
    plan = made.plan
    learned = "rm" in plan.seconds
    return {
        "title": title,
        "seed": seed,
        "budget": {
            "asked": str(made.budget),
            "optimiser_tokens_of_each_method": plan.tokens,
            "feedback_items": plan.rows,
            "heldout_prompts": plan.heldout_prompts,
        },
        "model": made.model.model_dump(),
        "stages": _stages(made),
        "evaluation": {
            "reference": "sft",
            "prompts": [{"path": "{out}/data/prompts.jsonl"}],
            "pairs": [{"path": "{out}/data/heldout.jsonl"}],
            "reward": _score_of("judge"),
            "score_name": "Judge's score",
            "judge_stage": "judge",
            "sampling": {"max_new_tokens": made.data.new},
            **({"proxy": _score_of("rm")} if learned else {}),
        },
    }


def _stages(made: Made) -> dict[str, Any]:
    """The judge, the learned reward where a method needs it, SFT, and the methods that start from SFT."""
    plan = made.plan
    stages = {"judge": {"method": "reward", **_supervised(made, "judge", "reward", plan.judge_rows, "judge")}}
    if "rm" in plan.seconds:
        stages["rm"] = {"method": "reward", **_supervised(made, "rm", "reward", plan.rows)}
    stages["sft"] = {
        "method": "sft",
        "reward_seen": "none: the chosen responses",
        **_supervised(made, "sft", "sft", plan.rows),
    }
    return stages | {name: _method(made, name) for name in plan.responses}


def _supervised(made: Made, stage: str, method: str, rows: int, part: str = "methods") -> dict[str, Any]:
    """Data and training of a reward model or of SFT: so many passes over so many rows."""
    epochs = made.plan.epochs
    steps = supervised_steps(rows, epochs)
    train = {
        "steps": steps,
        "batch_groups": supervised_batch(rows, epochs),
        **_train(made, stage, method, steps),
    }
    return {"data": _source(part), "train": train}


def _method(made: Made, name: str) -> dict[str, Any]:
    """A method's stage: its recipe, its share of tokens, from the SFT model."""
    recipe, plan = RECIPES[name], made.plan
    sections = recipe.sections(Sizes(plan.responses[name], made.data.new, made.rates["reward"]))
    steps = math.ceil(plan.tokens / recipe.step_tokens(made.data.shape, plan.responses[name]))
    train = {"token_budget": plan.tokens, **sections.pop("train", {}), **_train(made, name, name, steps)}
    return {
        "method": name,
        "start": "sft",
        "reward_seen": recipe.reward_seen,
        "data": _source("methods"),
        "train": train,
        **sections,
    }


def _train(made: Made, stage: str, method: str, steps: int) -> dict[str, Any]:
    """Options of training that every stage has; ``steps`` are those expected."""
    train: dict[str, Any] = {
        "lr": made.rates[method],
        "warmup_steps": steps // 20,
        "micro_batch_tokens": max(MICRO_BATCH, made.data.longest(made.layout)),
        "save_every": _save_every(steps, made.plan.seconds[stage]),
        "keep_checkpoints": 1,
    }
    if limit := made.plan.limits_s.get(stage):
        train["time_budget_s"] = round(limit, 1)
    return train


def _source(part: str) -> dict[str, Any]:
    return {"sources": [{"path": f"{{out}}/data/{part}.jsonl"}]}


def _score_of(stage: str) -> dict[str, Any]:
    args = {"path": f"{{out}}/{stage}/model"}
    return {"terms": [{"name": "reward_model", "label": stage, "args": args}]}


def _save_every(steps: int, seconds: float) -> int:
    """Steps between checkpoints of a long stage; 0 for one that is soon repeated."""
    return 0 if seconds < 2 * CHECKPOINT_S else max(1, round(steps * CHECKPOINT_S / seconds))


def plan_lines(made: Made) -> list[str]:
    """The plan, for a reader who sees such a one for the first time."""
    plan, speeds, data = made.plan, made.speeds, made.data
    named = {
        **NAMES,
        **{name: display_name(name) for name in ("sft", *plan.responses)},
    }
    parts = ", ".join(f"{named[name]} {duration(seconds)}" for name, seconds in plan.seconds.items())
    spent = "; more would go through the data more than max_epochs times" if plan.data_spent else ""
    read = f", {duration(made.used)} of it gone for reading and measuring" if made.budget.seconds else ""
    size = f"{speeds.parameters / 1e6:,.1f} million" if speeds.parameters >= 1e5 else f"{speeds.parameters:,}"
    return [
        f"model: {made.model.path}, {size} parameters, computing in {speeds.dtype}; "
        f"in a second it trains {1 / speeds.train:,.0f} tokens or samples {32 / speeds.draw(1, 32):,.0f}",
        f"plan for {made.budget}{read}: about {duration(plan.total)}{spent}",
        f"  time: {parts}",
        f"  every method: {plan.tokens:,} optimiser tokens on the same {plan.rows:,} comparisons, from one "
        f"SFT model; the judge learns from {plan.judge_rows:,} others",
        f"  learning rates: {', '.join(f'{named[name]} {rate:g}' for name, rate in made.rates.items())}",
        f"  evaluation: {plan.heldout_prompts:,} held-out prompts, an answer of at most {data.new:,} tokens "
        f"to each, scored by the judge; reward models on {plan.heldout_rows:,} held-out comparisons",
    ]
