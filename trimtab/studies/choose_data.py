"""What a file of feedback holds, for ``trimtab choose``: kinds, amounts, lengths, and signs of noise."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.convert import as_comparisons, as_pairs
from trimtab.data.readers import read_groups, read_rows
from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text
from trimtab.planning.choosing.recipe import Source
from trimtab.rewards.matching import TARGET_COLUMNS

MOST_ROWS = 200_000
"""Rows that are read of one source; what is measured on them holds for the rest."""
LEAST_REPEATS = 20
"""Judgements of one couple, two by two, from which noise is estimated."""
NOISY = 0.1
"""Share of wrong labels from which labels are called noisy; our judgement."""
NUMBER = re.compile(r"[-+$€£]?\d[\d,]*(\.\d+)?%?")
ANSWERS = TARGET_COLUMNS
"""Columns that a verifier reads, in its order."""
SOLUTIONS = ("canonical_solution", "code", "solution")
"""Columns of programs that pass the tests."""
PERCENTILE = 0.95
CHARACTERS_A_TOKEN = 3
"""English has about four; three leaves room."""


@dataclass
class Looked:
    """What one source, or several together, were found to hold."""

    rows: Counter[str] = field(default_factory=Counter)
    """By kind, and "ties" for rows that compare answers and order nothing."""
    sources: list[Source] = field(default_factory=list)
    prompts: int = 0
    """Different ones."""
    shared: int = 0
    """Prompts with two answers or more, in one row or in several."""
    ups: int = 0
    downs: int = 0
    longer: int = 0
    ordered: int = 0
    """Couples of answers with an order, of unequal length: in ``longer`` of them the better is the longer."""
    repeats: int = 0
    """Two judgements of the same couple (or of the same answer's thumb), counted two by two."""
    contradictions: int = 0
    """Of these, those that differ."""
    characters: list[int] = field(default_factory=list)
    """Of every answer."""
    prompt_characters: list[int] = field(default_factory=list)
    answers: int = 0
    """Rows with a column that a verifier could read."""
    numbers: int = 0
    """Of these, those whose answer is a number or ends in one."""
    tests: int = 0
    """Rows with unit tests."""
    names: list[str] = field(default_factory=list)
    """Columns of the first row of each source, as the file has them."""
    imitated: str = ""
    """One of them that holds answers which could be imitated."""
    skipped: int = 0
    truncated: bool = False
    """More rows than were read."""

    @property
    def all_rows(self) -> int:
        """Rows read, ties included."""
        return sum(self.rows.values())

    @property
    def flips(self) -> float | None:
        """Share of the labels that are wrong: two that err independently differ with chance 2ε(1 − ε)."""
        if self.repeats < LEAST_REPEATS:
            return None
        differ = self.contradictions / self.repeats
        return 0.5 if differ >= 0.5 else (1 - math.sqrt(1 - 2 * differ)) / 2

    @property
    def noisy(self) -> str:
        """yes, or unknown: judgements that agree may be copies of one row, and show nothing."""
        return "yes" if (self.flips or 0.0) > NOISY - 1e-9 else "unknown"

    @property
    def longer_share(self) -> float | None:
        """Of the ordered couples, those whose better answer is the longer; None for under 50 couples."""
        return self.longer / self.ordered if self.ordered >= 50 else None

    @property
    def tokens(self) -> int:
        """The 95th percentile of the answers, in tokens as guessed from characters; 0 without answers."""
        return _percentile(self.characters)

    @property
    def prompt_tokens(self) -> int:
        """The same of the prompts."""
        return _percentile(self.prompt_characters)

    def verifier(self) -> str:
        """The reward term that could check answers, by the rows' own columns; or nothing."""
        rows = self.all_rows
        if self.tests * 10 >= 9 * rows:
            return "code"
        if self.answers * 10 < 9 * rows:
            return ""
        return "numeric" if self.numbers * 10 >= 9 * self.answers else "exact_match"

    def lines(self) -> list[str]:
        """What was found, in a few lines."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.most_common())
        out = [f"read {self.all_rows:,} rows{' (the first)' if self.truncated else ''}: {kinds}"]
        out.append(f"{self.prompts:,} prompts, {_share(self.shared, self.prompts)} with several answers")
        if self.characters:
            mean = sum(self.characters) / len(self.characters)
            out.append(
                f"answers of {mean:,.0f} characters on average; 95 % within about {self.tokens:,} tokens"
            )
        if self.ups or self.downs:
            out.append(f"{self.ups:,} thumbs up, {self.downs:,} down")
        if self.ordered:
            out.append(f"the better answer is the longer one in {_share(self.longer, self.ordered)}")
        if self.repeats:
            told = "" if self.flips is None else f", as if {100 * self.flips:.0f} % of the labels were wrong"
            out.append(f"{self.contradictions:,} of {self.repeats:,} repeated judgements contradict{told}")
        if self.skipped:
            out.append(f"{self.skipped:,} malformed rows left out")
        return out

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "rows": dict(self.rows),
            "prompts": self.prompts,
            "prompts_with_several_answers": self.shared,
            "ups": self.ups,
            "downs": self.downs,
            "better_is_longer": self.longer_share,
            "repeated_judgements": self.repeats,
            "contradictions": self.contradictions,
            "wrong_labels": self.flips,
            "answer_tokens_p95": self.tokens,
            "skipped": self.skipped,
        }


def _share(part: int, whole: int) -> str:
    return f"{100 * (part / whole):.0f} %" if whole else "none"


def _percentile(characters: Sequence[int]) -> int:
    if not characters:
        return 0
    at = math.ceil(PERCENTILE * len(characters)) - 1
    return max(1, math.ceil(sorted(characters)[at] / CHARACTERS_A_TOKEN))


def look(paths: Iterable[str], columns: dict[str, str] | None = None) -> Looked:
    """Read the sources. Raises InputError as the reader does, and for sources without anything to use."""
    found = Looked()
    groups: list[Group] = []
    for path in paths:
        try:
            read, report = read_groups(path, columns=columns, limit=MOST_ROWS, on_bad_row="skip")
        except InputError as error:
            raise InputError(_unread(path, error)) from None
        names = _names(path)
        found.names += [name for name in names if name not in found.names]
        found.imitated = found.imitated or next((n for n in (*ANSWERS, *SOLUTIONS) if n in names), "")
        kinds = Counter(kind_of(group) for group in read)
        found.rows.update(kinds)
        skipped = sum(report.skipped.values())
        found.skipped += skipped
        found.truncated |= report.kept == MOST_ROWS
        kinds.pop("ties", None)
        if not kinds:
            raise InputError(f"{path}: all of its {len(read):,} rows are ties: they order nothing")
        main = kinds.most_common(1)[0][0]
        found.sources.append(Source(path, main, dict(columns or {}), skipped))
        groups += read
    _measure(found, groups)
    return found


def _names(path: str) -> list[str]:
    """Columns of the first row, under the file's own names."""
    return next((list(row) for _, row in read_rows(path)), [])


def _unread(path: str, error: InputError) -> str:
    """The reader's line; for rows of no known format, the columns that they have."""
    text = str(error)
    if not text.startswith("no row of"):
        return text
    names = _names(path)
    if not names:
        return text
    guess = next((name for name in ASKED if name in names), "YOURS")
    return (
        f"{path}: its columns are {', '.join(names)}, which by these names make no format: name "
        f"them with --columns YOURS=OURS, as --columns {guess}=prompt; see docs/data.md"
    )


ASKED = ("question", "Question", "problem", "instruction", "query", "input")
"""What others call a prompt."""


def kind_of(group: Group) -> str:
    """The kind of a row, as ``--have`` names it; "ties" for answers that are compared and not told apart."""
    responses = group.responses
    if not responses:
        return "prompts"
    if any(r.preferred is not None for r in responses):
        return "pairs"
    if any(r.step_labels for r in responses):
        return "steps"
    if any(r.label is not None for r in responses):
        return "thumbs"
    if all(r.rank is None and r.reward is None and not r.ratings for r in responses):
        return "demonstrations" if len(responses) == 1 else "prompts"
    if len(responses) == 1:
        return "scores"
    compared = as_comparisons([group])
    if not compared:
        return "ties"
    if len(compared[0].responses) == 2:
        return "pairs"
    return "rankings" if responses[0].rank is not None else "ratings"


def _measure(found: Looked, groups: Sequence[Group]) -> None:
    """Everything that is counted over all rows together."""
    asked: dict[str, set[str]] = {}
    votes: dict[tuple[str, str, str], list[int]] = {}
    thumbs: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        prompt = prompt_text(group.prompt)
        texts = [prompt_text(r.text) for r in group.responses]
        asked.setdefault(prompt, set()).update(texts)
        found.prompt_characters.append(len(prompt))
        found.characters += [len(text) for text in texts]
        _columns(found, group)
        for text, response in zip(texts, group.responses, strict=True):
            if response.label is not None:
                found.ups += bool(response.label)
                found.downs += not response.label
                thumbs.setdefault((prompt, text), [0, 0])[not response.label] += 1
        for better, worse in ordered(group):
            if len(better) != len(worse):
                found.ordered += 1
                found.longer += len(better) > len(worse)
            first, second = sorted((better, worse))
            votes.setdefault((prompt, first, second), [0, 0])[better != first] += 1
    found.prompts = len(asked)
    found.shared = sum(len(texts) > 1 for texts in asked.values())
    for one, other in (*votes.values(), *thumbs.values()):
        found.repeats += (one + other) * (one + other - 1) // 2
        found.contradictions += one * other


def ordered(group: Group) -> list[tuple[str, str]]:
    """(better, worse) of every two answers that are told apart."""
    pairs = (pair.responses for pair in as_pairs([group]))
    return [(prompt_text(better.text), prompt_text(worse.text)) for better, worse in pairs]


def _columns(found: Looked, group: Group) -> None:
    columns = group.columns
    own = any(columns.get(name) not in (None, "", []) for name in ("tests", "test_list"))
    found.tests += own or bool(columns.get("test") and columns.get("entry_point"))
    for name in ANSWERS:
        if columns.get(name) not in (None, ""):
            found.answers += 1
            last = str(columns[name]).rsplit("####", 1)[-1].strip()
            found.numbers += bool(NUMBER.fullmatch(last))
            return
