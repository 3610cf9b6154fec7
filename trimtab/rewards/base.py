"""From text to a score: named reward terms, and their weighted sum.

A reward function is any Python callable ``function(prompt, response, **columns) -> float``: the prompt
and the response as text, and the row's other columns by name. A scorer (a reward model, a judge) sees
whole groups at once. A mixture adds several: reward = Σ weight × term. Each term is kept beside the sum,
unweighted, so that a curve can show which of them moved.

A reward that fails in silence trains a model on noise, so a term that raises, or returns something
that is not a finite number, stops the run and names the term and the row, unless the configuration
says to skip.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.errors import InputError
from trimtab.groups import Group, Text, prompt_text
from trimtab.rewards.step_rewards import check_steps, fill_steps

if TYPE_CHECKING:
    from trimtab.rewards.pool import Pool, Row

RewardFunction = Callable[..., Any]
"""``function(prompt: str, response: str, **columns) -> float``; True and False count as 1 and 0."""

OnError = Literal["error", "skip"]

SKIP_HINT = 'set reward.on_error = "skip" to leave such responses out'

Scored = dict[str, float] | str
"""What a scorer says of one response: its outputs by name, or why there are none."""


@runtime_checkable
class Scorer(Protocol):
    """A reward term that sees whole groups, all of a rollout at once, so that it can batch and compare.

    It reads text (``group.prompt``, ``response.text``) and changes nothing in the groups.
    """

    outputs: dict[str, float]
    """Output name → weight inside the term; ``{"": 1.0}`` for a single output without a name."""
    notes: list[str]
    """Lines to say once, before the run starts."""

    def score(self, groups: list[Group]) -> list[list[Scored]]:
        """Per group and response the value of every output, or why there is none (abstained, timed out)."""
        ...

    def facts(self) -> dict[str, float]:
        """Running counts for the log, since the scorer was made."""
        ...


class RewardTermConfig(BaseModel):
    """One term of the mixture, as written in a configuration file.

    >>> RewardTermConfig(name="format", weight=0.2, args={"pattern": "#### -?[0-9]"})
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """A built-in (exact_match, numeric, math, format, length, repetition, json_schema, tool_call,
    rouge, reward_model, process_reward_model, steps, judge, code), ``package.module:function``, or
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
    workers: int = Field(default=0, ge=0)
    """Processes on a machine that run slow reward functions while more is sampled; 0 takes the run's own."""
    timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds for a response, after which a worker is ended and the term has failed on it."""

    @model_validator(mode="after")
    def _workers(self) -> RewardConfig:
        if not self.workers and self.timeout_s != 120.0:
            raise ValueError("reward.timeout_s has no effect with reward.workers = 0")
        return self


@dataclass(slots=True, frozen=True)
class RewardTerm:
    """A named, weighted reward function or scorer.

    >>> RewardTerm("short", -0.01, lambda prompt, response, **columns: len(response.split()))
    """

    name: str
    """The key in ``Response.reward_terms``; a scorer's named outputs are filed under "name/output"."""
    weight: float
    function: RewardFunction | Scorer

    @property
    def weights(self) -> dict[str, float]:
        """Key in ``Response.reward_terms`` → weight in the sum."""
        if not isinstance(self.function, Scorer):
            return {self.name: self.weight}
        outputs = self.function.outputs
        return {f"{self.name}/{key}" if key else self.name: self.weight * w for key, w in outputs.items()}


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
    facts: dict[str, float] = field(default_factory=dict)
    """The scorers' running counts; what two scorers both count is added."""


