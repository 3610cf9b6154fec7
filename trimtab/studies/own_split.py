"""The user's feedback, split by prompt into held-out / judge / methods, and written as files of our own.

Which part a prompt goes to depends on the seed and its text alone. Within a part the rows have a fixed random
order, and a plan that affords n rows takes the first n that fit the lengths.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.batch import Layout
from trimtab.data.collate import group_tokens
from trimtab.data.convert import as_comparisons
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig, split_by_prompt
from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text, stable_hash
from trimtab.studies.plan import FEWEST_PROMPTS, shape_of
from trimtab.studies.recipes import Shape

SAMPLE = 256
"""Rows of the methods' part whose lengths are measured before the plan is made."""
PERCENTILE = 0.95

PARTS = ("heldout", "judge", "methods")


class OwnData:
    """The three parts, their rows tokenised only as far as they are used."""

    def __init__(self, parts: dict[str, list[Group]], tokenizer: Any, max_tokens: int) -> None:
        self.parts, self.tokenizer, self.max_tokens = parts, tokenizer, max_tokens
        self.new = 0
        """Longest response that is sampled; a prompt leaves room for it."""
        self.sample: list[Group] = []
        """Tokenised rows of the methods' part."""
        self.share = 1.0
        """Of the rows looked at, those that fit."""
        self.lines: list[str] = []
        self._tokenised: dict[int, Group | None] = {}

    def settle(self, max_new_tokens: int) -> None:
        """Fix the longest response from a sample of the methods' part, unless it is given."""
        looked = [self._tokens(group) for group in self.parts["methods"][:SAMPLE]]
        held = [group for group in looked if group is not None]
        if not held:
            raise InputError(
                f"none of the first {len(looked)} rows fits {self.max_tokens:,} tokens; raise max_tokens"
            )
        lengths = sorted(len(r.tokens or ()) for group in held for r in group.responses)
        taken = lengths[min(len(lengths) - 1, math.ceil(PERCENTILE * len(lengths)) - 1)]
        # A prompt needs room beside its answer.
        self.new = max_new_tokens or max(1, min(taken, self.max_tokens // 2))
        if self.new >= self.max_tokens:
            raise InputError(
                f"max_new_tokens: {self.new:,} leaves no room for a prompt in {self.max_tokens:,} tokens"
            )
        self.sample = [group for group in held if self._fits(group)]
        if not self.sample:
            raise InputError(
                f"no prompt of the first {len(looked)} rows leaves room for {self.new:,} new tokens in "
                f"{self.max_tokens:,}; lower max_new_tokens or raise max_tokens"
            )
        self.share = len(self.sample) / len(looked)

    @property
    def shape(self) -> Shape:
        """Mean token counts of the sample."""
        return shape_of(self.sample, self.new)

    def expected(self, part: str) -> int:
        """Rows of a part that can be used, as the sample has it; at least one."""
        return max(1, math.floor(self.share * len(self.parts[part])))

    def expected_prompts(self, part: str) -> int:
        """Prompts of a part that can be used."""
        return max(1, math.floor(self.share * len({prompt_text(g.prompt) for g in self.parts[part]})))

    def take(self, part: str, count: int) -> list[Group]:
        """The part's first rows that fit, up to ``count``, tokenised."""
        kept = list(islice(self._fitting(part), count))
        if not kept:
            raise InputError(f"no row of the part {part!r} fits {self.max_tokens:,} tokens; raise max_tokens")
        return kept

    def longest(self, layout: Layout) -> int:
        """Tokens of the largest row that was looked at."""
        used = [group for group in self._tokenised.values() if group is not None]
        return max(group_tokens(group, layout) for group in used)

    def write(
        self, folder: Path, *, methods: int, judge: int, heldout: int, prompts: int
    ) -> tuple[int, int, int, int]:
        """The parts as JSON lines, so many rows of each; the numbers of rows written, in the same order."""
        rows = {
            name: self.take(name, count)
            for name, count in (("methods", methods), ("judge", judge), ("heldout", heldout))
        }
        # The rows of a file have the same columns, or it cannot be read again.
        weighted = any(group.weight != 1.0 for groups in rows.values() for group in groups)
        distinct: dict[str, Group] = {}
        for group in self._fitting("heldout"):
            distinct.setdefault(prompt_text(group.prompt), group)
            if len(distinct) == prompts:
                break
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, groups in rows.items():
                _write_rows(folder / f"{name}.jsonl", [to_row(group, weighted) for group in groups])
            asked = [{**group.columns, "prompt": group.prompt} for group in distinct.values()]
            _write_rows(folder / "prompts.jsonl", asked)
        except OSError as error:
            raise InputError(f"{folder}: cannot write there: {error.strerror}") from None
        return len(rows["methods"]), len(rows["judge"]), len(rows["heldout"]), len(distinct)

    def _fitting(self, part: str) -> Iterator[Group]:
        for group in self.parts[part]:
            ready = self._tokens(group)
            if ready is not None and self._fits(ready):
                yield ready

    def _tokens(self, group: Group) -> Group | None:
        """The tokenised row, or None for one that is longer than ``max_tokens``."""
        if id(group) not in self._tokenised:
            [ready], _ = tokenise([group], self.tokenizer)
            longest = len(ready.prompt_tokens or ()) + max(len(r.tokens or ()) for r in ready.responses)
            self._tokenised[id(group)] = ready if longest <= self.max_tokens else None
        return self._tokenised[id(group)]

    def _fits(self, group: Group) -> bool:
        return len(group.prompt_tokens or ()) + self.new <= self.max_tokens


def read_own_data(
    source: SourceConfig,
    tokenizer: Any,
    *,
    heldout_share: float,
    judge_share: float,
    max_tokens: int,
    max_new_tokens: int,
    seed: int,
) -> OwnData:
    """Read any feedback, keep what compares something, split it by prompt.

    Raises InputError for feedback without comparisons, and for too few prompts, saying how many are needed.
    """
    read, report = source.read()
    compared = as_comparisons(read)
    # Without a prompt there is nothing to answer, and nothing to split by.
    kept = [group for group in compared if prompt_text(group.prompt).strip()]
    if not kept:
        raise InputError(
            f"{source.path}: none of its {len(read):,} rows compares responses to a prompt; give pairs "
            "(chosen, rejected), rankings or ratings"
        )
    shares = {
        "heldout": heldout_share,
        "judge": judge_share,
        "methods": 1 - heldout_share - judge_share,
    }
    prompts = len({prompt_text(group.prompt) for group in kept})
    needed = math.ceil(FEWEST_PROMPTS / min(shares.values()) - 1e-9)
    if prompts < needed:
        raise InputError(
            f"{source.path}: {needed:,} prompts are needed, for {FEWEST_PROMPTS} in the smallest of the "
            f"three parts (held out, judge, methods); there are {prompts:,} in {len(kept):,} comparisons"
        )
    parts = split_parts(kept, heldout_share, judge_share, seed)
    data = OwnData(parts, tokenizer, max_tokens)
    counts = {name: len({prompt_text(g.prompt) for g in parts[name]}) for name in PARTS}
    for name, count in counts.items():
        if count < FEWEST_PROMPTS // 2:
            raise InputError(
                f"{source.path}: with seed {seed} the part {name!r} has only {count} of the {prompts:,} "
                "prompts; give more data, or another seed"
            )
    data.settle(max_new_tokens)
    nothing, long = len(read) - len(kept), 100 * (1 - data.share)
    data.lines = [
        f"data: {report}; {len(kept):,} compare responses, to {prompts:,} prompts"
        + (f"; {nothing:,} compare nothing" if nothing else "")
        + (f"; about {long:.0f} % are left out, longer than {max_tokens:,} tokens" if long else ""),
        "split by prompt, so that no prompt is in two parts: "
        f"{counts['heldout']:,} held out for evaluation, {counts['judge']:,} for the judge alone, "
        f"{counts['methods']:,} for the methods and their learned reward",
    ]
    return data


def split_parts(
    groups: Sequence[Group], heldout_share: float, judge_share: float, seed: int
) -> dict[str, list[Group]]:
    """Held out, judge and methods, no prompt in two of them, each in a fixed random order."""
    rest, heldout = split_by_prompt(groups, heldout_share, seed)
    # Another seed: under the same one the rest are exactly the prompts whose place is not the lowest.
    methods, judge = split_by_prompt(rest, judge_share / (1 - heldout_share), stable_hash("judge", seed))
    parts = {"heldout": heldout, "judge": judge, "methods": methods}
    return {
        name: sorted(part, key=lambda group: stable_hash("order", seed, group.id))
        for name, part in parts.items()
    }


def to_row(group: Group, weighted: bool = True) -> dict[str, Any]:
    """A comparison in our own format: a pair, or responses with their ranks; with its weight if asked."""
    row: dict[str, Any] = {**group.columns, "prompt": group.prompt}
    if any(response.preferred for response in group.responses):
        row |= {"chosen": group.chosen.text, "rejected": group.rejected.text}
    else:
        row |= {"responses": [r.text for r in group.responses], "ranks": [r.rank for r in group.responses]}
    if weighted:
        row["group_weight"] = group.weight
    return row


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
