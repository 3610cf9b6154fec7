"""How long the groups of a run are, from the head of its data: read, converted and tokenised as the run does.

Only the first rows of each source are read; the others are counted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from trimtab.data.convert import (
    as_comparisons,
    as_demonstrations,
    as_labelled,
    as_pairs,
    as_prompts,
    by_feedback,
    pair_labels,
    pairs_or_labels,
)
from trimtab.data.ratings import as_rated
from trimtab.data.readers import check_there
from trimtab.data.sources import SourceConfig
from trimtab.data.steps import as_steps
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.reward import names_of
from trimtab.methods.shared.setup import Data, MethodConfig, prepare_data
from trimtab.planning.methods import Card
from trimtab.studies.job_hub import tokenizer_at_hand
from trimtab.studies.job_rows import count_rows


@dataclass(frozen=True, slots=True)
class Text:
    """As much of a model as reading data takes."""

    tokenizer: Any
    context: int


@dataclass(slots=True)
class Sample:
    """The head of a run's data."""

    data: Data
    rows: int
    """Groups of the whole data, training rows alone; an estimate unless ``whole``."""
    whole: bool
    """The sample is all of it."""
    warnings: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """Of the training rows read."""
        return self.data.groups


def sample_data(
    card: Card, config: MethodConfig, context: int, sample_rows: int
) -> tuple[Sample | None, list[str]]:
    """The sample; None with the reason where there is no data or no tokenizer yet.

    The last one is kept: advice plans a run many times over with other options for the same data. Raises
    InputError for data that the run would refuse.
    """
    key = _key(card, config, context, sample_rows)
    if key not in _LAST:
        found = _sample(card, config, context, sample_rows)
        _LAST.clear()
        _LAST[key] = found
    sample, lines = _LAST[key]
    return sample, list(lines)


_LAST: dict[str, tuple[Sample | None, list[str]]] = {}


def forget_sample() -> None:
    """Let go of the sample that is kept: planning is done."""
    _LAST.clear()


def _key(card: Card, config: MethodConfig, context: int, sample_rows: int) -> str:
    """All that a sample depends on, with the time that its files were written."""
    files = [Path(source.path).expanduser() for source in config.data.sources]
    stated = [
        config.model.model_dump(exclude={"dtype", "layout", "attention", "device"}),
        context,
        sample_rows,
    ]
    sampling = getattr(config, "sampling", None)
    return json.dumps(
        [
            *(card.name, *stated, config.train.seed, config.data.model_dump()),
            getattr(config, card.section).model_dump(),
            None if sampling is None else sampling.max_new_tokens,
            [file.stat().st_mtime_ns if file.exists() else None for file in files],
        ],
        default=str,
    )


def _sample(
    card: Card, config: MethodConfig, context: int, sample_rows: int
) -> tuple[Sample | None, list[str]]:
    sources = config.data.sources
    if not sources:
        return None, ["data.sources is empty: lengths are the limits of the configuration"]
    for source in sources:
        try:
            check_there(source.path)
        except InputError as error:
            return None, [f"{error}; until it is there, lengths are the limits of the configuration"]
    try:
        tokenizer = tokenizer_at_hand(config.model)
    except InputError as error:
        return None, [f"{error}; without a tokenizer lengths are the limits of the configuration"]
    text = Text(tokenizer, context)
    heads = [s.model_copy(update={"limit": min(s.limit or sample_rows, sample_rows)}) for s in sources]
    counts = [count_rows(source, sample_rows) for source in sources]
    totals = [total for total, _ in counts]
    counted = [total for total in totals if total is not None]
    whole = len(counted) == len(totals) and all(total <= sample_rows for total in counted)
    try:
        data = _prepared(card, config, text, heads)
    except InputError as error:
        if whole or not config.data.heldout_fraction:
            raise
        # A head with one prompt cannot be split where all of the data can.
        return None, [f"{error} (in the first rows); lengths are the limits of the configuration"]
    read = sum(min(sample_rows, sample_rows if total is None else total) for total in totals)
    rows = len(data.groups) if whole else round(len(data.groups) * sum(counted) / max(read, 1))
    lines: list[str] = []
    if len(counted) < len(totals):
        lines.append("a data set of the hub is not counted: its first rows stand for all")
        rows = max(rows, len(data.groups))
    lines += [
        f"about {total:,} rows are taken to be in {source.path}, by its size: not all of it was read"
        for source, (total, exact) in zip(sources, counts, strict=True)
        if not exact
    ]
    return Sample(data, max(rows, 1), whole, lines), []


def _prepared(card: Card, config: MethodConfig, text: Text, heads: list[SourceConfig]) -> Data:
    options = getattr(config, card.section)
    after: Callable[[Iterable[Group]], list[Group]] = list
    if getattr(options, "pairs_from", "") == "labels":
        after = functools.partial(pair_labels, seed=config.train.seed)
    room = config.sampling.max_new_tokens if card.rollouts else 0  # type: ignore[attr-defined]
    return prepare_data(
        config.data.model_copy(update={"sources": heads, "heldout": []}),
        cast(Any, text),
        _reader(card, config, text),
        card.feedback,
        config.train.seed,
        completion_only=getattr(options, "loss_on", "response") == "response",
        response_room=room,
        after_split=after,
        fingerprints=False,
    )


def _reader(card: Card, config: Any, text: Text) -> Callable[[Iterable[Group]], list[Group]]:
    """What the method makes of the rows."""
    if card.name == "process-reward":
        options = config.process_reward
        return functools.partial(
            as_steps,
            tokenizer=text.tokenizer,
            separator=options.separator,
            last_only=options.steps == "last",
        )
    if card.name == "reward":
        names = names_of(config.reward_model)
        return functools.partial(as_rated, attributes=names) if names else as_comparisons
    if card.name in ("sft", "spin"):
        return as_demonstrations
    if card.rollouts:
        return as_prompts
    if getattr(getattr(config, card.section), "pairs_from", "") == "labels":
        return pairs_or_labels
    readers = {"kto": as_labelled, "rank": as_comparisons, "mixed": by_feedback}
    return readers.get(card.name, as_pairs)
