"""What fits a budget: speeds (see ``measure.py``) → the same number of optimiser tokens for every method.

One number is solved for, the tokens B that every method trains on; everything else follows from it. With N
rows of c tokens in the methods' part, as many rows are used as B tokens are worth (B / c); where the data
are fewer, they are gone through several times, up to ``max_epochs``. The judge gets as many rows as the
methods, from its own part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from trimtab.data.convert import as_pairs
from trimtab.errors import InputError
from trimtab.evaluation.figures import duration
from trimtab.groups import Group
from trimtab.methods.shared.setup import tokens_of
from trimtab.studies.recipes import RECIPES, Recipe, Shape, Speeds

FILL = 0.85
"""Share of the time that is planned for: sampling slows down as responses grow, and files are written."""
STRETCH = 1.15
"""Every stage is stopped at its share of this multiple of the time."""
RESPONSES = (32, 16, 8)
"""Responses in an optimiser step; fewer where the budget would otherwise hold fewer than STEPS steps."""
STEPS = 24
FEWEST_PROMPTS = 20
"""Held-out prompts that are evaluated on at least, and prompts that every part has at least."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds for everything, or optimiser tokens for every method."""

    seconds: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return duration(self.seconds)
        return f"{self.tokens:,} optimiser tokens a method"


def parse_budget(text: str) -> Budget:
    """``"30m"``, ``"1h 30m"``, ``"90s"``, ``"200k tokens"``. Raises InputError for anything else."""
    tokens = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kM]?)\s*tokens?\s*", text)
    if tokens and (count := round(float(tokens[1]) * {"": 1, "k": 1e3, "M": 1e6}[tokens[2]])):
        return Budget(tokens=count)
    number = r"([0-9]+(?:\.[0-9]+)?)"
    time_ = re.fullmatch(
        rf"\s*(?:{number}\s*h(?:ours?)?)?\s*(?:{number}\s*m(?:in(?:utes?)?)?)?"
        rf"\s*(?:{number}\s*s(?:ec(?:onds?)?)?)?\s*",
        text,
    )
    if time_:
        hours, minutes, seconds = (float(part or 0) for part in time_.groups())
        if total := 3600 * hours + 60 * minutes + seconds:
            return Budget(seconds=total)
    raise InputError(f'budget: {text!r} is no budget; say "30m", "1h 30m", "90s" or "200k tokens"')


@dataclass(frozen=True, slots=True)
class Limits:
    """What the plan has to keep to."""

    methods: list[str]
    """Without SFT."""
    rows: int
    """Comparisons in the methods' part."""
    judge_rows: int
    heldout_rows: int
    heldout_prompts: int
    max_epochs: float
    eval_share: float
    max_prompts: int


@dataclass(slots=True)
class Plan:
    """What is run, and how long each part is expected to take."""

    tokens: int
    """Optimiser tokens of every method: B."""
    rows: int
    judge_rows: int
    heldout_prompts: int
    heldout_rows: int
    epochs: float
    """Passes of judge, reward model and SFT over their rows."""
    responses: dict[str, int]
    """Responses in an optimiser step, by method."""
    seconds: dict[str, float]
    """Expected time of every stage, and of "evaluation"."""
    data_spent: bool = False
    """More tokens would go through the data more than ``max_epochs`` times."""
    limits_s: dict[str, float] = field(default_factory=dict)
    """When a stage is stopped; empty without a time budget."""

    @property
    def total(self) -> float:
        """Expected seconds of everything."""
        return sum(self.seconds.values())


def shape_of(comparisons: Sequence[Group], new: int) -> Shape:
    """Mean token counts of tokenised comparisons."""
    count = len(comparisons)
    pairs = as_pairs(comparisons)
    best = [min(g.responses, key=lambda r: r.rank or 0.0) for g in comparisons]
    return Shape(
        prompt=sum(len(g.prompt_tokens or ()) for g in comparisons) / count,
        chosen=sum(len(r.tokens or ()) for r in best) / count,
        comparison=tokens_of(comparisons) / count,
        pairs=tokens_of(pairs) / count,
        pair=tokens_of(pairs) / len(pairs),
        new=new,
    )


# --- solving


