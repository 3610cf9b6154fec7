"""A run of two processes is planned as one of two, and all of it decides alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from processes import Processes

from trimtab.parallel.world import world
from trimtab.planning.result import Memory, Part, Phase, Plan
from trimtab.registry.ancestry import read_lineage
from trimtab.studies import launch
from trimtab.studies.launch_words import refusal
from trimtab.training.memory import available_bytes

MIB = 2**20


def _trained(model: Path, data: Path, out: Path, weights: str) -> str:
    more: dict[str, Any] = {"parallel__weights": weights, "train__steps": 2}
    config = tiny.configure("dpo", model, data, out, **more)
    launch.train("dpo", config)
    return str(launch.free_bytes("cpu"))


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_a_run_stands_beside_its_plan(
    weights: str, processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    free = processes.run(_trained, model=tiny_model, data=tiny_data, out=out, weights=weights)
    plan = read_lineage(out)["plan"]
    assert plan["processes"] == 2
    assert plan["weights"].startswith("sharded over all 2" if weights == "shard" else "replicated in each")
    assert plan["measured_peak_mb"] > 0
    # A process has half of what this machine has free: with all of it both would be promised the same.
    now = float(available_bytes() or 0)
    assert plan["available_mb"] * MIB == pytest.approx(now / 2, rel=0.3)
    assert float(free[0]) == pytest.approx(now / 2, rel=0.3)
    # Of so small a model the share of weights is nothing beside what a process takes; see benchmarks/scale.
    assert plan["parts"]["framework"] > 50


def _refused(model: Path, data: Path, out: Path, free_mb: list[float | None], fails: int = -1) -> list[Any]:
    """What comes of a run that takes 100 MiB, with so much free in each process."""
    kept = launch.plan_run, launch.free_bytes

    def plan_run(name: str, config: Any, available: float | None) -> Plan:
        if world().rank == fails:
            raise RuntimeError("this process cannot plan")
        training = Phase("training", (Part("policy", "weights", 100 * MIB),))
        return Plan("", Memory((training,)), None, available, facts={"processes": 2})

    own = free_mb[world().rank]
    launch.plan_run = plan_run
    launch.free_bytes = lambda device: None if own is None else own * MIB
    try:
        config = tiny.configure("dpo", model, data, out, train__steps=1)
        ahead = launch.look_ahead("dpo", config)
        available = None if ahead.plan is None or ahead.plan.available is None else ahead.plan.available / MIB
        refused, halved = launch._decided("dpo", config, ahead, "", ())
        return [available, refused, halved]
    finally:
        launch.plan_run, launch.free_bytes = kept


def test_the_process_with_least_decides_for_all(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": tiny_model, "data": tiny_data, "out": tmp_path / "run"}
    first, second = processes.run(_refused, free_mb=[900.0, 50.0], **given)
    assert first == second
    assert first[0] == 50
    assert first[1].startswith("dpo: cannot fit: 100 MiB at most")
    assert "and 50.0 MiB are free for each of 2 processes" in first[1]
    assert not (tmp_path / "run").exists()
    assert processes.run(_refused, free_mb=[900.0, 800.0], **given) == [[800, "", ""]] * 2
    # Where one does not know, the other's figure holds.
    assert processes.run(_refused, free_mb=[None, 50.0], **given)[0][0] == 50
    # One that cannot plan goes by the first's decision all the same, and nobody waits.
    found = processes.run(_refused, free_mb=[900.0, 50.0], fails=1, **given)
    assert [one[1][:16] for one in found] == ["dpo: cannot fit:"] * 2


def test_a_refusal_says_that_figures_are_of_each_process() -> None:
    training = Phase("training", (Part("policy", "weights", 2 * MIB),))
    plan = Plan("", Memory((training,)), None, 1.0 * MIB)
    assert " for each of" not in refusal("dpo", plan, None)
