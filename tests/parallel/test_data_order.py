"""One order of the data whatever the number of processes, and runs that repeat bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity import Found, Runs

BATCH, ROWS = 5, 11
ENDLESS: dict[str, Any] = {"train.schedule": "constant"}
"""What a longer run does as a shorter one did."""


def drawn(found: list[Found]) -> list[str]:
    """The ids of the groups, in the order in which every process drew them."""
    for other in found[1:]:
        assert other["order"] == found[0]["order"]
    assert [position for position, _ in found[0]["order"]] == list(range(len(found[0]["order"])))
    return [group for _, group in found[0]["order"]]


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_the_order_is_that_of_one_process_past_the_end_of_an_epoch(method: str, runs: Runs) -> None:
    changed = {"train.steps": 5, **ENDLESS}
    alone = drawn([runs.alone(method, changed=changed)])
    assert len(alone) == 5 * BATCH
    epochs = [alone[:ROWS], alone[ROWS : 2 * ROWS]]
    assert len({*epochs[0]}) == len({*epochs[1]}) == ROWS
    assert epochs[0] != epochs[1]
    for size in (2, 3):
        assert drawn(runs(method, size, changed=changed)) == alone


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_that_goes_on_draws_what_is_next(
    before: int, after: int, weights: str, runs: Runs, tmp_path: Path
) -> None:
    changed = {**ENDLESS, "parallel.weights": weights}
    whole = runs.alone("sft", changed=ENDLESS | {"train.steps": 5})
    first = runs("sft", before, changed=changed | {"train.steps": 2}, out=tmp_path / "run")
    then = runs("sft", after, changed=changed | {"train.steps": 5, "run.resume": True}, out=tmp_path / "run")
    assert [m["step"] for m in then[0]["metrics"]] == [3, 4, 5]
    orders = [[group for _, group in f[0]["order"]] for f in (first, then)]
    assert orders[0] + orders[1] == drawn([whole])
    assert then[0]["metrics"][-1]["loss"] == pytest.approx(whole["metrics"][-1]["loss"], rel=1e-9)


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize(("method", "dtype"), [("dpo", "bfloat16"), ("grpo", "float32")])
def test_two_runs_on_two_processes_are_the_same_bits(
    method: str, dtype: str, weights: str, runs: Runs
) -> None:
    changed = {
        "train.steps": 4,
        "model.dtype": dtype,
        "train.kernels": "auto" if dtype == "float32" else "off",
        "parallel.weights": weights,
    }
    one, other = (runs(method, changed=changed) for _ in range(2))
    assert one == other
    assert one[0]["state"]["digest"] == one[1]["state"]["digest"]
    alone = runs.alone(method, changed=changed)
    assert alone["state"]["digest"] != one[0]["state"]["digest"], "nothing was dealt out"
