"""Finding, choosing, comparing: on run directories written by hand, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli.main import run as trimtab
from trimtab.errors import InputError
from trimtab.registry.differences import differences
from trimtab.registry.process import this_process
from trimtab.registry.runs import find_runs, read_run
from trimtab.registry.select import flat, ordered, value, where


def write(folder: Path, lineage: dict[str, Any] | str | None, config: str = "", metrics: str = "") -> Path:
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    if lineage is not None:
        text = lineage if isinstance(lineage, str) else json.dumps(lineage)
        (folder / "lineage.json").write_text(text)
    (folder / "config.toml").write_text(config or '[model]\npath = "base"\n[dpo]\nbeta = 0.1\n')
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def done(method: str, started: str, **more: Any) -> dict[str, Any]:
    return {"status": "finished", "method": method, "started": started, "steps": 4, "wall_s": 2.0, **more}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Six runs: two finished, one from before there was a status, one killed, one damaged, one bare."""
    top = tmp_path / "runs"
    scores = {"eval": {"eval_loss": 2.0}, "eval_step": 4, "train": {"loss": 1.5}, "step": 4}
    write(
        top / "sft", done("sft", "2026-01-01", scores=scores), '[train]\nlr = 1e-5\n[sft]\nloss_on = "all"\n'
    )
    scores = {"eval": {"eval_reward": 0.5}, "train": {"loss": 0.1, "kl": 0.25}, "step": 4}
    write(top / "deep" / "grpo", done("grpo", "2026-01-02", scores=scores), "[train]\nlr = 2e-4\n")
    write(top / "old", {"method": "dpo", "steps": 9, "wall_s": 1.0})
    killed = {"status": "running", "method": "ppo", "started": "2026-01-03", "steps": 2}
    write(top / "killed", killed, metrics='{"step": 3, "loss": 0.75}\n{"step": 4, "lo')
    write(top / "damaged", '{"status": "fin')
    write(top / "bare", None)
    return top


def by_name(top: Path) -> dict[str, Any]:
    return {run.name: run for run in find_runs([top]).runs}


def test_every_run_is_found_with_its_status(runs: Path) -> None:
    found = by_name(runs)
    assert {name: run.status for name, run in found.items()} == {
        "sft": "finished",
        "deep/grpo": "finished",
        "old": "finished",
        "killed": "unfinished",
        "damaged": "damaged",
        "bare": "unfinished",
    }
    assert found["bare"].method == "dpo", "told by the section that no other method has"
    assert found["killed"].steps == 3, "what was logged, behind the last checkpoint"
    assert "lineage.json: damaged" in found["damaged"].problem


