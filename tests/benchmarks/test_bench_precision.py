"""The arithmetic of the precision study; the study itself at a few steps is marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import precision, tables


def test_smoothing_is_a_trailing_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SMOOTHED_OVER", 3)
    assert precision.smoothed([3.0, 1.0, 2.0, 6.0]) == [3.0, 2.0, 2.0, 3.0]


def test_differences_are_absolute() -> None:
    assert precision.differences([1.0, 2.0], [2.0, 1.5]) == [1.0, 0.5]


def test_metrics_are_those_of_training_steps(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval": 1}, {"step": 1, "loss": 2.0, "grad_norm": 1.0}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert precision.read_metrics(tmp_path / "m.jsonl", ("loss",)) == {"loss": [2.0]}


@pytest.mark.slow
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "WORLD", {"demonstrations": 128, "pairs": 96, "prompts": 48})
    rows = precision.run(tmp_path / "study", steps=2, sft_steps=2, heldout=4)
    assert [row["case"] for row in rows] == ["dpo, 2 steps", "grpo, 2 steps"]
    for row in rows:
        assert row["speedup"] is None
        assert set(row["final"]) == set(precision.RUNS)
        assert all(1 <= score <= 10 for score in row["gold_reward"].values())
        # the same seed and masters: bf16 moves the loss by its rounding, another seed by other data
        assert 0 < row["bfloat16_max_abs_difference"]["loss"] < 0.5
    result = {"setting": "words", "rows": rows, "machine": {"cpu": "A", "cores": 2, "load": 1}}
    (tmp_path / "precision-cpu.json").write_text(json.dumps(result))
    page = "<!-- results: precision -->\n<!-- end results -->\n"
    assert "## What bf16 costs in accuracy" in tables.fill(page, tmp_path)
