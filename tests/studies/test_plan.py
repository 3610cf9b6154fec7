"""What fits a budget, with speeds that are given: no clock, no model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.methods.grpo import GRPOConfig
from trimtab.methods.shared.ppo_options import PPOConfig
from trimtab.studies.plan import FILL, STEPS, STRETCH, Budget, Limits, parse_budget, solve
from trimtab.studies.recipes import GRPO_GROUP, PPO_EPOCHS, RECIPES, Shape, Speeds, learning_rate

SHAPE = Shape(prompt=100, chosen=40, comparison=190, pairs=190, pair=190, new=120)
SPEEDS = Speeds(
    parameters=30_000_000,
    dtype="float32",
    load=0.5,
    train=1e-3,
    update=0.1,
    forward=3e-4,
    sampling=(0.02, 5e-4),
    forward_fp32=3e-4,
    sampling_fp32=(0.02, 5e-4),
)


def limits(**changed: Any) -> Limits:
    values: dict[str, Any] = {
        "methods": ["dpo", "ppo", "grpo"],
        "rows": 5000,
        "judge_rows": 3000,
        "heldout_rows": 2000,
        "heldout_prompts": 1500,
        "max_epochs": 3.0,
        "eval_share": 0.2,
        "max_prompts": 300,
    }
    return Limits(**values | changed)


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [
        ("30m", 1800, None),
        ("1h 30m", 5400, None),
        ("1h30m", 5400, None),
        ("90s", 90, None),
        ("2 hours", 7200, None),
        ("1.5 min", 90, None),
        ("200k tokens", None, 200_000),
        ("1.5M tokens", None, 1_500_000),
        ("500 tokens", None, 500),
    ],
)
def test_budgets_are_read(text: str, seconds: float | None, tokens: int | None) -> None:
    assert parse_budget(text) == Budget(seconds, tokens)


@pytest.mark.parametrize("text", ["", "30", "m", "fast", "0m", "0 tokens", "-3m", "30 parsecs", "200k"])
def test_no_budget(text: str) -> None:
    with pytest.raises(InputError, match="is no budget"):
        parse_budget(text)


def test_the_constants_are_the_methods_own_defaults() -> None:
    assert GRPOConfig().group_size == GRPO_GROUP
    assert PPOConfig().epochs_per_rollout == PPO_EPOCHS
    assert PPOConfig().samples == 1


def test_learning_rates_grow_as_models_shrink() -> None:
    assert learning_rate(2e-6, 0.6, 500_000_000) == 2e-6
    assert learning_rate(2e-5, 0.5, 5_000_000) == 2e-4  # a hundredth: ten times


def test_a_plan_fills_its_time_and_no_more() -> None:
    plans = [solve(Budget(seconds=60 * minutes), SHAPE, SPEEDS, limits(), 20) for minutes in (10, 30, 120)]
    for minutes, plan in zip((10, 30, 120), plans, strict=True):
        room = 60 * minutes - 20
        assert 0.97 * FILL * room < plan.total <= FILL * room
        assert plan.seconds["evaluation"] < 0.25 * room
        # Every stage stopped at its limit, and the evaluation as planned for: within a fifth of the budget.
        assert sum(plan.limits_s.values()) + plan.seconds["evaluation"] < 1.2 * 60 * minutes
        assert sum(plan.limits_s.values()) > sum(plan.seconds.values()) - plan.seconds["evaluation"]
        assert plan.limits_s["ppo"] == pytest.approx(STRETCH * room / plan.total * plan.seconds["ppo"])
    assert [p.tokens for p in plans] == sorted({p.tokens for p in plans})
    assert plans[-1].rows > plans[0].rows
    # As many rows as the tokens are worth.
    assert plans[0].rows == pytest.approx(plans[0].tokens / SHAPE.comparison, abs=1)
    assert plans[0].judge_rows == plans[0].rows


def test_steps_shrink_where_there_would_be_few() -> None:
    small, large = (solve(Budget(tokens=tokens), SHAPE, SPEEDS, limits()) for tokens in (5_000, 500_000))
    assert set(large.responses.values()) == {32}
    assert set(small.responses.values()) == {8}
    for name, responses in large.responses.items():
        assert large.tokens / RECIPES[name].step_tokens(SHAPE, responses) >= STEPS


def test_little_data_is_gone_through_max_epochs_times_and_no_more() -> None:
    few = limits(rows=100, judge_rows=60)
    plan = solve(Budget(seconds=36_000), SHAPE, SPEEDS, few)
    assert plan.data_spent
    assert plan.tokens == 3 * 100 * 190
    assert (plan.rows, plan.judge_rows, plan.epochs) == (100, 60, 3.0)
    assert plan.total < FILL * 36_000
    assert not solve(Budget(seconds=600), SHAPE, SPEEDS, limits()).data_spent


def test_without_a_method_that_needs_it_there_is_no_learned_reward() -> None:
    assert "rm" not in solve(Budget(seconds=600), SHAPE, SPEEDS, limits(methods=["dpo"])).seconds
    assert "rm" in solve(Budget(seconds=600), SHAPE, SPEEDS, limits(methods=["dpo", "grpo"])).seconds


def test_the_smallest_budget_that_is_named_is_enough() -> None:
    with pytest.raises(InputError, match="too little for one step of each method") as caught:
        solve(Budget(seconds=30), SHAPE, SPEEDS, limits(), used=5)
    named = re.search(r'budget = "([0-9]+)s"', str(caught.value))
    assert named
    plan = solve(parse_budget(f"{named[1]}s"), SHAPE, SPEEDS, limits(), used=5)
    assert all(plan.tokens >= RECIPES[n].step_tokens(SHAPE, r) for n, r in plan.responses.items())
    with pytest.raises(InputError):
        solve(Budget(seconds=0.9 * float(named[1])), SHAPE, SPEEDS, limits(), used=5)
    with pytest.raises(InputError, match="less than one step of a method") as caught:
        solve(Budget(tokens=100), SHAPE, SPEEDS, limits())
    fewest = int(re.search(r"do is ([0-9,]+) tokens", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    assert solve(Budget(tokens=fewest), SHAPE, SPEEDS, limits()).tokens == fewest
