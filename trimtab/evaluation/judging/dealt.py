"""A judge that is asked by several processes: each question by one of them, every answer told to all."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.parallel.world import world
from trimtab.rewards.judges import Comparison, Judge, Judgement

COUNTED = ("calls", "cached", "retries", "failures", "prompt_tokens", "completion_tokens", "cost")
"""Costs that arise where a question is asked; the others follow from the answers."""


def dealt(judge: Judge) -> Judge:
    """The judge itself in a world of one."""
    return judge if world().alone else DealtJudge(judge)


class DealtJudge(Judge):
    """Asks the judge for this process's share of the groups; gives every process the same judgements."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge.mode)
        self.models, self.notes, self._judge_here = judge.models, judge.notes, judge

    def _judge(self, groups: list[Group]) -> list[Judgement]:
        here, judge = world(), self._judge_here
        own = groups[here.rank :: here.size]
        before = judge.costs.facts()
        told: dict[str, Any] = {}
        try:
            told["judgements"] = [dataclasses.asdict(found) for found in (judge.judge(own) if own else [])]
        except InputError as error:
            told["error"] = str(error)
        after = judge.costs.facts()
        told["costs"] = {name: value - before.get(name, 0.0) for name, value in after.items()}
        every = here.gather(told)
        # The first by rank, so that all processes end with one and the same line.
        if failed := [said["error"] for said in every if "error" in said]:
            raise InputError(failed[0])
        self._add([said["costs"] for said in every])
        rows = [[_judgement(found) for found in said["judgements"]] for said in every]
        return [rows[i % here.size][i // here.size] for i in range(len(groups))]

    def _add(self, costs: list[dict[str, float]]) -> None:
        for name in COUNTED:
            found = [of[f"judge_{name}"] for of in costs if f"judge_{name}" in of]
            if found:
                now = (getattr(self.costs, name) or 0) + sum(found)
                setattr(self.costs, name, now if name == "cost" else int(now))


def _judgement(found: dict[str, Any]) -> Judgement:
    pairs = found["comparisons"]
    return Judgement(found["values"], None if pairs is None else [Comparison(**pair) for pair in pairs])
