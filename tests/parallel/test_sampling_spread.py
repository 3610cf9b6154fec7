"""Sampling from weights that are spread over processes: the tokens of one process, gathered either way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import states
import tiny
from processes import Processes

from trimtab.models.shards import spread_modules
from trimtab.parallel.world import world
from trimtab.rewards import models
from trimtab.rewards.models import RewardModel
from trimtab.spread.shard import Spread

Case = tuple[str, dict[str, Any]]
SPREAD = {"parallel__weights": "shard"}
CASES: dict[str, Case] = {
    "whole": ("grpo", {"parallel__gather": "whole"}),
    "layers": ("grpo", {"parallel__gather": "layers", "train__batch_groups": 3}),
    "plain engine, layers": ("grpo", {"parallel__gather": "layers", "sampling__engine": "plain"}),
    "overlap": ("grpo", {"grpo__overlap": True}),
    "challengers, layers": ("online-dpo", {"parallel__gather": "layers", "online_dpo__opponents": "both"}),
    "adapter": ("ppo", {"adapter__kind": "lora", "parallel__gather": "whole"}),
    "spin": ("spin", {"parallel__gather": "layers", "spin__iterations": 2, "train__steps": 2}),
    "reward model, whole": ("grpo", {"parallel__gather": "whole"}),
    "reward model, layers": ("grpo", {"parallel__gather": "layers"}),
    "reward model, overlap": ("grpo", {"grpo__overlap": True}),
}
AS = {"plain engine, layers": "whole", "reward model, layers": "reward model, whole"}
"""Cases that one process has no form of its own of."""


def _followed(cases: dict[str, Case], model: Path, rm: Path, data: Path, out: Path) -> dict[str, Any]:
    found = {}
    spread: list[bool] = []
    score = RewardModel.score
    loaded: list[tuple[bool, str]] = []
    turns: list[int] = []
    classifier, taken = models.load_classifier, Spread.turn

    def load(config: Any, **given: Any) -> Any:
        loaded.append((bool(turns), config.device))
        return classifier(config, **given)

    @contextmanager
    def turn(self: Spread) -> Iterator[None]:
        with taken(self):
            turns.append(1)
            yield
            turns.pop()

    def watched(self: RewardModel, groups: Any) -> Any:
        spread.append(bool(spread_modules(self.model)))
        return score(self, groups)

    for case, (name, changed) in cases.items():
        given: dict[str, Any] = {"train__steps": 2, **changed}
        if world().alone:
            given = {k: v for k, v in given.items() if not k.startswith("parallel")}
        else:
            given |= SPREAD
        if case.startswith("reward model"):
            given["reward__terms"] = [{"name": "reward_model", "args": {"path": str(rm)}}]
        spread.clear()
        loaded.clear()
        turns.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RewardModel, "score", watched)
            patched.setattr(models, "load_classifier", load)
            patched.setattr(Spread, "turn", turn)
            found[case] = states.followed(name, model, data, out / case, given)
        found[case]["spread"] = list(spread)
        found[case]["loaded"] = list(loaded)
    return found


@pytest.fixture(scope="module")
def runs(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two processes found, and what one found alone."""
    out = tmp_path_factory.mktemp("runs")
    rm = tiny.save_reward_model(out / "rm", seed=3)
    given: dict[str, Any] = {"cases": CASES, "model": tiny_model, "rm": rm, "data": tiny_data, "out": out}
    both = processes.run(_followed, limit=240.0, **given)
    own = {case: CASES[case] for case in CASES if case not in AS}
    return both + processes.run(_followed, size=1, limit=240.0, **given | {"cases": own})


@pytest.mark.parametrize("case", CASES)
def test_samples_and_numbers_are_those_of_one_process(case: str, runs: list[dict[str, Any]]) -> None:
    first, second, alone = runs[0][case], runs[1][case], runs[2][AS.get(case, case)]
    assert first["states"] == second["states"]
    assert first["rollouts"] == second["rollouts"]
    # A reward model computes in fp32, where a sum's order shows; elsewhere all is fp64.
    within = 1e-5 if case.startswith("reward model") else 1e-9
    assert not states.differences(alone, first, within)
    for ours, theirs in zip(first["rollouts"], alone["rollouts"], strict=True):
        for a, b in zip(ours["rows"], theirs["rows"], strict=True):
            assert a[0] == b[0]
            assert [row[0] for row in a[1:]] == [row[0] for row in b[1:]]
            assert [row[1] for row in a[1:]] == pytest.approx([row[1] for row in b[1:]], abs=within)


def test_a_reward_model_is_spread_but_for_a_thread(runs: list[dict[str, Any]]) -> None:
    for case, wanted in (("whole", True), ("layers", True), ("overlap", False)):
        found = runs[1][f"reward model, {case}"]["spread"]
        assert found
        assert set(found) == {wanted}
    assert json.dumps(runs[2]["reward model, whole"]["spread"]) == "[false, false]"
    # Whole in one process after another, before anything of it is on a device.
    assert [list(map(tuple, one["reward model, whole"]["loaded"])) for one in runs] == [
        [(True, "cpu")],
        [(True, "cpu")],
        [(False, "auto")],
    ]