class Mixture:
    """A weighted sum of reward terms.

    >>> mixture = Mixture([RewardTerm("right", 1.0, exact), RewardTerm("form", 0.2, well_formed)])
    >>> mixture.score(groups)  # right 1.0, form 0.5
    >>> groups[0].responses[0].reward, groups[0].responses[0].reward_terms
    (1.1, {"right": 1.0, "form": 0.5})
    """

    def __init__(
        self,
        terms: list[RewardTerm],
        on_error: OnError = "error",
        make_pool: Callable[[], Pool] | None = None,
    ) -> None:
        """``make_pool`` starts the workers that functions run in between ``start`` and ``close``, if any.

        Raises InputError for no terms, two terms of one name, or a weight that is not finite.
        """
        if not terms:
            raise InputError("reward: needs at least one term")
        names = [key for term in terms for key in term.weights]
        for term in terms:
            if isinstance(term.function, Scorer) and not term.function.outputs:
                raise InputError(f"reward {term.name!r}: the scorer has no outputs: give it at least one")
            for key, weight in term.weights.items():
                if names.count(key) > 1:
                    raise InputError(f"reward: two terms are called {key!r}: give each a label of its own")
                if not math.isfinite(weight):
                    raise InputError(f"reward {key!r}: the weight must be finite, got {weight}")
        check_steps(terms)
        self.terms = terms
        self.on_error = on_error
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._begun: dict[int, tuple[Group, Future[dict[str, Row]]]] = {}
        """By identity, two groups of a rollout may have one id; held with the group, so that it stays its."""
        self._weights = {key: weight for term in terms for key, weight in term.weights.items()}
        self._accepted = {
            term.name: accepted_names(term.function)
            for term in terms
            if not isinstance(term.function, Scorer)
        }

    @property
    def notes(self) -> list[str]:
        """What the scorers have to say before the run starts."""
        return [line for scorer in self._scorers for line in scorer.notes]

    @property
    def models(self) -> int:
        """Models that the scorers hold in memory (their attribute ``models``, 0 without it)."""
        return sum(int(getattr(scorer, "models", 0)) for scorer in self._scorers)

    @property
    def _scorers(self) -> list[Scorer]:
        return [term.function for term in self.terms if isinstance(term.function, Scorer)]

    @property
    def spread(self) -> list[str]:
        """Terms whose model's weights are spread over processes: all of these then score together."""
        return [term.name for term in self.terms if getattr(term.function, "spread", False)]

    def start(self) -> None:
        """Start the workers, if the configuration has any. Raises InputError for what they cannot load."""
        if self._make_pool is not None and self._pool is None:
            self._pool = self._make_pool()

    def close(self) -> None:
        """End the workers, also from another thread than the one that waits for them; safe to repeat."""
        if self._pool is not None:
            self._pool.close()

    def submit(self, group: Group) -> None:
        """Let the workers, if there are any, begin on a finished group; :meth:`score` collects it."""
        if self._pool is not None and id(group) not in self._begun:
            self._begun[id(group)] = group, self._pool.submit(group)

    def score(self, groups: list[Group]) -> RewardReport:
        """Fills ``reward`` and ``reward_terms`` of every response, in place, and its steps' rewards.

        Functions are called response by response, then each scorer once on all groups. Where workers were
        started the functions are called there, and what was not submitted is submitted now; values, failures
        and their order are the same.

        Raises InputError, naming the term and the group's id, for a function that raises or returns
        something other than a finite number, and for a response that a scorer has no value for. With
        ``on_error="skip"`` such a response gets reward None and no terms, and the report counts it; a
        group with one is best dropped whole, since advantages within it would rest on a part of its
        responses. An InputError that a scorer raises (a wrong key, no such model) ends the run in any case,
        and so does whatever one raises whose model's weights are spread over processes.
        """
        report = RewardReport()
        if not groups:  # this process has none; a model whose weights are spread needs it all the same
            for scorer in self._scorers:
                if getattr(scorer, "spread", False):
                    scorer.score([])
            report.facts = self.facts()
            return report
        for group in groups:
            self.submit(group)
        try:
            # Functions first: one that fails has then cost no judge's call.
            found = {
                term.name: self._call(term, groups)
                for term in sorted(self.terms, key=lambda term: isinstance(term.function, Scorer))
            }
        finally:
            self._begun.clear()
        for g, group in enumerate(groups):
            skipped_before = report.skipped
            for r, response in enumerate(group.responses):
                response.reward, response.reward_terms = None, {}
                values: dict[str, float] = {}
                for term in self.terms:
                    scored = found[term.name][g][r]
                    if isinstance(scored, _TermFailed):
                        report.failures[term.name] = report.failures.get(term.name, 0) + 1
                        report.first_error = report.first_error or str(scored)
                        report.skipped += 1
                        break
                    values |= scored
                else:
                    response.reward_terms = values
                    response.reward = sum(weight * values[key] for key, weight in self._weights.items())
                    report.scored += 1
            if report.skipped > skipped_before:
                report.skipped_groups.append(group.id)
        fill_steps(self.terms, groups)
        report.facts = self.facts()
        return report

    def facts(self) -> dict[str, float]:
        """The scorers' running counts; what two scorers both count is added."""
        facts: dict[str, float] = {}
        for scorer in self._scorers:
            for name, value in scorer.facts().items():
                facts[name] = facts.get(name, 0.0) + value
        return facts

    def _call(self, term: RewardTerm, groups: list[Group]) -> list[list[dict[str, float] | _TermFailed]]:
        """One term on everything; a failure stands in its place, or ends the run."""
        if isinstance(term.function, Scorer):
            return self._call_scorer(term, term.function, groups)
        out: list[list[dict[str, float] | _TermFailed]] = []
        for group in groups:
            row: list[dict[str, float] | _TermFailed] = []
            for get_value in self._values(term, group):
                try:
                    row.append({term.name: get_value()})
                except NoValue as error:
                    failure = _TermFailed(f"reward {term.name!r} on {group.id}: {error}")
                    if self.on_error == "error":
                        raise InputError(str(failure)) from error.__cause__
                    row.append(failure)
            out.append(row)
        return out

    def _values(self, term: RewardTerm, group: Group) -> Iterator[Callable[[], float]]:
        """For each response what gives the function's value or raises NoValue: a call, a worker's answer."""
        if id(group) in self._begun:
            _, future = self._begun[id(group)]
            yield from (partial(_received, value) for value in future.result()[term.name])
            return
        assert not isinstance(term.function, Scorer)
        accepted, prompt = self._accepted[term.name], prompt_text(group.prompt)
        for response in group.responses:
            text = response_text(response.text)
            yield partial(function_value, term.function, accepted, group, prompt, text)

    def _call_scorer(
        self, term: RewardTerm, scorer: Scorer, groups: list[Group]
    ) -> list[list[dict[str, float] | _TermFailed]]:
        try:
            rows = scorer.score(groups)
        except InputError:
            raise
        except Exception as error:
            if getattr(scorer, "spread", False):
                raise  # maybe from the middle of a pass of all processes, who then cannot be told
            failure = f"reward {term.name!r}: {type(error).__name__}: {error}"
            if self.on_error == "error":
                raise InputError(failure) from error
            return [[_TermFailed(failure) for _ in group.responses] for group in groups]
        if [len(row) for row in rows] != [len(group.responses) for group in groups]:
            raise InputError(
                f"reward {term.name!r}: the scorer must give one entry per group and response, "
                f"{len(groups)} groups of {_shown([len(g.responses) for g in groups])} responses; "
                f"it gave {_shown([len(row) for row in rows])}"
            )
        out: list[list[dict[str, float] | _TermFailed]] = []
        for group, row in zip(groups, rows, strict=True):
            checked = [_outputs(term.name, scorer, scored) for scored in row]
            out.append([])
            for value in checked:
                if isinstance(value, str):
                    failure = f"reward {term.name!r} on {group.id}: {value}"
                    if self.on_error == "error":
                        raise InputError(f"{failure}; {SKIP_HINT}")
                    out[-1].append(_TermFailed(failure))
                else:
                    out[-1].append(value)
        return out


