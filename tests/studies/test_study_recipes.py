"""The sweeps among the recipes: their options are options, and no method of the family is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import methods
from trimtab.config import load_config
from trimtab.studies.grid import SweepConfig, Trial, trials
from trimtab.studies.order import in_order
from trimtab.studies.pipeline import PipelineConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def planned(name: str) -> list[Trial]:
    config = load_config(SweepConfig, RECIPES / name, {"data_root": "world", "out": "none"})
    return trials(config, in_order(config, config.prepare, [], "prepare"))


def test_the_family_has_every_method() -> None:
    made = planned("newsroom-family.toml")
    no_policy = {"reward", "process-reward"}
    assert {trial.step.stage.method for trial in made} == set(methods.names()) - no_policy
    assert {trial.seed for trial in made} == {0, 1, 2}
    assert {trial.step.start for trial in made} == {"base"}


def test_the_outer_loop_refreshes_reference_and_reward_model() -> None:
    file = RECIPES / "outer-loop.toml"
    config = load_config(PipelineConfig, file, {"data_root": "world", "out": "none"})
    steps = {step.folder: step for step in in_order(config, config.stages, config.repeat).steps}
    assert [steps[f"grpo-{k}"].reference for k in (1, 2, 3)] == ["base", "grpo-1", "grpo-2"]
    assert [steps[f"refresh-{k}"].start for k in (1, 2, 3)] == ["rm", "refresh-1", "refresh-2"]
    assert (steps["alone"].start, steps["alone"].config.train.steps) == ("base", 240)


@pytest.mark.parametrize("method", ["dpo", "ppo", "grpo"])
def test_the_frontier_is_over_beta(method: str) -> None:
    made = [trial for trial in planned("frontier.toml") if trial.step.stage.method == method]
    strengths = {trial.options[f"{method}.beta"] for trial in made}
    assert len(strengths) >= 3
    assert len(made) == 3 * len(strengths)
