"""Processes that are killed, stopped or fail: the others end within seconds, and one says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from ranks import Ends, Ranks

from trimtab.config import dump_toml
from trimtab.methods import find
from trimtab.registry.ancestry import read_lineage
from trimtab.training.metrics import read_metrics

SILENT_S = 4.0
"""parallel.lost_after_s of these runs."""
SOON_S = 10.0
"""Where no silence has to be waited for: a beat, a grace, and a busy machine."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def dpo(tiny_model: Path, tiny_data: Path, tmp_path: Path, out: Path) -> list[str]:
    """Arguments of a run whose steps go on until something ends it."""
    config = tiny.configure(
        "dpo",
        tiny_model,
        tiny_data,
        out,
        train__steps=40,
        train__save_every=2,
        train__save_in_background=False,
        parallel__lost_after_s=SILENT_S,
    )
    assert isinstance(config, find("dpo").Config)
    (tmp_path / "dpo.toml").write_text(dump_toml(config))
    return ["dpo", str(tmp_path / "dpo.toml")]


def fault(rank: int, do: str, step: int = 5) -> dict[str, Any]:
    return {"rank": rank, "step": step, "do": do}


def names_lost(ends: Ends, rank: int, words: str) -> None:
    line = ends.line
    assert line.startswith(f"lost: process {rank} ("), line
    assert words in line
    assert line.endswith("go on with --resume auto"), line


@pytest.mark.parametrize("lost", [1, 0], ids=["a process", "the one that holds the store"])
def test_a_killed_process_ends_the_others(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path, lost: int
) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, size=3, fault=fault(lost, "kill"))
    left = [end for rank, end in enumerate(ends.each) if rank != lost]
    assert ends.each[lost].code == -9
    assert [end.code for end in left] == [75, 75]
    assert max(end.after_s for end in left) < SOON_S
    names_lost(ends, lost, "has ended without a word")
    if lost:
        assert read_lineage(out)["reason"].startswith("process 1 (")
        assert "ended: process 1 (" in (out / "processes/2.log").read_text()
    again = ranks.run(tmp_path / "again", *dpo, "--run.resume", "auto", "--train.steps", "8", size=2)
    assert again.codes == [0, 0], again.each[0].err
    assert [m["step"] for m in read_metrics(out / "metrics.jsonl")] == [*range(1, 9)]


@pytest.mark.parametrize("lost", [1, 0], ids=["a process", "the one that holds the store"])
def test_a_stopped_process_ends_the_others(ranks: Ranks, dpo: list[str], tmp_path: Path, lost: int) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, size=3, fault=fault(lost, "stop"))
    left = [end for rank, end in enumerate(ends.each) if rank != lost]
    assert [end.code for end in left] == [75, 75]
    assert SILENT_S - 1 < max(end.after_s for end in left) < SILENT_S + SOON_S
    names_lost(ends, lost, "was last heard of")


def test_a_long_wait_is_no_loss(ranks: Ranks, dpo: list[str], tmp_path: Path) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, "--train.steps", "6", fault=fault(1, f"wait:{SILENT_S + 3}"))
    assert ends.codes == [0, 0], ends.each[0].err
    assert ends.silent(1)


@pytest.mark.parametrize(
    ("do", "code", "words"),
    [
        ("error", 2, "error: one process has found something wrong"),
        ("memory", 2, "error: step 5: out of memory in process 1 (out of memory, as a test has it)"),
        ("bug", 1, "Traceback"),
        ("int", 130, "interrupted; go on with --resume auto"),
    ],
)
def test_what_ends_one_ends_all(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path, do: str, code: int, words: str
) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, fault=fault(1, do))
    assert ends.codes == [code, code]
    assert max(end.after_s for end in ends.each) < SOON_S
    assert ends.line.startswith(words)
    assert words in ends.each[1].err  # the one that it happened to
    assert read_lineage(out)["status"] == "stopped"
    assert read_lineage(out)["reason"].startswith("process 1 ended: ")


def test_sigterm_to_one_saves_the_same_step_in_all(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path
) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, fault=fault(1, "term"))
    assert ends.codes == [143, 143]
    assert max(end.after_s for end in ends.each) < SOON_S
    assert ends.line.startswith("terminated: step 5 is saved in ")
    assert ends.silent(1)
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == "step-00000005"
    again = ranks.run(tmp_path / "again", *dpo, "--run.resume", "auto", "--train.steps", "7")
    assert again.codes == [0, 0], again.each[0].err
    assert [m["step"] for m in read_metrics(out / "metrics.jsonl")] == [*range(1, 8)]
    sittings = json.loads((out / "lineage.json").read_text())["sittings"]
    assert [one["processes"] for one in sittings] == [2, 2]
