"""From text to a score: named reward terms, and their weighted sum.

A reward function is any Python callable ``function(prompt, response, **columns) -> float``: the prompt
and the response as text, and the row's other columns by name. A mixture adds several:
reward = Σ weight × term. Each term is kept beside the sum, unweighted, so that a curve can show which
of them moved.

A reward that fails in silence trains a model on noise, so a term that raises, or returns something
that is not a finite number, stops the run and names the term and the row, unless the configuration
says to skip.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trimtab.errors import InputError
from trimtab.groups import Group, Text, prompt_text

RewardFunction = Callable[..., Any]
"""``function(prompt: str, response: str, **columns) -> float``; True and False count as 1 and 0."""

OnError = Literal["error", "skip"]


class RewardTermConfig(BaseModel):
    """One term of the mixture, as written in a configuration file.

    >>> RewardTermConfig(name="format", weight=0.2, args={"pattern": "#### -?[0-9]"})
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """A built-in (exact_match, numeric, math, format, length), ``package.module:function``, or
    ``path/to/file.py:function``."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Multiplies the term in the sum. 0 records the term without rewarding it."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Parameters for the function, passed by name."""
    label: str | None = Field(default=None, min_length=1)
    """What the term is called in metrics; by default the function's name."""


class RewardConfig(BaseModel):
    """The reward of a run: its terms, and what happens to a response that a term cannot score."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    terms: list[RewardTermConfig] = Field(min_length=1)
    """The terms that are added up."""
    on_error: OnError = "error"
    """error: stop, naming the term and the row. skip: the response has no reward and is counted."""


@dataclass(slots=True, frozen=True)
class RewardTerm:
    """A named, weighted reward function.

    >>> RewardTerm("short", -0.01, lambda prompt, response, **columns: len(response.split()))
    """

    name: str
    """The key in ``Response.reward_terms``."""
    weight: float
    function: RewardFunction


@dataclass(slots=True)
class RewardReport:
    """What one call of :meth:`Mixture.score` did."""

    scored: int = 0
    """Responses that have a reward."""
    skipped: int = 0
    """Responses without one, because a term failed and ``on_error`` is "skip"."""
    failures: dict[str, int] = field(default_factory=dict)
    """Failures by term. A response counts once, under the first term that failed."""
    skipped_groups: list[str] = field(default_factory=list)
    """Ids of the groups with at least one skipped response: what a caller drops."""
    first_error: str | None = None
    """The first failure in words, for the log."""


class Mixture:
    """A weighted sum of reward terms.

    >>> mixture = Mixture([RewardTerm("right", 1.0, exact), RewardTerm("form", 0.2, well_formed)])
    >>> mixture.score(groups)  # right 1.0, form 0.5
    >>> groups[0].responses[0].reward, groups[0].responses[0].reward_terms
    (1.1, {"right": 1.0, "form": 0.5})
    """

    def __init__(self, terms: list[RewardTerm], on_error: OnError = "error") -> None:
        """Raises InputError for no terms, two terms of one name, or a weight that is not finite."""
        if not terms:
            raise InputError("reward: needs at least one term")
        names = [term.name for term in terms]
        for term in terms:
            if names.count(term.name) > 1:
                raise InputError(f"reward: two terms are called {term.name!r}: give each a label of its own")
            if not math.isfinite(term.weight):
                raise InputError(f"reward {term.name!r}: the weight must be finite, got {term.weight}")
        self.terms = terms
        self.on_error = on_error
        self._accepted = {term.name: _accepted_names(term.function) for term in terms}

    def score(self, groups: list[Group]) -> RewardReport:
        """Fills ``reward`` and ``reward_terms`` of every response, in place.

        Raises InputError, naming the term and the group's id, for a function that raises or returns
        something other than a finite number. With ``on_error="skip"`` such a response gets reward None
        and no terms, and the report counts it; a group with one is best dropped whole, since advantages
        within it would rest on a part of its responses.
        """
        report = RewardReport()
        for group in groups:
            prompt = prompt_text(group.prompt)
            skipped_before = report.skipped
            for response in group.responses:
                response.reward, response.reward_terms = None, {}
                values: dict[str, float] = {}
                for term in self.terms:
                    try:
                        values[term.name] = self._value(term, group, prompt, response_text(response.text))
                    except _TermFailed as failure:
                        if self.on_error == "error":
                            raise InputError(str(failure)) from failure.__cause__
                        report.failures[term.name] = report.failures.get(term.name, 0) + 1
                        report.first_error = report.first_error or str(failure)
                        report.skipped += 1
                        break
                else:
                    response.reward_terms = values
                    response.reward = sum(term.weight * values[term.name] for term in self.terms)
                    report.scored += 1
            if report.skipped > skipped_before:
                report.skipped_groups.append(group.id)
        return report

    def _value(self, term: RewardTerm, group: Group, prompt: str, response: str) -> float:
        """One term of one response; every way of failing becomes a :class:`_TermFailed`."""
        where = f"reward {term.name!r} on {group.id}"
        reserved = [name for name in ("prompt", "response") if name in group.columns]
        if reserved:
            raise _TermFailed(
                f"{where}: the row has a column {reserved[0]!r}, a name that is taken: rename it"
            )
        accepted = self._accepted[term.name]
        columns = {k: v for k, v in group.columns.items() if accepted is None or k in accepted}
        try:
            value = term.function(prompt=prompt, response=response, **columns)
            # numpy's bool and the zero-dimensional arrays of any library are no numbers to Python.
            value = value.item() if hasattr(value, "item") else value
        except Exception as error:
            raise _TermFailed(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(value, Real):
            raise _TermFailed(f"{where}: returned {_shown(value)}, not a number: return a float")
        if not math.isfinite(value):
            raise _TermFailed(f"{where}: returned {float(value)}: return a finite number")
        return float(value)


class _TermFailed(Exception):
    """A term could not score a response; the message says which, where and why."""


def response_text(text: Text) -> str:
    """The response as one string: of a conversation, the assistant's turns, one a line."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(m.get("content")) for m in text if m.get("role") == "assistant")


def _content(content: object) -> str:
    """A turn's text, whether it is a string, a list of typed parts, or missing (a bare tool call)."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _accepted_names(function: RewardFunction) -> frozenset[str] | None:
    """The keyword names that a function takes; None = any (it has ``**columns``, or hides its signature)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
