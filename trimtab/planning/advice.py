"""What to change in a run that does not fit, in the order of least harm to its result. No torch.

A lever is one option with values from mild to strong; each is tried by planning again. First come those
that leave the result as it is, then those that only round otherwise or leave a figure of the log out, last
those that change what is learned or what it costs. Of each kind one lever alone is tried before two
together, and what turns out not to be needed is left out again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel

from trimtab.config import dump_toml, load_config, toml_value
from trimtab.errors import InputError
from trimtab.planning.levers import LEVERS, Effect, Lever
from trimtab.planning.look import size
from trimtab.planning.result import Phase, Plan

GIB = 2**30
Replan = Callable[[dict[str, Any]], Plan]
"""The plan with these options (dotted key → value) on top; raises InputError for what may not be."""
C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Change:
    """Options to add, and what they do."""

    options: dict[str, Any]
    """Dotted key → value."""
    saves: float
    """Bytes that it takes off the phase named, the changes before it being made."""
    phase: str
    effect: Effect
    """same: the same result; rounding: the same within rounding; log: a figure of the log less; another."""
    why: str

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "options": self.options,
            "saves_bytes": round(self.saves),
            "phase": self.phase,
            "result": self.effect,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class Advice:
    """What to change, and the plan with all of it."""

    changes: tuple[Change, ...]
    """The mildest first."""
    plan: Plan
    fits: bool
    """With all the changes; else the plan is the smallest that was found."""
    otherwise: str = ""
    """Where nothing fits: what would."""

    @property
    def overrides(self) -> dict[str, Any]:
        """All options to add, dotted key → value."""
        return {key: value for change in self.changes for key, value in change.options.items()}

    def options(self, prefix: str = "") -> str:
        """As they are typed: ``--train.micro_batch_tokens 1024``. ``prefix``: of a study's stage."""
        dot = f"{prefix}." if prefix else ""
        return " ".join(f"--{dot}{key} {_typed(value)}" for key, value in self.overrides.items())

    def toml(self) -> str:
        """The same as sections of a configuration file."""
        sections: dict[str, list[str]] = {}
        for key, value in self.overrides.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name} = {toml_value(value)}")
        parts = ["\n".join([*([f"[{name}]"] if name else []), *lines]) for name, lines in sections.items()]
        return "\n\n".join(parts) + ("\n" if parts else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "fits": self.fits,
            "peak_bytes": round(self.plan.memory.peak),
            "changes": [change.to_dict() for change in self.changes],
            "options": self.options(),
            "toml": self.toml(),
            "otherwise": self.otherwise,
        }


def advise(replan: Replan, given: Mapping[str, Any], available: float) -> Advice:
    """The smallest and mildest set of changes with which every phase fits ``available`` bytes.

    ``given``: the options in effect, dotted key → value, of a run's configuration (``train.lr``) or of
    ``trimtab plan`` without one (``micro_batch_tokens``); an option that is not there is not advised. Raises
    InputError where the run cannot be planned as it is.
    """
    search = _Search(replan, given, available)
    chosen: dict[Lever, dict[str, Any]] = {}
    for kinds in (("same", "rounding", "log"), ("another",)):
        levers = [lever for lever in LEVERS if lever.effect in kinds]
        if search.widen(chosen, levers):
            search.narrow(chosen)
            break
    changes, plan = search.explained(chosen)
    fits = search.fits(plan)
    return Advice(changes, plan, fits, "" if fits else _otherwise(search, chosen, plan))