def test_a_run_whose_process_lives_is_running(runs: Path) -> None:
    mine = this_process()
    if mine["began"] is None:
        pytest.skip("no /proc here")
    live = {"status": "running", "method": "ppo", "sittings": [{"process": mine}]}
    write(runs / "live", live)
    assert by_name(runs)["live"].status == "running"


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "null", "3", '"running"', "{}", '{"status": null, "scores": 3, "sittings": 4}', "\ufeff{}"),
        *(
            '{"inputs": [1, {"role": 2}], "ancestors": "x", "outputs": []}',
            "[" * 5000,
            '{"scores": {"eval": 1}}',
        ),
        '{"status": "running", "sittings": [7], "started": 5, "wall_s": "long", "parent": {"a": []}}',
    ],
)
def test_no_lineage_however_odd_is_more_than_a_line(
    runs: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = write(runs / "odd", text)
    assert trimtab(["runs", str(runs)]) == 0
    assert trimtab(["runs", str(runs), "--json"]) == 0
    assert trimtab(["runs", "--compare", str(odd), str(runs / "sft")]) == 0
    assert trimtab(["runs", "--ancestry", str(odd)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_links_and_what_runs_write_are_not_walked(runs: Path) -> None:
    (runs / "deep" / "loop").symlink_to(runs)
    (runs / "again").symlink_to(runs / "sft")
    write(runs / "sft" / "checkpoints" / "nested", done("sft", "2026"))
    write(runs / ".hidden", done("sft", "2026"))
    write(runs.joinpath(*"abcdefghij"), done("sft", "2026"))
    names = [run.name for run in find_runs([runs]).runs]
    assert len(names) == 6
    assert len({run.folder.resolve() for run in find_runs([runs, runs / "deep"]).runs}) == 6


def test_a_search_ends_with_a_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.registry.runs.MOST", 5)
    assert "not all were looked at" in find_runs([runs]).lines[-1]


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (["method=dpo"], {"old", "bare", "damaged"}),
        (["method=sft"], {"sft"}),
        (["train.lr<1e-4"], {"sft"}),
        (["train.lr>=0.0002"], {"deep/grpo"}),
        (["steps>4"], {"old"}),
        (["status=finished", "steps<=4"], {"sft", "deep/grpo"}),
        (["eval_reward!=0.5"], {"sft", "old", "killed", "damaged", "bare"}),
        (["kl = 0.25"], {"deep/grpo"}),
        (["date>2026-01-01"], {"deep/grpo", "killed"}),
    ],
)
def test_conditions(runs: Path, conditions: list[str], names: set[str]) -> None:
    assert {run.name for run in where(find_runs([runs]).runs, conditions)} == names


@pytest.mark.parametrize(
    ("condition", "message"),
    [("method", "write KEY=VALUE"), ("=dpo", "write KEY=VALUE"), ("metod=dpo", "did you mean 'method'")],
)
def test_conditions_that_are_none(runs: Path, condition: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        where(find_runs([runs]).runs, [condition])


def test_order_and_values(runs: Path) -> None:
    found = find_runs([runs]).runs
    assert [run.name for run in ordered(found)][:3] == ["killed", "deep/grpo", "sft"]
    assert [run.name for run in ordered(found, "loss")][:3] == ["deep/grpo", "killed", "sft"]
    sft = by_name(runs)["sft"]
    assert value(sft, "eval_loss") == 2.0
    assert value(sft, "scores.train.loss") == 1.5
    assert value(sft, "train.lr") == 1e-5
    assert value(sft, "train") is not None
    assert value(sft, "nothing.at.all") is None
    assert flat({"a": [{"b": 1}, {}], "c": {}}) == {"a.0.b": 1, "a.1": {}, "c": {}}


def test_the_list_as_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trimtab(["runs", str(runs), "--sort", "name", "--where", "status=finished"]) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header[:5] == ["name", "method", "status", "steps", "scores"]
    assert [row[0] for row in rows] == ["deep/grpo", "old", "sft"]
    assert rows[0][4] == "eval_reward 0.5, kl 0.25"
    assert trimtab(["runs", str(runs), "--limit", "1", "--columns", "kl, train.lr"]) == 0
    assert capsys.readouterr().out.splitlines() == ["name\tkl\ttrain.lr", "killed\t–\t–"]
    assert trimtab(["runs", str(runs), "--json", "--where", "method=grpo"]) == 0
    [one] = json.loads(capsys.readouterr().out)
    assert (one["name"], one["scores"]["train"]["kl"]) == ("deep/grpo", 0.25)


def test_a_name_that_would_move_the_cursor(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(runs / "evil\x1b[2J", done("s\x1b]0;x\x07ft", "2026-01-01"))
    assert trimtab(["runs", str(runs)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_no_line_is_wider_than_it(
    runs: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    assert trimtab(["runs", str(runs), "--where", "status=finished"]) == 0
    text = capsys.readouterr().out
    plain = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in text.splitlines()]
    table = [line for line in plain if line[:1] in "┏┃┡│└"]
    assert table
    assert max(map(len, table)) <= width
    assert ("date" in text) == (width == 200)
    assert "grpo" in text


def test_two_runs_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(
        runs / "a",
        done(
            "dpo",
            "2026",
            packages={"torch": "1"},
            inputs=[{"role": "model", "sha256": "x"}],
            code={"version": "1"},
        ),
        '[dpo]\nbeta = 0.1\n[train]\nlr = 1.0\n[run]\nout = "a"\n',
    )
    b = write(
        runs / "b",
        done(
            "dpo",
            "2027",
            packages={"torch": "2"},
            inputs=[{"role": "model", "sha256": "y"}],
            code={"version": "1"},
        ),
        '[dpo]\nbeta = 0.2\n[train]\nlr = 1.0\n[run]\nout = "b"\n',
    )
    found = differences([read_run(a), read_run(b)])
    assert found.configuration == [("dpo.beta", [0.1, 0.2])]
    assert found.lineage == [("packages.torch", ["1", "2"]), ("inputs.model", ["x", "y"])]
    assert ("wall_s", [2.0, 2.0]) in found.scores
    assert trimtab(["runs", "--compare", str(a), str(b)]) == 0
    assert "dpo.beta\t0.1\t0.2" in capsys.readouterr().out.splitlines()
    assert trimtab(["runs", "--compare", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["configuration"] == {"dpo.beta": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "nowhere"], "nowhere: no such folder"),
        (["runs", "--compare", "a"], "two or more"),
        (["runs", "--compare", "a", "b"], "a: no such folder"),
        (["runs", "--ancestry", "a"], "a: no lineage.json"),
        (["runs", "--ancestry", "a", "--limit", "2"], "stands alone"),
        (["runs", "--limit", "-1"], "--limit is 0 or more"),
        (["verify", "nowhere"], "nowhere: no lineage.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trimtab(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
