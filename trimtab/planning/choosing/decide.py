"""From what a user has to a method: by stated rules, with reasons, a runner-up and what was ruled out.

``decide`` is a pure function of a :class:`Situation` and of what fits into the memory: no file is read, no
weight is loaded. The rules stand in ``rules.py``, the values and their sources in
``sources.py``, the recipe in ``recipe.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import InputError
from trimtab.planning.choosing.needs import (
    NEEDS,
    OFFLINE,
    ONLINE,
    ORDER,
    REWARDS,
    kinds_of,
    learns_a_reward,
    preferences,
)
from trimtab.planning.choosing.refuse import check, nothing_left
from trimtab.planning.choosing.rules import LONGER, PPO_MEMORY, RULES
from trimtab.planning.choosing.situation import HELD_OUT, SHOWN_ACCURACY, TOO_FEW, Situation
from trimtab.planning.choosing.sources import Hyper, hypers
from trimtab.planning.choosing.words import DISAGREEMENTS, against, prefer


@dataclass(frozen=True, slots=True)
class Reason:
    """A rule that applied to a method."""

    rule: str
    points: int
    because: str
    source: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What is recommended, and why."""

    situation: Situation
    method: str
    stages: tuple[str, ...]
    """What is run in order, the method last."""
    points: Mapping[str, int]
    """Of every method that is not ruled out, most first."""
    reasons: tuple[Reason, ...]
    against: tuple[str, ...]
    runner_up: str | None
    prefer: str
    """When to prefer the runner-up; or, without one, what would make another method possible."""
    runner_up_reasons: tuple[Reason, ...]
    ruled_out: Mapping[str, str]
    disagreements: tuple[str, ...]
    notes: tuple[str, ...]
    hypers: Mapping[str, tuple[Hyper, ...]]
    """Stage → the values to begin with."""

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "method": self.method,
            "stages": list(self.stages),
            "points": dict(self.points),
            "reasons": [_reason(r) for r in self.reasons],
            "against": list(self.against),
            "runner_up": self.runner_up,
            "prefer_runner_up": self.prefer,
            "runner_up_reasons": [_reason(r) for r in self.runner_up_reasons],
            "ruled_out": dict(self.ruled_out),
            "sources_disagree": list(self.disagreements),
            "notes": list(self.notes),
            "values": {
                stage: [{"key": h.key, "value": h.value, "source": h.source} for h in values]
                for stage, values in self.hypers.items()
            },
        }


def _reason(reason: Reason) -> dict[str, Any]:
    names = ("rule", "points", "because", "source")
    return {name: getattr(reason, name) for name in names}


def decide(s: Situation, fits: Mapping[str, bool | None] | None = None) -> Choice:
    """The method for a situation. ``fits``: whether a method's whole run fits into the memory, where known.

    Raises InputError where nothing is given, where options contradict each other, and where no method can
    learn from what there is; each time it says what is missing.
    """
    check(s)
    ruled_out = _ruled_out(s)
    scored: dict[str, list[Reason]] = {
        name: _reasons(name, s, fits or {}) for name in ORDER if name not in ruled_out
    }
    points = {name: sum(r.points for r in reasons) for name, reasons in scored.items()}
    ranked = sorted(points, key=lambda name: (-points[name], ORDER.index(name)))
    if not ranked:
        raise InputError(nothing_left(s, ruled_out))
    method, runner_up = ranked[0], next(iter(_others(ranked, scored)), None)
    stages = _stages(method, s)
    return Choice(
        situation=s,
        method=method,
        stages=stages,
        points={name: points[name] for name in ranked},
        reasons=_heaviest(scored[method]),
        against=against(method, s),
        runner_up=runner_up,
        prefer=prefer(method, runner_up, s),
        runner_up_reasons=() if runner_up is None else _heaviest(scored[runner_up]),
        ruled_out=ruled_out,
        disagreements=tuple(text for when, text in DISAGREEMENTS if when(method, s)),
        notes=_notes(method, s),
        hypers={stage: hypers(stage, method, s) for stage in stages},
    )


def _others(ranked: list[str], scored: Mapping[str, list[Reason]]) -> list[str]:
    """What could be the runner-up: whatever has something that speaks for it."""
    return [name for name in ranked[1:] if any(r.points > 0 for r in scored[name])]


def _heaviest(reasons: list[Reason]) -> tuple[Reason, ...]:
    return tuple(sorted(reasons, key=lambda r: -abs(r.points)))


def _ruled_out(s: Situation) -> dict[str, str]:
    """Method → why, by the first need that is not met."""
    out: dict[str, str] = {}
    for need in NEEDS:
        for name in need.methods:
            if name not in out and not need.met(s):
                out[name] = need.without(s)
    return {name: out[name] for name in ORDER if name in out}


def _reasons(method: str, s: Situation, fits: Mapping[str, bool | None]) -> list[Reason]:
    found = [
        Reason(rule.name, rule.points[method], rule.because(s), rule.source)
        for rule in RULES
        if rule.points.get(method) and rule.when(s)
    ]
    if method == "ppo" and fits.get("ppo") is False and any(fits.get(n) for n in ("rloo", "grpo")):
        because = "its critic and models do not fit into the memory, and those of RLOO or GRPO do"
        found.append(Reason("memory", PPO_MEMORY, because, "trimtab plan"))
    return found


def _stages(method: str, s: Situation) -> tuple[str, ...]:
    """SFT where the model has had none, a reward model where nothing scores, the method, and what uses it."""
    before: list[str] = []
    if s.tuned == "no" and s.imitable and method not in ("sft", "orpo", *REWARDS):
        before.append("sft")
    if method in ONLINE and (reward := learns_a_reward(s)):
        before.append(reward)
    return (*before, method)


def _notes(method: str, s: Situation) -> tuple[str, ...]:
    """What a reader should know whatever the method."""
    notes: list[str] = []
    found = max(s.comparisons, s.both_thumbs)
    if found and not preferences(s) and method not in ("mixed", *REWARDS):
        notes.append(
            f"{found:,} comparisons are too few to learn preferences from: to tell an accuracy of "
            f"{100 * SHOWN_ACCURACY:.0f} % from a coin takes {HELD_OUT} held-out comparisons (95 % level, "
            "80 % power), "
            f"so collect {TOO_FEW} at least; hold them out, or let a judge label more (trimtab label)"
        )
    if method == "mixed" and len(kinds_of(s)) > 1:
        notes.append("the sources' weights, not their rows, decide what is drawn: see data.sources.weight")
    if method in OFFLINE and s.exploration == "unknown" and not s.scorer:
        notes.append(
            f"{method} stays within what the answers in the data show; if better ones have to be found, say "
            "--exploration yes"
        )
    if method in ONLINE and s.tuned == "no" and not s.imitable:
        notes.append(
            "the model has had no SFT and there is nothing to imitate: it must get some answers "
            "right by itself "
            "(groups_without_contrast below 1), or nothing is learned"
        )
    if method in ("dpo", "ipo", "rank") and ((s.longer or 0) >= LONGER or s.keep_short == "yes"):
        notes.append(
            f"against length there is {method}.logps = mean, which divides by each answer's tokens "
            f"(docs/methods/{method}.md); {method}.beta is then of a token's mean, and wants to be larger "
            "(SimPO, on such means, takes 2)"
        )
    return tuple(notes)
