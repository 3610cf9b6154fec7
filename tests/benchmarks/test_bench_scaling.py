"""docs/scaling.md holds what the planner says today, and its example can be done with a pencil."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import OTHERS
from benchmarks.scaling import cases, example, page, tables

GIB = cases.GIB


def test_the_page_holds_what_the_planner_says_today() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    marks = [mark[2] for mark in page.MARK.finditer(text)]
    assert sorted(marks) == sorted(page.MADE), "each table once"
    assert page.fill(text) == text, "python -m benchmarks scaling writes it anew"
    assert page.fill(text.replace("| 0.5B |", "| 0.6B |")) == text
    assert "scaling" in OTHERS


@pytest.mark.parametrize("line", [*example.memory(), *example.time()], ids=lambda line: line.what)
def test_a_line_of_the_example_is_the_planner_s(line: example.Line) -> None:
    planned = line.planned / GIB if line.unit == "GiB" else line.planned
    assert example.worked_out(line) == pytest.approx(planned, rel=1e-3)


def test_the_example_is_all_of_the_plan() -> None:
    """Its lines of memory come to the phase's bytes, those of time to the step's seconds."""
    found = example.case()
    lines = [line for line in example.memory() if line.unit == "GiB"]
    training = next(phase for phase in found.plan.memory.phases if phase.name == "training")
    assert sum(map(example.worked_out, lines)) == pytest.approx(float(training.bytes) / GIB, rel=1e-3)
    assert found.plan.memory.fullest.name == "training"
    assert example.worked_out(example.time()[-1]) == pytest.approx(found.step_s, rel=1e-3)
    # What the text says of it.
    batch = found.job.batch
    assert (batch.widest, batch.widest_targets, batch.micro_batches) == (7680, 7168, 77)
    assert (batch.tokens, batch.targets) == (8 * 73_728, 8 * 65_536)
    assert 20 * float(found.job.model.parameters) / GIB == pytest.approx(141.9, abs=0.1)
    wide = cases.best("grpo", "7B", "all weights", tables.DEVICE, 64)
    assert round(wide.step_s, 1) == 7.8
    assert 0.78 < tables.spent(wide)["sampling"] / wide.step_s < 0.85


def test_a_sum_is_done_as_it_stands() -> None:
    line = example.Line("", "(2 · 1,024 − 24) / 2 + 0.5 · 10⁹", "", 0)
    assert example.worked_out(line) == 1012 + 5e8
    assert example.worked_out(example.Line("", f"3 · {GIB:,}", "GiB", 0)) == 3


def test_fewer_devices_are_enough_for_adapters() -> None:
    def count(cell: str) -> float:
        return float("inf") if cell == "–" else float(cell.split()[0].rstrip("~"))

    for method in cases.METHODS:
        for card in tables.CARDS:
            whole, lora = (
                [count(tables.smallest(method, size, learns, card)) for size in cases.MODELS]
                for learns in cases.LEARNS
            )
            assert all(b <= a for a, b in zip(whole, lora, strict=True))
            assert whole == sorted(whole), "a larger model needs no fewer"
