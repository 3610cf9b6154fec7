"""Steps that cannot be done as asked: no memory for a micro-batch, a loss or gradient that is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults_runs import GRPO, PPO, RESUME, WAITING, World, checkpoints, chosen, kill

from trimtab.training.metrics import read_metrics

TOKENS = {"train__micro_batch_tokens": 64, "train__batch_groups": 8}
WITHOUT_MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", TOKENS),
    "reward": ("reward", TOKENS),
    "dpo": ("dpo", TOKENS),
    "grpo": ("grpo", GRPO | TOKENS),
    "ppo": ("ppo", PPO | TOKENS | {"ppo__overlap": True}),
}


@pytest.mark.parametrize("method", chosen(WITHOUT_MEMORY, ["dpo", "ppo"]))
def test_micro_batches_halve_and_a_resume_repeats_it(method: str, world: World, out: Path) -> None:
    name = world.case(f"{method} without memory", *WITHOUT_MEMORY[method], memory=40)
    straight, unhurt = world.timed(name)
    said = [line for line in unhurt.err.splitlines() if "out of memory" in line]
    assert len(said) == 1, unhurt.err
    assert "32 tokens" in said[0]
    state = json.loads((straight / "checkpoints/step-00000006/state.json").read_text())
    assert state["environment"]["micro_batch_tokens"] == 32
    adams = 9 if method == "ppo" else 5
    assert world.run(name, out, *WAITING, faults=[kill("adam", adams)]).status == -9
    ended = world.finish(name, out)
    assert "out of memory" not in ended.err, "the halved micro-batch was to be in the checkpoint"


@pytest.mark.parametrize("method", chosen(["dpo", "grpo"], ["grpo"]))
def test_one_group_alone_without_memory(method: str, world: World, out: Path) -> None:
    name = world.case(f"{method} with no memory", method, {}, memory=5)
    ended = world.run(name, out)
    assert ended.status == 2, ended.err
    assert "out of memory" in ended.error
    assert not checkpoints(out)


# ---------------------------------------------------------------- not finite

HUGE = 1e30
"""A group's weight with which no gradient is finite."""
ROWS = {"sft": tiny.demonstrations, "dpo": tiny.pairs, "reward": tiny.pairs}


def poisoned(world: World, method: str, rows: set[int], **changed: Any) -> str:
    """A case whose data has rows with gradients that are not finite."""
    folder = world.folder / f"poisoned-{method}-{len(rows)}"
    folder.mkdir(exist_ok=True)
    good = ROWS[method](16)
    data = [row | {"group_weight": HUGE if i in rows else 1.0} for i, row in enumerate(good)]
    file = tiny.write_rows(folder / "rows.jsonl", data)
    changed |= {"data__sources": [{"path": str(file)}], "data__heldout_fraction": 0.0}
    return world.case(f"{method} poisoned {len(rows)}", method, changed)


@pytest.mark.parametrize("method", chosen(ROWS, ["dpo"]))
def test_a_step_is_skipped_and_counted(method: str, world: World, out: Path) -> None:
    """16 rows in batches of 4 for eight steps: one row comes twice."""
    name = poisoned(world, method, {5}, train__steps=8)
    straight, unhurt = world.timed(name)
    metrics = [m for m in read_metrics(straight / "metrics.jsonl") if m["step"]]
    skipped = [m["step"] for m in metrics if "grad_norm" not in m]
    assert len(skipped) == 2, "each epoch of four steps has the row once"
    assert metrics[-1]["skipped_steps"] == 2
    assert [m["step"] for m in metrics] == list(range(1, 9))
    for step in skipped:
        lines = (straight / f"skipped/step-{step:08d}.jsonl").read_text().splitlines()
        groups = [json.loads(line)["group"] for line in lines]
        assert len(groups) == 4
        assert HUGE in [group["weight"] for group in groups]
        assert any(f"step {step}: " in line and "skipped" in line for line in unhurt.err.splitlines())
    # Killed in the step after the first skipped one: what was skipped and counted is part of the state.
    updates = skipped[0]
    ended = world.run(name, out, faults=[kill("adam", updates)])
    assert ended.status == -9, ended.err
    world.finish(name, out)


def test_too_many_in_a_row(world: World, out: Path) -> None:
    name = poisoned(world, "sft", set(range(16)), train__max_skipped=2, train__save_every=1)
    ended = world.run(name, out)
    assert ended.status == 2, ended.err
    assert "step 3: " in ended.error
    assert "train.max_skipped" in ended.error
    assert len(list((out / "skipped").iterdir())) == 3
    again = world.run(name, out, *RESUME)
    assert again.status == 2, "what was skipped before the checkpoint counts after a resume"
    assert again.error == ended.error


@pytest.mark.parametrize("method", chosen(["grpo", "ppo"], ["ppo"]))
def test_a_rollout_without_finite_advantages(method: str, world: World, out: Path) -> None:
    """Rewards near the largest numbers there are: finite each, and what lies between them is not."""
    body = "return (-1) ** len(response) * 1.7e308 if prompt.split()[-1] == 'f' else len(response) / 12"
    reward = tiny.write_reward(world.folder / f"huge-{method}.py", body)
    changed = {"reward__terms": [{"name": reward, "label": "huge"}], "train__steps": 8}
    if method == "grpo":
        changed["grpo__scale"] = "none"
    name = world.case(f"{method} huge", method, changed)
    straight, unhurt = world.timed(name)
    metrics = [m for m in read_metrics(straight / "metrics.jsonl") if m["step"]]
    lost = [m["step"] for m in metrics if "grad_norm" not in m]
    assert 0 < len(lost) < 8, unhurt.err
    # Of a PPO step the critic's update, the policy's or both.
    assert metrics[-1]["skipped_steps"] == len({p.name[:13] for p in (straight / "skipped").iterdir()})
    ended = world.run(name, out, faults=[kill("adam", 3)])
    assert ended.status == -9, ended.err
    world.finish(name, out)
