"""Ratings by attribute, and what a row of a pair says of how sure or how large the preference is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group, Response

OVERALL = "overall"
"""What the readers call a rating that is a plain number."""


def as_rated(groups: Iterable[Group], attributes: Sequence[str]) -> list[Group]:
    """The responses that have a rating of one of ``attributes``, with these ratings alone.

    Where a row has one response its columns of these names count too (as in HelpSteer, a column an
    attribute), and a reward counts as "overall". An attribute that is null or not there is missing. Raises
    InputError for a column that holds no number, and for ratings of which none is asked for.
    """
    out: list[Group] = []
    others: set[str] = set()
    for group in groups:
        alone = group.columns if len(group.responses) == 1 else {}
        kept = []
        for response in group.responses:
            given = _given(response) | {n: alone[n] for n in attributes if alone.get(n) is not None}
            ratings = {name: _number(given[name], name, group.id) for name in attributes if name in given}
            others |= given.keys()
            if ratings:
                kept.append(dataclasses.replace(response, ratings=ratings))
        if kept:
            out.append(dataclasses.replace(group, responses=kept))
    if not out and others:
        raise InputError(
            f"reward_model.attributes: the rows rate {', '.join(sorted(others))}, and not "
            f"{', '.join(attributes)}: name what is to be learned"
        )
    return out


def merit(response: Response) -> float | None:
    """How good a response is said to be, on the scale of its ratings (their mean) or of its reward."""
    if response.reward is not None:
        return response.reward
    if response.ratings:
        return sum(response.ratings.values()) / len(response.ratings)
    return None


def pair_number(
    group: Group, column: str, *, words: Mapping[str, float] | None = None, largest: float = math.inf
) -> float:
    """The number from 0 to ``largest`` in a pair's column; ``words`` gives the numbers of words.

    Raises InputError, naming the row, where there is none, and for a group that is no pair.
    """
    if len(group.responses) != 2:
        raise InputError(
            f"{group.id} has {len(group.responses)} responses: the column {column!r} speaks of a pair"
        )
    value = group.columns.get(column)
    if value is None:
        known = ", ".join(sorted(group.columns)) or "none"
        raise InputError(f"{group.id} has no column {column!r} (its columns: {known})")
    if words and isinstance(value, str):
        if value not in words:
            raise InputError(
                f"{group.id}: the column {column!r} holds {value[:60]!r}, none of {', '.join(words)}"
            )
        value = words[value]
    number = _number(value, column, group.id)
    if not 0 <= number <= largest:
        wanted = "0 or more" if largest == math.inf else f"from 0 to {largest:g}"
        raise InputError(f"{group.id}: the column {column!r} holds {number:g}; it must be {wanted}")
    return number


def _given(response: Response) -> dict[str, Any]:
    rewarded = {} if response.reward is None else {OVERALL: response.reward}
    return rewarded | dict(response.ratings or {})


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: the column {name!r} holds {str(value)[:60]!r}, not a number")
    if not math.isfinite(value) or abs(value) > 1e30:
        raise InputError(f"{where}: the column {name!r} holds {value:g}; give a finite number")
    return float(value)