def solve(budget: Budget, shape: Shape, speeds: Speeds, limits: Limits, used: float = 0.0) -> Plan:
    """The largest plan within the budget, of which ``used`` seconds are gone.

    Raises InputError, naming the smallest budget that would do, where no method could take a step.
    """
    recipes = [RECIPES[name] for name in limits.methods]
    fewest = math.ceil(max(recipe.step_tokens(shape, RESPONSES[-1]) for recipe in recipes))
    most = max(fewest, math.floor(limits.max_epochs * limits.rows * shape.comparison))
    smallest = _plan(fewest, FEWEST_PROMPTS, shape, speeds, limits)
    if budget.tokens is not None:
        if budget.tokens < fewest:
            raise InputError(
                f"budget: {budget.tokens:,} tokens are less than one step of a method; "
                f"the smallest that would do is {fewest:,} tokens"
            )
        return _plan(budget.tokens, limits.max_prompts, shape, speeds, limits)
    assert budget.seconds is not None
    room = FILL * (budget.seconds - used)
    if smallest.total > room:
        needed = math.ceil((smallest.total / FILL + used) * 1.05)
        raise InputError(
            f"budget: {duration(budget.seconds)} is too little for one step of each method on this model and "
            f'data; the smallest that would do is about {duration(needed)} (budget = "{needed}s")'
        )
    none, one = (_evaluation_seconds(count, shape, speeds, limits) for count in (0, 1))
    affordable = math.floor((limits.eval_share * room - none) / (one - none))
    prompts = min(limits.max_prompts, max(FEWEST_PROMPTS, affordable))
    if _plan(fewest, prompts, shape, speeds, limits).total > room:
        prompts = FEWEST_PROMPTS
    low, high = fewest, most
    while high - low > 1:
        middle = (low + high) // 2
        fits = _plan(middle, prompts, shape, speeds, limits).total <= room
        low, high = (middle, high) if fits else (low, middle)
    tokens = high if _plan(high, prompts, shape, speeds, limits).total <= room else low
    plan = _plan(tokens, prompts, shape, speeds, limits)
    plan.data_spent = tokens == most
    stretch = STRETCH * (budget.seconds - used) / plan.total
    plan.limits_s = {name: stretch * s for name, s in plan.seconds.items() if name != "evaluation"}
    return plan


def _plan(tokens: int, prompts: int, shape: Shape, speeds: Speeds, limits: Limits) -> Plan:
    """Everything that follows from the tokens of a method."""
    rows = min(limits.rows, math.ceil(tokens / shape.comparison))
    judge_rows = min(limits.judge_rows, rows)
    epochs = min(limits.max_epochs, max(1.0, tokens / (rows * shape.comparison)))
    prompts = min(prompts, limits.heldout_prompts)
    plan = Plan(
        tokens=tokens,
        rows=rows,
        judge_rows=judge_rows,
        heldout_prompts=prompts,
        heldout_rows=min(limits.heldout_rows, 2 * prompts),
        epochs=epochs,
        responses={},
        seconds={},
    )

    def supervised(count: int, row: float) -> float:
        steps = supervised_steps(count, epochs)
        return epochs * count * row * speeds.train + steps * speeds.update + _overhead(speeds, 1)

    plan.seconds["judge"] = supervised(judge_rows, shape.comparison)
    if any(RECIPES[name].learned_reward for name in limits.methods):
        plan.seconds["rm"] = supervised(rows, shape.comparison)
    plan.seconds["sft"] = supervised(rows, shape.prompt + shape.chosen)
    for name in limits.methods:
        recipe = RECIPES[name]
        plan.responses[name] = _responses(recipe, tokens, shape)
        steps = math.ceil(tokens / recipe.step_tokens(shape, plan.responses[name]))
        plan.seconds[name] = (
            tokens * recipe.token_seconds(shape, speeds, plan.responses[name])
            + steps * recipe.updates * speeds.update
            + rows * recipe.row_seconds(shape, speeds)
            + _overhead(speeds, recipe.models)
        )
    plan.seconds["evaluation"] = _evaluation_seconds(prompts, shape, speeds, limits)
    return plan


def supervised_steps(rows: int, epochs: float) -> int:
    """Optimiser steps of a reward model or of SFT."""
    return max(1, math.ceil(epochs * rows / supervised_batch(rows, epochs)))


def supervised_batch(rows: int, epochs: float) -> int:
    """16 rows a step; fewer where there would otherwise be fewer than STEPS steps."""
    return max(4, min(16, math.floor(epochs * rows / STEPS)))


def _responses(recipe: Recipe, tokens: int, shape: Shape) -> int:
    for responses in RESPONSES:
        if tokens >= STEPS * recipe.step_tokens(shape, responses):
            return responses
    return RESPONSES[-1]


def _overhead(speeds: Speeds, models: int) -> float:
    """Loading, checking and saving: saving writes the weights with both moments, about as long as loading."""
    return (models + 2) * speeds.load + 1.0


def _evaluation_seconds(prompts: int, shape: Shape, speeds: Speeds, limits: Limits) -> float:
    """Answers of every policy, their scores by two reward models, drift, and the held-out comparisons."""
    policies, reward_models = len(limits.methods) + 1, 2
    read = (2 + reward_models) * prompts * (shape.prompt + shape.sampled) * speeds.forward_fp32
    answers = speeds.draw_fp32(shape.new, prompts) + read + speeds.load + 1.0
    rows = min(limits.heldout_rows, 2 * prompts)
    preferences = rows * speeds.forward_fp32 * (policies * shape.pairs + reward_models * shape.comparison)
    return policies * answers + preferences + reward_models * speeds.load
