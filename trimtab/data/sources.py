"""Sources of groups: their options, the split by prompt, and the endless order of training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trimtab.data.readers import ReadReport, read_groups
from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text, stable_hash


class SourceConfig(BaseModel):
    """One source of feedback in a run's configuration."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    path: str
    """File (.jsonl, .json, .parquet, .csv), folder of files, or Hugging Face data set name."""
    name: str | None = None
    """Name in reports and row ids; the file's name when left out. Unique within a run."""
    split: str = "train"
    """Split of a data set, or of a folder whose files are named after splits."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the groups drawn, relative to the other sources' weights; sizes play no part."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renamed columns, yours → ours: question = "prompt"."""
    limit: int | None = Field(default=None, ge=1)
    """Stop after this many groups."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: end the run with its line, or be skipped and counted."""

    def read(self) -> tuple[list[Group], ReadReport]:
        """The source's groups. Raises InputError as `read_groups` does."""
        return read_groups(
            self.path,
            name=self.name,
            split=self.split,
            columns=self.columns,
            limit=self.limit,
            on_bad_row=self.on_bad_row,
        )


def split_by_prompt(groups: Sequence[Group], fraction: float, seed: int) -> tuple[list[Group], list[Group]]:
    """Splits into (train, held out), all groups of a prompt going to one side.

    A prompt is held out when the hash of (seed, its text) lies in the lowest ``fraction`` of the range, so a
    prompt's side depends neither on the order of rows nor on which others there are: more rows added later
    move none across. A side that would be empty gets the one prompt nearest to it. Rows of plain text,
    which have no prompt, are split by their text. The number held out is ``fraction`` in expectation only.

    Raises InputError unless 0 ≤ fraction < 1, and when there is only one prompt to split.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the held-out fraction is {fraction}: use 0 or more and less than 1")
    if fraction == 0 or not groups:
        return list(groups), []
    keys = [_split_key(group) for group in groups]
    places = {key: stable_hash("held out", seed, key) / 2**64 for key in keys}
    if len(places) == 1:
        raise InputError(
            f"all {len(groups)} groups have one prompt, which cannot be on both sides: add others"
        )
    ordered = sorted(places, key=lambda key: (places[key], key))
    held = {key for key in ordered if places[key] < fraction} | {ordered[0]}
    if len(held) == len(ordered):
        held.remove(ordered[-1])
    train = [group for group, key in zip(groups, keys, strict=True) if key not in held]
    return train, [group for group, key in zip(groups, keys, strict=True) if key in held]


def _split_key(group: Group) -> str:
    text = prompt_text(group.prompt)
    return text or (prompt_text(group.responses[0].text) if group.responses else "")


class Stream:
    """The endless order of training, as a pure function of (seed, position).

    ``position`` counts the groups drawn so far; it is all that a checkpoint must hold. Source s with weight
    w_s gives its k-th group at the time (k + ½)/w_s, and the sources are merged by time (ties to the earlier
    source), so that after any p draws each of the S sources has given its share p·w_s/Σw to within (S + 1)/2
    groups. Each source is walked without replacement, every pass in a new order: its groups sorted by the
    hash of (seed, pass, group id). A group with several ``wordings`` (by id) comes in one of them, by another
    hash of the same.

    Raises InputError for no sources, an empty one, a bad weight, or two groups with one id.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Group]],
        weights: Sequence[float],
        seed: int,
        wordings: Mapping[str, Sequence[Group]] | None = None,
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise InputError(
                f"{len(sources)} sources and {len(weights)} weights: give one or more, as many of each"
            )
        for index, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            if not source:
                raise InputError(f"source {index} has no groups: remove it or give it rows")
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"the weight of source {index} is {weight}: use a number above 0")
        seen: set[str] = set()
        for group in (group for source in sources for group in source):
            if group.id in seen:
                raise InputError(f"two groups have the id {group.id}: give each source a `name` of its own")
            seen.add(group.id)
        self._sources = [list(source) for source in sources]
        self._seed, self._wordings = seed, wordings or {}
        exact = [Fraction(weight) for weight in weights]
        common = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * common) for weight in exact]
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def batch(self, position: int, n: int) -> list[Group]:
        """Groups ``position`` to ``position + n``: copies, so that filling them in changes no later pass."""
        picked = []
        for s, k in self._draws(position, n):
            epoch, index = divmod(k, len(self._sources[s]))
            group = self._sources[s][self._order(s, epoch)[index]]
            if words := self._wordings.get(group.id):
                group = words[stable_hash("wording", self._seed, epoch, group.id) % len(words)]
            picked.append(_copy(group))
        return picked

    def worded(self, groups: Sequence[Group]) -> list[Group]:
        """These groups in every wording that they come in: not copies, but what batches are copied from."""
        return [words for group in groups for words in self._wordings.get(group.id, [group])]

    def epoch(self, position: int) -> int:
        """How many times the group at ``position`` was drawn before: its source's pass, from 0."""
        [(s, k)] = self._draws(position, 1)
        return k // len(self._sources[s])

    @property
    def epoch_length(self) -> int:
        """Draws until every group of every source has come up at least once."""
        lasts = [(self._time(s, len(source) - 1), s) for s, source in enumerate(self._sources)]
        time, last = max(lasts)
        return 1 + sum(self._count_before(s, time, last) for s in range(len(self._sources)))

    def shares(self) -> dict[str, float]:
        """How often each group is drawn, by id: its source's share of the draws, over the source's groups."""
        whole = sum(self._weights)
        pairs = zip(self._sources, self._weights, strict=True)
        return {group.id: weight / whole / len(source) for source, weight in pairs for group in source}

    def _time(self, s: int, k: int) -> Fraction:
        return Fraction(2 * k + 1, self._weights[s])

    def _count_before(self, s: int, time: Fraction, of: int) -> int:
        """How many draws of source s come before the draw of source ``of`` at ``time``."""
        x = (time * self._weights[s] - 1) / 2  # draws k with (2k+1)/w < time are those with k < x
        whole = math.floor(x)
        return max(0, whole + 1 if s < of and whole == x else math.ceil(x))

    def _draws(self, position: int, n: int) -> list[tuple[int, int]]:
        """(source, draw of that source) for each of n positions."""
        if position < 0 or n < 0:
            raise ValueError(f"position {position} and n {n} must not be negative")
        count = len(self._sources)
        # At this time at most ``position`` groups have been drawn, and at least position − 2·count.
        start = Fraction(2 * max(0, position - count), sum(self._weights))
        drawn = [self._count_before(s, start, 0) for s in range(count)]
        draws = []
        for at in range(sum(drawn), position + n):
            s = min(range(count), key=lambda s: (self._time(s, drawn[s]), s))
            if at >= position:
                draws.append((s, drawn[s]))
            drawn[s] += 1
        return draws

    def _order(self, s: int, epoch: int) -> list[int]:
        """Source s's order in a pass; the last one is kept, since it takes a sort to make."""
        held = self._orders.get(s)
        if held is None or held[0] != epoch:
            ids = [group.id for group in self._sources[s]]
            order = sorted(range(len(ids)), key=lambda i: (stable_hash(self._seed, epoch, ids[i]), ids[i]))
            held = self._orders[s] = (epoch, order)
        return held[1]


def _copy(group: Group) -> Group:
    """A copy whose fields, lists and mappings may be set without touching the original."""
    responses = [
        dataclasses.replace(
            response,
            reward_terms=dict(response.reward_terms),
            ratings=None if response.ratings is None else dict(response.ratings),
        )
        for response in group.responses
    ]
    return dataclasses.replace(group, responses=responses, columns=dict(group.columns))