def function_value(
    function: RewardFunction, accepted: frozenset[str] | None, group: Group, prompt: str, response: str
) -> float:
    """A reward function's value for one response; every way of failing becomes a :class:`NoValue`.

    ``accepted`` is what :func:`accepted_names` found for the function.
    """
    reserved = [name for name in ("prompt", "response") if name in group.columns]
    if reserved:
        raise NoValue(f"the row has a column {reserved[0]!r}, a name that is taken: rename it")
    columns = {k: v for k, v in group.columns.items() if accepted is None or k in accepted}
    try:
        value = function(prompt=prompt, response=response, **columns)
        # numpy's bool and the zero-dimensional arrays of any library are no numbers to Python.
        value = value.item() if hasattr(value, "item") else value
    except Exception as error:
        raise NoValue(f"{type(error).__name__}: {error}") from error
    return _finite(value)


class NoValue(Exception):
    """A reward function has no value for a response; the message says why."""


def _received(value: float | str) -> float:
    """A worker's answer for one response."""
    if isinstance(value, str):
        raise NoValue(value)
    return value


class _TermFailed(str):
    """Why a term could not score a response: which, where and why."""

    __slots__ = ()


def _finite(value: object) -> float:
    if not isinstance(value, Real):
        raise NoValue(f"returned {_shown(value)}, not a number: return a float")
    if not math.isfinite(value):
        raise NoValue(f"returned {float(value)}: return a finite number")
    return float(value)


def _outputs(name: str, scorer: Scorer, scored: Scored) -> dict[str, float] | str:
    """A scorer's entry under the keys of ``Response.reward_terms``, or why there are none."""
    if isinstance(scored, str):
        return scored or "no reason given"
    try:
        return {f"{name}/{key}" if key else name: _finite(scored[key]) for key in scorer.outputs}
    except KeyError as missing:
        return f"the scorer gave no output {missing.args[0]!r}"
    except NoValue as error:
        return f"the scorer {error}"


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


def accepted_names(function: RewardFunction) -> frozenset[str] | None:
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