def flattened(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every option of a configuration, dotted key → value; lists as they are."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def changed(config: C, overrides: Mapping[str, Any]) -> C:
    """The configuration with these options on top, validated. Raises InputError for what may not be."""
    return load_config(type(config), None, {**config.model_dump(exclude_none=True), **overrides})


def configuration(config: BaseModel, overrides: Mapping[str, Any]) -> str:
    """The whole configuration file with these options on top, ready to run."""
    return dump_toml(changed(config, overrides))


@dataclass
class _Search:
    """Plans again, each set of options once."""

    replan: Replan
    given: Mapping[str, Any]
    available: float
    _known: dict[str, Plan | None] = field(default_factory=dict)

    def plan(self, chosen: Mapping[Lever, dict[str, Any]]) -> Plan | None:
        """With the options of these levers; None where the configuration refuses them."""
        options = {key: value for one in chosen.values() for key, value in one.items()}
        name = repr(sorted(options.items()))
        if name not in self._known:
            try:
                self._known[name] = self.replan(options)
            except InputError:
                if not options:
                    raise
                self._known[name] = None
        return self._known[name]

    def short(self, plan: Plan) -> float:
        """Bytes over what is available, summed over the phases: two may be too full at once."""
        return sum(max(0.0, float(phase.needed) - self.available) for phase in plan.memory.phases)

    def fits(self, plan: Plan) -> bool:
        return bool(plan.memory.needed <= self.available)

    def milds(
        self, lever: Lever, chosen: Mapping[Lever, dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], Plan]]:
        """What the lever can be set to beside the others, from mild to strong, as long as it helps."""
        others = {one: options for one, options in chosen.items() if one != lever}
        effective = {**self.given, **{k: v for options in others.values() for k, v in options.items()}}
        before = self.plan(others)
        if before is None:
            return
        least = self.short(before)
        for options in lever.values(effective, before):
            plan = self.plan({**others, lever: options})
            if plan is None or not lever.meets(options, plan):
                continue
            if self.short(plan) < least:
                least = self.short(plan)
                yield options, plan

    def strongest(
        self, lever: Lever, chosen: Mapping[Lever, dict[str, Any]]
    ) -> tuple[dict[str, Any], Plan] | None:
        """The mildest value with which all fits, else the one that saves most; None where none helps."""
        found = None
        for found in self.milds(lever, chosen):
            if self.fits(found[1]):
                break
        return found

    def widen(self, chosen: dict[Lever, dict[str, Any]], levers: Sequence[Lever]) -> bool:
        """Add levers, the most helpful first, until all fits; a lever that alone does goes before."""
        plan = self.plan(chosen)
        assert plan is not None
        if self.fits(plan):
            return True
        left = list(levers)
        while True:
            best: tuple[Lever, dict[str, Any], Plan] | None = None
            for lever in left:
                found = self.strongest(lever, chosen)
                if found is not None and self.fits(found[1]):
                    chosen[lever] = found[0]
                    return True
                if found is not None and (best is None or self.short(found[1]) < self.short(best[2])):
                    best = (lever, *found)
            if best is None:
                return False
            chosen[best[0]] = best[1]
            left.remove(best[0])

    def narrow(self, chosen: dict[Lever, dict[str, Any]]) -> None:
        """Leave out what is not needed, the most harmful first, and make the rest as mild as still fits."""
        for lever in sorted(chosen, key=LEVERS.index, reverse=True):
            rest = {one: options for one, options in chosen.items() if one != lever}
            plan = self.plan(rest)
            if plan is not None and self.fits(plan):
                del chosen[lever]
        for lever in sorted(chosen, key=LEVERS.index, reverse=True):
            found = self.strongest(lever, chosen)
            if found is not None and self.fits(found[1]):
                chosen[lever] = found[0]

    def explained(self, chosen: Mapping[Lever, dict[str, Any]]) -> tuple[tuple[Change, ...], Plan]:
        """The changes in the order of LEVERS, with what each saves once those before it are made."""
        changes = []
        made: dict[Lever, dict[str, Any]] = {}
        before = self.plan(made)
        assert before is not None
        for lever in sorted(chosen, key=LEVERS.index):
            made[lever] = chosen[lever]
            plan = self.plan(made)
            if plan is None:  # this option needs one behind it: its share cannot be told
                changes.append(
                    Change(chosen[lever], 0.0, before.memory.fullest.name, lever.effect, lever.why)
                )
                continue
            phase, saves = _most_saved(before, plan)
            changes.append(Change(chosen[lever], saves, phase, lever.effect, lever.why))
            before = plan
        return tuple(changes), before


def _most_saved(before: Plan, after: Plan) -> tuple[str, float]:
    """The phase that shrinks most, and by how much."""
    now: dict[str, Phase] = {phase.name: phase for phase in after.memory.phases}
    shrunk = {
        phase.name: float(phase.needed) - (float(now[phase.name].needed) if phase.name in now else 0.0)
        for phase in before.memory.phases
    }
    name = max(shrunk, key=lambda one: shrunk[one])
    return name, shrunk[name]


def _otherwise(search: _Search, chosen: Mapping[Lever, dict[str, Any]], smallest: Plan) -> str:
    """What would do where no change does."""
    plan = search.plan({})
    assert plan is not None
    least, whole = (_gib_up(one.memory.needed) for one in (smallest, plan))
    text = (
        f"the smallest that these options reach is {size(smallest.memory.needed)}; "
        f"a device with {least} GiB would do"
        + (f", one with {whole} GiB without any change" if whole > least else "")
    )
    if "devices" not in search.given:
        return text + "; a smaller model or shorter sequences need less"
    # Each device computes groups of its own, so that more of them than groups are of no use.
    most = search.given.get("groups", 256)
    for count in (n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n <= most):
        lever = LEVERS[0]
        more = search.plan({**chosen, lever: {"devices": count}})
        if count > search.given["devices"] and more is not None and search.fits(more):
            return f"{text}; so would {count} devices"
    return text


def _gib_up(number: float) -> int:
    return max(1, math.ceil(number / GIB))


def _typed(value: Any) -> str:
    """As a shell takes it: quoted only where it must be."""
    text = toml_value(value)
    plain = text.strip('"')
    return (
        plain
        if isinstance(value, str) and plain.replace("_", "").isalnum()
        else f"'{text}'"
        if '"' in text
        else text
    )
