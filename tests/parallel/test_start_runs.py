"""How several processes begin: they meet, or one says who is missing; they compare what has to be alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from ranks import Ends, Ranks

from trimtab.config import dump_toml
from trimtab.registry.ancestry import read_lineage

SOON_S = 15.0


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def dpo(tiny_model: Path, tiny_data: Path, tmp_path: Path, out: Path) -> list[str]:
    config = tiny.configure("dpo", tiny_model, tiny_data, out, train__steps=4, parallel__lost_after_s=6.0)
    (tmp_path / "dpo.toml").write_text(dump_toml(config))
    return ["dpo", str(tmp_path / "dpo.toml")]


def refused(ends: Ends, code: int = 2) -> str:
    """The one line of a run that did not begin."""
    assert set(ends.codes) == {code}, [end.err for end in ends.each]
    assert max(end.after_s for end in ends.each) < SOON_S
    return ends.line


def test_two_runs_are_the_same_bits_and_one_process_speaks(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for folder in (out, other):
        ends = ranks.run(tmp_path / f"said-{folder.name}", *dpo, "--run.out", str(folder))
        assert ends.codes == [0, 0], ends.each[0].err
        assert ends.silent(1)
        assert ends.each[0].out == f"dpo: 4 steps, model in {folder / 'model'}\n"
    metrics = [tiny.comparable(tiny.read_metrics(folder / "metrics.jsonl")) for folder in (out, other)]
    assert metrics[0] == metrics[1]
    for file in ("model/model.safetensors", "checkpoints/step-00000004/tensors.safetensors"):
        assert (out / file).read_bytes() == (other / file).read_bytes()
    lineage = read_lineage(out)
    assert [one["rank"] for one in lineage["processes"]] == [0, 1]
    assert all(one["peak_rss_mb"] > 10 for one in lineage["processes"])
    assert len({one["pid"] for one in lineage["processes"]}) == 2
    assert sorted(p.name for p in (out / "processes").iterdir()) == ["1.log"]
    assert "ended: done" in (out / "processes/1.log").read_text()


def test_options_that_differ_are_named(ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path) -> None:
    ends = ranks.run(tmp_path / "said", *dpo, own={1: ["--train.lr", "0.25"]})
    line = refused(ends)
    assert line == (
        "error: train.lr differs between processes: 0.005 in process 0 and 0.25 in process 1; all have to be "
        "started alike"
    )
    assert not out.exists()
    ends = ranks.run(tmp_path / "where", *dpo, own={0: ["--run.out", str(tmp_path / "elsewhere")]})
    assert refused(ends).startswith("error: run.out differs between processes: ")
    # Whoever is forced asks nobody whether the run fits.
    ends = ranks.run(tmp_path / "forced", *dpo, own={1: ["--force"]})
    assert refused(ends).startswith("error: --force differs between processes: False in process 0 and True")
    # The other method's section is in its file: that is found before they meet.
    ends = ranks.run(tmp_path / "method", own={0: dpo, 1: ["ipo", dpo[1]]})
    assert "unknown key" in refused(ends)
    assert refused(ranks.run(tmp_path / "command", "dop")).startswith("error: trimtab: argument COMMAND: ")


def test_data_that_differ_are_named(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path, tiny_data: Path
) -> None:
    """Each machine has a file of this name; two of them are not the same."""
    for name, rows in (("a", tiny.pairs(8)), ("b", tiny.pairs(9))):
        (tmp_path / name).mkdir()
        tiny.write_rows(tmp_path / name / "pairs.jsonl", rows)
    dpo = ["dpo", str(tmp_path / "own.toml")]
    text = (tmp_path / "dpo.toml").read_text().replace(str(tiny_data / "pairs.jsonl"), "pairs.jsonl")
    (tmp_path / "own.toml").write_text(text)
    places = {0: {"TEST_FOLDER": str(tmp_path / "a")}, 1: {"TEST_FOLDER": str(tmp_path / "b")}}
    line = refused(ranks.run(tmp_path / "said", *dpo, environments=places))
    assert line.startswith("error: pairs.jsonl is not the same file in all processes: its SHA-256 is ")
    assert not (out / "config.toml").exists()


def test_a_process_without_its_file_ends_all(ranks: Ranks, dpo: list[str], tmp_path: Path) -> None:
    ends = ranks.run(tmp_path / "said", "dpo", own={0: [dpo[1]], 1: [str(tmp_path / "none.toml")]})
    assert refused(ends).endswith("none.toml: no such configuration file")


def test_fewer_groups_than_processes_are_refused(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path
) -> None:
    line = refused(ranks.run(tmp_path / "said", *dpo, "--train.batch_groups", "1"))
    assert line.startswith("error: train.batch_groups = 1 is below the number of processes, 2: ")
    line = refused(
        ranks.run(tmp_path / "over", *dpo, "--parallel.weights", "shard", "--parallel.shard_over", "3")
    )
    assert line == "error: parallel.shard_over = 3 does not divide the number of processes, 2"
    assert not out.exists()


@pytest.mark.parametrize(
    ("size", "came", "words"),
    [
        (3, [0, 2], "error: process 1 of 3 did not come within 2 s (parallel.wait_s)"),
        (3, [1, 2], "of 3: process 0 did not answer at 127.0.0.1:"),
    ],
    ids=["one", "the first"],
)
def test_a_missing_process_is_named(
    ranks: Ranks, dpo: list[str], out: Path, tmp_path: Path, size: int, came: list[int], words: str
) -> None:
    wait = ("--parallel.wait_s", "2")
    line = refused(ranks.run(tmp_path / "said", *dpo, *wait, size=size, start=came))
    assert words in line
    assert not out.exists()


def test_an_environment_that_contradicts_itself(ranks: Ranks, dpo: list[str], tmp_path: Path) -> None:
    wrong = {0: {"RANK": "7", "WORLD_SIZE": "2"}}
    ends = ranks.run(tmp_path / "said", *dpo, start=[0], environments=wrong)
    assert refused(ends) == "error: RANK = 7 and WORLD_SIZE = 2: ranks are 0 to WORLD_SIZE - 1"
