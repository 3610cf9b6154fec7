"""Rows of a source are counted without reading more of it than that takes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.data.sources import SourceConfig
from trimtab.studies import job_rows
from trimtab.studies.job import job_of
from trimtab.studies.job_rows import count_rows

ROWS = 3000
ROW = {"prompt": "é, a\nb", "chosen": 'say "yes"', "rejected": "no"}
"""In CSV a row of three lines; in bytes longer than in characters."""


def written(folder: Path, name: str) -> Path:
    file = folder / name
    if file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as out:
            table = csv.DictWriter(out, list(ROW))
            table.writeheader()
            table.writerows([ROW] * ROWS)
    else:
        indent = 1 if name.startswith("wide") else None
        file.write_text(json.dumps([ROW] * ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files over 20,000 bytes are large; reading one to its end is an error."""

    def read_rows(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("all of it is read")

    monkeypatch.setattr(job_rows, "MOST_PARSED", 20_000)
    monkeypatch.setattr(job_rows, "read_rows", read_rows)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "wide.json"])
def test_the_first_rows_stand_for_a_large_file(name: str, tmp_path: Path) -> None:
    found, exact = count_rows(SourceConfig(path=str(written(tmp_path, name))), 100)
    assert found == pytest.approx(ROWS, rel=0.005)  # counted in characters é would make it 3,100
    assert not exact


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_a_limit_is_what_counts(name: str, tmp_path: Path) -> None:
    file = str(written(tmp_path, name))
    assert count_rows(SourceConfig(path=file, limit=1000), 100) == (1000, True)
    assert count_rows(SourceConfig(path=file, limit=2900), 100) == (2900, False)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_a_small_file_is_counted_as_far_as_its_limit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(written(tmp_path, name))
    assert count_rows(SourceConfig(path=file), 100) == (ROWS, True)
    read_rows, seen = job_rows.read_rows, [0]

    def counting(*given: Any, **named: Any) -> Iterator[Any]:
        for row in read_rows(*given, **named):
            seen[0] += 1
            yield row

    monkeypatch.setattr(job_rows, "read_rows", counting)
    assert count_rows(SourceConfig(path=file, limit=300), 100) == (300, True)
    assert seen[0] == 300


@pytest.mark.usefixtures("small")
def test_json_lines_under_another_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("\n".join([json.dumps(ROW)] * ROWS))
    assert count_rows(SourceConfig(path=str(file)), 100) == (ROWS, True)


def test_a_broken_large_file_is_left_to_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_rows, "MOST_PARSED", 20_000)
    file = tmp_path / "rows.json"
    file.write_text("[" + "x" * 30_000)
    with pytest.raises(Exception, match=r"not JSON .*rows\.json:1"):
        count_rows(SourceConfig(path=str(file)), 100)


def test_the_plan_says_about(
    configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_rows, "MOST_PARSED", 20_000)
    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d e"}] * ROWS
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    config = configured("dpo", data__sources=[{"path": str(file)}])
    _, facts, warnings = job_of("dpo", config)
    assert facts["rows"] == pytest.approx(ROWS, rel=0.005)
    assert [line for line in warnings if line.startswith(("about 3,0", "about 2,9"))]
