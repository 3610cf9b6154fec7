"""The harness with two dummy workers: order, medians, the JSON's shape, the allocator, a worker's death."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.catalogue import ALLOCATORS, BENCHMARKS
from benchmarks.machine import worker_environ
from benchmarks.rows import Side, to_row

DUMMY = Path(__file__).with_name("dummy_worker.py")


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary.txt"


def launch(tmp_path: Path, side: str, peak_mb: float, seconds: list[float], case: str) -> harness.Launch:
    command = [sys.executable, str(DUMMY), side, str(tmp_path / "diary.txt"), str(peak_mb)]
    return harness.Launch(
        [*command, *map(str, seconds)], worker_environ(case), tmp_path / case.split()[0] / side
    )


def both(tmp_path: Path, case: str = "default allocator") -> dict[str, harness.Launch]:
    return {
        "ours": launch(tmp_path, "ours", 500, [90, 80, 3, 1, 2], case),
        "peer": launch(tmp_path, "peer", 2000, [70, 60, 8, 4, 6], case),
    }


def test_sides_alternate_and_never_overlap(tmp_path: Path, diary: Path) -> None:
    harness.measure(both(tmp_path), runs=3, warm_up=2)
    turn = ["ours begins", "ours ends", "peer begins", "peer ends"]
    assert diary.read_text().splitlines() == turn * 5


def test_medians_leave_the_warm_up_out(tmp_path: Path) -> None:
    sides = harness.measure(both(tmp_path), runs=3, warm_up=2)
    # with the warm-up counted the medians would be 3 and 8
    assert sides["ours"].seconds == [3, 1, 2]
    assert sides["ours"].median_s == 2
    assert sides["peer"].median_s == 6


def test_row_uses_medians_not_means() -> None:
    sides = {
        "ours": Side([1.0, 2.0, 30.0], 500.0, None, {}),
        "peer": Side([5.0, 6.0, 100.0], 2000.0, None, {}),
    }
    assert to_row("a case", sides, 3) == {
        "case": "a case",
        "ours_s": 2.0,
        "peer_s": 6.0,
        "speedup": 3.0,
        "ours_peak_mb": 500.0,
        "peer_peak_mb": 2000.0,
        "memory_ratio": 0.25,
        "runs": 3,
    }


def test_row_of_one_side_has_nulls() -> None:
    row = to_row("a case", {"peer": Side([5.0], None, None, {})}, 1)
    assert row["peer_s"] == 5.0
    nulls = {key for key, value in row.items() if value is None}
    assert nulls == {"ours_s", "speedup", "ours_peak_mb", "peer_peak_mb", "memory_ratio"}


def test_result_has_exactly_the_contract_keys(tmp_path: Path) -> None:
    cases = harness.cases_of(BENCHMARKS["grpo"])
    result = harness.run(BENCHMARKS["grpo"], lambda case: both(tmp_path, case), cases, runs=3)
    assert list(result) == ["name", "setting", "machine", "rows"]
    assert result["name"] == "grpo"
    assert [row["case"] for row in result["rows"]] == ["default allocator", "tuned allocator"]
    keys = "case ours_s peer_s speedup ours_peak_mb peer_peak_mb memory_ratio runs"
    for row in result["rows"]:
        assert list(row) == keys.split()
        assert (row["ours_s"], row["peer_s"], row["speedup"], row["runs"]) == (2, 6, 3, 3)
    assert result["machine"]["ours"]["threads"] == 1
    assert {"cpu", "cores", "memory_gb", "ours", "peer"} <= result["machine"].keys()


def test_both_sides_get_the_same_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = ALLOCATORS["tuned allocator"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    for allocator, expected in ALLOCATORS.items():
        environ = worker_environ(allocator, os.environ)
        assert environ.get("GLIBC_TUNABLES") == expected
        assert environ["TRIMTAB_ALLOCATOR"] == "default"
    sides = harness.measure(both(tmp_path, "tuned allocator"), runs=1)
    assert [side.facts["tunables"] for side in sides.values()] == [tuned, tuned]


def test_cases_are_variants_with_every_allocator() -> None:
    assert harness.cases_of(BENCHMARKS["grpo"]) == ["default allocator", "tuned allocator"]
    assert harness.cases_of(BENCHMARKS["dpo"]) == [
        "256 + 64, default allocator",
        "256 + 64, tuned allocator",
        "16 + 240, default allocator",
        "16 + 240, tuned allocator",
        "152k vocabulary, default allocator",
        "152k vocabulary, tuned allocator",
    ]


@pytest.mark.parametrize(
    ("name", "case", "last"),
    [("ppo", "4 epochs, ", "8 4"), ("ppo", "peer as installed, ", "as-installed"), ("grpo", "", "data.json")],
)
def test_a_variant_reaches_both_workers_and_the_allocator_too(
    name: str, case: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "prepare_inputs", lambda cache, names: cache / "inputs")
    monkeypatch.setattr(harness, "peer_python", lambda name, cache: Path("peer-python"))
    with harness.launcher_for(BENCHMARKS[name], ["ours", "peer"], keep=False) as launcher:
        launches = launcher(f"{case}tuned allocator")
    for launch in launches.values():
        assert launch.command[-1].endswith(last)
        assert launch.environ["GLIBC_TUNABLES"] == ALLOCATORS["tuned allocator"]
    assert len({launch.folder for launch in launches.values()}) == 2


def test_death_of_a_worker_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(harness.WorkerError, match=r"(?s)code 1.*log\.txt.*out of seconds"):
        harness.measure(both(tmp_path), runs=4, warm_up=2)


def test_a_worker_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    broken = harness.Launch([sys.executable, "-c", "import no_such_package"], os.environ, tmp_path / "broken")
    with pytest.raises(harness.WorkerError, match="no_such_package"):
        harness.measure({"ours": broken}, runs=1)


def test_a_reply_of_another_kind_is_refused(tmp_path: Path) -> None:
    script = """if True:
        print('{"ready": {}}', flush=True)
        input()
        print('{"minutes": 1}', flush=True)
    """
    odd = harness.Launch([sys.executable, "-c", script], os.environ, tmp_path / "odd")
    with pytest.raises(harness.WorkerError, match="expected a reply with 'seconds'"):
        harness.measure({"ours": odd}, runs=1)
