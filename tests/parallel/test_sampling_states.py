"""Every process ends each step with the same State where methods sample, as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import states
import tiny
from processes import Processes

from trimtab.methods.shared import relative
from trimtab.parallel.world import world

Case = tuple[str, dict[str, Any]]
TWICE = {
    "grpo__rollout_groups": 4,
    "train__batch_groups": 2,
    "grpo__epochs_per_rollout": 2,
    "train__steps": 4,
}
CASES: dict[str, Case] = {
    # Of those that sample one each: the states of all methods are held in test_every_method.py.
    "grpo": ("grpo", {}),
    "online-dpo": ("online-dpo", {}),
    "ppo": ("ppo", {}),
    "spin": ("spin", {"spin__iterations": 2}),
    # The first pass over a rollout keeps old_logps, which each process computes for its own groups alone.
    "later epochs": ("grpo", TWICE),
    "a step without an update": ("grpo", TWICE),
    "refills in a thread": (
        "dapo",
        {"dapo__overlap": True, "dapo__group_size": 2, "dapo__max_refills": 9, "train__steps": 4},
    ),
    "cut off": ("grpo", {"grpo__mask_cut_off": True, "sampling__max_new_tokens": 3, "grpo__beta": 0.1}),
    "uneven": ("rloo", {"train__batch_groups": 3, "sampling__temperature_end": 0.5}),
    "the same prompts": ("grpo", {"train__batch_groups": 12}),
    "trunk": ("ppo", {"critic__share": "trunk", "ppo__kl_control": "adaptive", "ppo__kl_target": 0.01}),
    "running": ("ppo", {"ppo__reward_normalise": "running", "ppo__epochs_per_rollout": 2}),
    "warming": ("ppo", {"critic__warmup_rollouts": 1, "adapter__kind": "lora", "train__steps": 3}),
    "challengers": (
        "online-dpo",
        {
            "online_dpo__opponents": "both",
            "online_dpo__refresh_reference_every": 1,
            "online_dpo__reference_average": 0.5,
            "online_dpo__pairing": "all",
        },
    ),
    "skipped": ("grpo", {"reward__on_error": "skip"}),
}
COMPARED = [
    *("grpo", "ppo", "online-dpo", "spin", "later epochs", "refills in a thread", "uneven"),
    *("the same prompts", "trunk", "skipped"),
]


def _spoil(patched: pytest.MonkeyPatch) -> None:
    """The second step of the last process has a loss that is not finite."""
    surrogate, seen = relative.surrogate, [0]

    def spoilt(lm: Any, groups: Any, *rest: Any, **more: Any) -> Any:
        loss_NT, shown = surrogate(lm, groups, *rest, **more)
        if lm.version == 1 and world().rank == world().size - 1 and not seen[0]:
            seen[0] = 1
            return loss_NT * float("nan"), shown
        return loss_NT, shown

    patched.setattr(relative, "surrogate", spoilt)


def _followed(cases: dict[str, Case], model: Path, data: Path, out: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for case, (name, changed) in cases.items():
        term = {"label": "vowels", "name": f"{data / 'rewards.py'}:score"}
        if case == "skipped":
            term["name"] = str(data / "picky.py") + ":score"
        given = {"train__steps": 2, **({"reward__terms": [term]} if name in tiny.SAMPLES else {}), **changed}
        prepare = _spoil if case == "a step without an update" else None
        found[case] = states.followed(name, model, data, out / case, given, prepare=prepare)
    return found


@pytest.fixture(scope="module")
def runs(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes found, and what one found alone (of those that sample)."""
    folder = tmp_path_factory.mktemp("data")
    for file in tiny_data.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    body = (
        "if columns['answer'] in 'bd': raise ValueError('no answer')\n    "
        "return sum(w in 'aeiou' for w in response.split())"
    )
    tiny.write_reward(folder / "picky.py", body)
    out = tmp_path_factory.mktemp("runs")
    given: dict[str, Any] = {"model": tiny_model, "data": folder, "out": out, "limit": 240.0}
    both = processes.run(_followed, cases=CASES, **given)
    return both + processes.run(_followed, size=1, cases={c: CASES[c] for c in COMPARED}, **given)


@pytest.mark.parametrize("case", CASES)
def test_every_process_has_the_same_state(case: str, runs: list[dict[str, Any]]) -> None:
    first, second = (found[case] for found in runs[:2])
    assert len(first["states"]) >= 2
    assert first["states"] == second["states"]
    assert first["rollouts"] == second["rollouts"]
    # And it moves: what never changes would be the same in any case.
    tensors = [json.dumps(state["tensors"]) for state in first["states"]]
    assert len(set(tensors)) >= len(tensors) - 1


@pytest.mark.parametrize("case", COMPARED)
def test_samples_and_numbers_are_those_of_one_process(case: str, runs: list[dict[str, Any]]) -> None:
    ours, alone = runs[0][case], runs[2][case]
    assert ours["rollouts"] == alone["rollouts"]
    assert not states.differences(alone, ours, 1e-9)
    for a, b in zip(ours["states"], alone["states"], strict=True):
        for name in ("step", "position", "tokens"):
            assert a[name] == b[name]
        assert a["controllers"].keys() == b["controllers"].keys()
        for name, value in a["controllers"].items():
            assert value == pytest.approx(b["controllers"][name], rel=1e-9, abs=1e-12), name


def test_the_cases_are_what_they_say(runs: list[dict[str, Any]]) -> None:
    first = runs[0]
    counted = {case: first[case]["states"][-1]["controllers"] for case in CASES}
    assert counted["a step without an update"]["skipped_steps"] == 1
    assert counted["skipped"]["skipped_groups"] >= 2
    assert counted["refills in a thread"]["refilled_groups"] >= 1
    assert any(rollout["drawn"] > 4 for rollout in first["refills in a thread"]["rollouts"])
    assert any("#1" in row[0] for r in first["the same prompts"]["rollouts"] for row in r["rows"])
    assert counted["running"]["rewards_seen/count"] > 0
