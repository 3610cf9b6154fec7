"""What terms that judge steps leave on a response beside its reward: ``step_rewards`` and ``step_ends``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from trimtab.errors import InputError
from trimtab.groups import Group, Response

if TYPE_CHECKING:
    from trimtab.rewards.base import RewardTerm


class Steps(NamedTuple):
    """A response's steps as a term judged them."""

    rewards: list[float]
    ends: list[int] | None
    """Among the response's own tokens; None where its tokenizer is not known."""


@runtime_checkable
class StepScorer(Protocol):
    """A scorer that judges steps too; asked after each call of ``score``, for the responses of that call."""

    separator: str

    def steps_of(self, response: Response) -> Steps | None:
        """The steps of that response; None where they could not be judged."""
        ...


def check_steps(terms: Sequence[RewardTerm]) -> None:
    """Refuse terms that split a response otherwise: the sum of their step rewards would be of nothing."""
    found: dict[str, str] = {}
    for term in terms:
        function: Any = term.function
        if isinstance(function, StepScorer):
            found[function.separator] = term.name
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise InputError(
            f"reward: {first!r} splits steps at {a!r} and {second!r} at {b!r}: give both one separator"
        )


def fill_steps(terms: Sequence[RewardTerm], groups: Sequence[Group]) -> None:
    """``step_rewards``, Σ weight × what each term says of the step, and ``step_ends`` of every response.

    Both None for a response without a reward. Without a term that judges steps nothing is touched.
    """
    judges: list[tuple[float, Any]] = [
        (term.weight, term.function) for term in terms if isinstance(term.function, StepScorer)
    ]
    if not judges:
        return
    for response in (r for group in groups for r in group.responses):
        found = [(weight, judge.steps_of(response)) for weight, judge in judges]
        if response.reward is None or any(steps is None for _, steps in found):
            response.step_rewards = response.step_ends = None
            continue
        columns = zip(*([weight * value for value in steps.rewards] for weight, steps in found), strict=True)
        response.step_rewards = [sum(column) for column in columns]
        response.step_ends = found[0][1].ends
