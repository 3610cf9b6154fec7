"""The benchmark of plans: its cases, what is counted, what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import cases, command, pages, steps
from benchmarks.plan.inputs import write_rows
from trimtab.cli.main import METHODS
from trimtab.planning.models import model_of


def test_every_method_is_run_in_a_dozen_settings() -> None:
    assert list(cases.METHODS) == list(dict.fromkeys(cases.METHODS))
    assert set(cases.METHODS) == set(METHODS)
    assert all(len(cases.settings_of(method)) >= 12 for method in METHODS)
    assert len(set(command.names())) == len(command.names())
    families = {family for family, _ in cases.MODELS.values()}
    assert len(families) >= 3
    assert {sizes["vocab_size"] for _, sizes in cases.MODELS.values()} == {cases.SMALL, cases.LARGE}


@pytest.mark.parametrize("name", list(cases.MODELS))
def test_a_model_has_the_size_that_it_is_called_by(name: str) -> None:
    family, sizes = cases.MODELS[name]
    found = model_of({"model_type": family, **sizes}).parameters / 1e6
    said = float(name.split()[1].rstrip("M,"))
    assert found == pytest.approx(said, abs=0.6)


@pytest.mark.parametrize(
    "kind", sorted({one for kind, _ in cases.METHODS.values() for one in kind.split(" and ")})
)
def test_rows_are_of_their_kind(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", kind, rows=3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    # A word of the synthetic tokenizer is a token.
    assert all(len(row["prompt"].split()) == cases.PROMPT for row in rows)
    keys = {
        "demonstrations": {"completion"},
        "pairs": {"chosen", "rejected"},
        "labels": {"completion", "label"},
        "rankings": {"responses", "ranks"},
        "steps": {"completions", "labels"},
        "prompts": set(),
    }
    assert all(set(row) == {"prompt"} | keys[kind] for row in rows)


def rows() -> list[dict[str, Any]]:
    """Three runs of 1 GB or more, one below, one that failed."""
    found: list[dict[str, Any]] = [
        {"case": "sft, a", "method": "sft", "measured_mb": 2000, "planned_mb": 2100, "error": 0.05},
        {"case": "dpo, a", "method": "dpo", "measured_mb": 1000, "planned_mb": 900, "error": -0.10},
        {"case": "ppo, a, b 1", "method": "ppo", "measured_mb": 4000, "planned_mb": 4040, "error": 0.01},
        {"case": "sft, b", "method": "sft", "measured_mb": 900, "planned_mb": 1800, "error": 1.0},
        {"case": "kto, b", "method": "kto", "failed": "out of memory"},
    ]
    return [row | {"cpu": "a chip"} for row in found]


def test_errors_are_counted_over_runs_of_a_gigabyte() -> None:
    said = command.summary(rows())
    # 1,000 MiB are 1.05 GB and count; 900 MiB do not, and would make the worst 100 %.
    assert said.pop("cases") == len(command.names())
    assert said == {"rows": 5, "counted": 3, "failed": 1, "median_error": 0.05, "worst_error": 0.1}
    assert command.summary([])["median_error"] is None


def test_the_page_shows_settings_and_methods() -> None:
    text = "\n".join(pages.tables({"rows": rows(), "summary": command.summary(rows())}))
    assert "3 of 5 runs held 1 GB or more" in text
    assert "| a | 2 | 1,000 to 2,000 | 7.5% | -10.0% | +5.0% |" in text
    assert "| a, b 1 | 1 | 4,000 to 4,000 | 1.0% | +1.0% | +1.0% |" in text
    assert "kto, b: out of memory" in text
    assert "several machines" not in text
    several = [row | {"cpu": "another" if row["method"] == "sft" else "a chip"} for row in rows()]
    text = "\n".join(pages.tables({"rows": several, "summary": command.summary(several)}))
    assert "Runs were measured on several machines: 2 on another and 2 on a chip." in text


def test_seconds_of_a_step() -> None:
    assert steps.seconds_of({"step_s": 2.5, "tokens_per_s": 1.0}, 100) == 2.5
    assert steps.seconds_of({"tokens_per_s": 50.0}, 100) == 2.0
    assert steps.step_s([1, 2, 9], 1) == 2
    # Every third step samples: which of them come last is chance, how many are not.
    assert steps.step_s([1, 7, 1, 1, 7, 1, 1], 3) == 3
    with pytest.raises(ValueError, match="2 steps, and a rollout serves 3"):
        steps.step_s([1, 2], 3)


def test_a_result_is_planned_again_without_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.plan.planned.planned", lambda *_: {"planned_mb": 1500, "phase": "update"})
    row = {"case": "sft, a", "method": "sft", "model": "m", "options": {}, "measured_mb": 2000, "error": 9.0}
    again = command.replanned({"name": "plan", "rows": [row, {"case": "x", "failed": "y"}]}, tmp_path)
    assert again["rows"][0]["error"] == -0.25
    assert again["rows"][1] == {"case": "x", "failed": "y"}
    assert again["summary"]["counted"] == 1
