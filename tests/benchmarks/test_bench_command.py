"""The command line: list, and bad input refused before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import environments, harness
from benchmarks.__main__ import main

DUMMY = Path(__file__).with_name("dummy_worker.py")


def test_list_names_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["grpo", "dpo", "ppo"]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft"], "unknown benchmark 'sft': expected list, grpo, dpo, ppo"),
        (["dpo", "--runs", "0"], "--runs 0: expected at least 1"),
        (["dpo", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: no such folder"),
        (["dpo", "--case", "4 epochs"], "--case '4 epochs': expected a part of default allocator; tuned"),
        (["ppo", "--case", "2 epochs"], "--case '2 epochs': expected a part of 1 epoch, default allocator;"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    """In place of both interpreters, a script that ignores "-m MODULE NAME…" and replays these seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "prepare_inputs", lambda cache: cache / "inputs")
    dummy = tmp_path / "python"
    dummy.write_text(f'#!/bin/sh\nexec {sys.executable} {DUMMY} "$3" {tmp_path}/diary 100 {seconds}\n')
    dummy.chmod(0o755)
    monkeypatch.setattr(harness.sys, "executable", str(dummy))
    monkeypatch.setattr(harness, "peer_python", lambda name, cache: dummy)


@pytest.mark.parametrize("keep", [False, True])
def test_json_file_and_workers_folder(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, monkeypatch, "9 9 3 1 2")
    options = ["dpo", "--runs", "3", "--case", "tuned allocator", "--json", "out.json"]
    assert main(options + ["--keep"] * keep) == 0
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result == json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert (row["case"], row["speedup"], row["memory_ratio"], row["runs"]) == ("tuned allocator", 1, 1, 3)
    logs = list((tmp_path / ".benchmarks" / "runs").glob("*/tuned-allocator/*/log.txt"))
    assert len(logs) == (2 if keep else 0)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("4 epochs", ["4 epochs, default allocator", "4 epochs, tuned allocator"]),
        (
            "tuned allocator",
            ["1 epoch, tuned allocator", "4 epochs, tuned allocator", "peer as installed, tuned allocator"],
        ),
        ("1 epoch, default allocator", ["1 epoch, default allocator"]),
    ],
)
def test_case_names_a_part_or_the_whole(
    named: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "9 3 1 2")
    assert main(["ppo", "--case", named, "--json", "out.json"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert [row["case"] for row in rows] == expected
    # 1 of warm-up and 3 timed: with the other benchmarks' 2 + 7 the worker would run out of seconds
    assert {(row["ours_s"], row["runs"]) for row in rows} == {(2, 3)}


def test_a_finished_environment_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    made: list[Path] = []
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"peer-1": [["torch==1"], ["torch==1", "peer==1"]]})
    monkeypatch.setattr(environments, "_pip", lambda folder, arguments: asked.append(arguments))

    def create(folder: Path, with_pip: bool, clear: bool) -> None:
        assert with_pip
        assert clear
        made.append(folder)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environments.venv, "create", create)
    python = environments.peer_python("peer-1", tmp_path)
    assert python.is_relative_to(tmp_path / "peer-1")
    assert asked == [["--upgrade", "pip"], ["torch==1"], ["torch==1", "peer==1"]]
    environments.peer_python("peer-1", tmp_path)
    assert len(made) == 1
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"peer-1": [["torch==2"]]})
    environments.peer_python("peer-1", tmp_path)
    assert len(made) == 2
