"""The reward term "code": a response's program, put to the row's unit tests in the sandbox.

    all        1.0 if every test passes, else 0.0
    fraction   tests passed / tests

What the response is to blame for (a wrong result, too slow, too much memory, an early exit) scores 0, or what
it had passed by then; so does what cannot be judged because of the response's own objects. What it is not to
blame for, tests that cannot be run or a sandbox that failed, gives no value, and ``reward.on_error`` decides.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Section, load_config
from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text
from trimtab.parallel.limits import machine_part
from trimtab.rewards.base import Scored, response_text
from trimtab.sandbox import Limits, Outcome, Task, isolation, run_many, run_task
from trimtab.sandbox.isolation import Isolation
from trimtab.sandbox.problems import NoProblem, Problem, problem_of


class CodeArgs(Section):
    """``args`` of the reward term "code"."""

    column: str = Field("", description="column of the tests; empty looks for tests, test, test_list")
    score: Literal["all", "fraction"] = Field("all", description="all tests or nothing, or the share passed")
    wall_s: float = Field(30.0, gt=0, description="seconds by the clock for a response and all its tests")
    cpu_s: float = Field(10.0, gt=0, description="seconds of processor time")
    memory_mb: int = Field(512, ge=64, description="MiB of memory")
    workers: int = Field(0, ge=0, description="sandboxes at once on a machine; 0 takes one a processor")
    packages: bool = Field(
        False, description="let the code import installed packages, not Python's own alone"
    )
    allow_weak: bool = Field(
        False, description="run even where the system allows no namespaces, behind one wall only"
    )

    @model_validator(mode="after")
    def _times(self) -> CodeArgs:
        if self.wall_s < self.cpu_s:
            raise ValueError("cpu_s has no effect above wall_s: lower it, or raise wall_s")
        return self


class CodeScorer:
    """Runs every response of a rollout, as many at once as there are processors."""

    outputs = {"": 1.0}  # noqa: RUF012 (the protocol's form)

    def __init__(self, args: CodeArgs, within: Isolation) -> None:
        """Raises InputError where the isolation is weak and that was not allowed."""
        if within.weak and not args.allow_weak:
            raise InputError(
                f"reward 'code': {within.sentence}: install bubblewrap, or set allow_weak = true in its args"
            )
        self.args, self.within = args, within
        self.limits = Limits(wall_s=args.wall_s, cpu_s=args.cpu_s, memory_mb=args.memory_mb)
        self.notes = [f"reward 'code': {within.sentence}"]
        self._counts: Counter[str] = Counter()

    def score(self, groups: list[Group]) -> list[list[Scored]]:
        """Per response its score, or why there is none."""
        tasks: list[Task] = []
        rows: list[list[Task | str]] = []
        for group in groups:
            problem = self._problem(group)
            found: list[Task | str] = []
            for response in group.responses:
                task = problem if isinstance(problem, str) else problem.task(response_text(response.text))
                found.append(task)
                if isinstance(task, Task):
                    tasks.append(task)
            rows.append(found)
        outcomes = run_many(
            tasks,
            limits=self.limits,
            within=self.within,
            packages=self.args.packages,
            workers=_at_once(self.args.workers),
        )
        return [
            [task if isinstance(task, str) else self._value(next(outcomes), task) for task in row]
            for row in rows
        ]

    def facts(self) -> dict[str, float]:
        """How many runs ended in which way."""
        return {f"code_{status}": float(count) for status, count in sorted(self._counts.items())}

    def _problem(self, group: Group) -> Problem | str:
        try:
            return problem_of(group.columns, prompt_text(group.prompt), self.args.column)
        except NoProblem as why:
            return str(why)

    def _value(self, outcome: Outcome, task: Task) -> Scored:
        if outcome.status == "broken":  # a machine short of memory or processes for a moment
            outcome = run_task(task, limits=self.limits, within=self.within, packages=self.args.packages)
        self._counts[outcome.status] += 1
        if outcome.status in ("refused", "broken"):
            return f"{outcome.status}: {outcome.detail}"
        if self.args.score == "all":
            return {"": float(outcome.status == "passed")}
        return {"": outcome.passed / outcome.tests}


def _at_once(workers: int) -> int:
    """Sandboxes that this process runs at once."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = not workers and own < (os.cpu_count() or 1)
    # A process that was given processors of its own has them to itself.
    return own if bound else machine_part(workers or own)


def build_code_scorer(args: dict[str, Any]) -> CodeScorer:
    """The term's scorer. Raises InputError for wrong args and for a machine without isolation."""
    try:
        given = load_config(CodeArgs, None, args)
    except InputError as error:
        raise InputError(f"reward 'code': {error}") from None
    return CodeScorer(given, isolation())
