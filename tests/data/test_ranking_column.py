"""The column ``ranking``: responses best first, by number or by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab.data.convert import as_comparisons
from trimtab.data.formats import BadRow, parse_row
from trimtab.data.readers import read_groups
from trimtab.errors import InputError


def ranks(**row: Any) -> list[float | None]:
    given = {"prompt": "p", "responses": ["a", "b", "c", "d"], **row}
    return [r.rank for r in parse_row(given, id="x:0", source="x")[0].responses]


def test_responses_are_counted_from_one() -> None:
    # 2 > 3 > 1 > 4, as in the worked example of the design.
    assert ranks(ranking=[2, 3, 1, 4]) == [3, 1, 2, 4]


def test_ties_and_what_is_not_named() -> None:
    assert ranks(ranking=[2, [1, 4], 3]) == [2, 1, 4, 2]
    # The best two: the others are tied below them.
    assert ranks(ranking=[3, 1]) == [2, 3, 1, 3]


def test_by_id() -> None:
    assert ranks(ranking=["y", "w"], ids=["w", "x", "y", "z"]) == [2, 3, 1, 3]
    assert ranks(ranking=[30, 10, 20, 40], ids=[10, 20, 30, 40]) == [2, 3, 1, 4]
    assert ranks(ranking="[4, 3, 2, 1]") == [4, 3, 2, 1], "as JSON, as in a CSV's cell"


def test_ids_without_a_ranking_stay_a_column() -> None:
    group, _ = parse_row({"prompt": "p", "responses": ["a"], "ids": [7]}, id="x:0", source="x")
    assert group.columns == {"ids": [7]}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"ranking": [0, 1, 2, 3]}, "unknown id"),
        ({"ranking": [1, 5]}, "unknown id"),
        ({"ranking": ["a", "b"]}, "unknown id"),
        ({"ranking": [1, 2.0]}, "unknown id"),
        ({"ranking": [True]}, "unknown id"),
        ({"ranking": ["q"], "ids": ["w", "x", "y", "z"]}, "unknown id"),
        ({"ranking": [1, 2, 1]}, "repeated id"),
        ({"ranking": [1, [2, 1]]}, "repeated id"),
        ({"ranking": [1], "ids": ["w", "w", "y", "z"]}, "repeated id"),
        ({"ranking": []}, "empty list"),
        ({"ranking": [1, []]}, "empty list"),
        ({"ranking": 3}, "wrong type"),
        ({"ranking": [1], "ids": ["w"]}, "lists of unequal length"),
        ({"ranking": [1], "ids": [[1], "x", "y", "z"]}, "wrong type"),
        ({"ranking": [[[1]]]}, "unknown id"),
        ({"ranking": [1, 2], "ranks": [1, 2, 3, 4]}, "two rankings"),
    ],
)
def test_bad_rankings_are_one_line(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow) as caught:
        ranks(**row)
    assert caught.value.kind == kind
    file = tiny.write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a", "b", "c", "d"], **row}])
    with pytest.raises(InputError, match=r"r\.jsonl:1") as error:
        read_groups(str(file))
    assert "\n" not in str(error.value)


def test_one_that_orders_nothing_is_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "responses": ["a", "b"], "ranking": [[1, 2]]},
        {"prompt": "q", "responses": ["a", "b"], "ranking": [2]},
    ]
    groups, _ = read_groups(str(tiny.write_rows(tmp_path / "r.jsonl", rows)))
    assert [g.prompt for g in as_comparisons(groups)] == ["q"]
