"""One optimiser step on some groups, and what goes on where it fails.

A loss or a gradient that is not finite: the weights stay as they are, the step is counted as skipped, its
groups are saved for inspection, and the run goes on with the next; after ``train.max_skipped`` steps in a row
it ends. Out of memory: micro-batches are halved, for the rest of the run, and the work is done again; what is
learned stays the same within rounding, since a batch's gradient does not depend on how it is cut. Of many
processes the one that ran out ends the run by a line that says so: the others wait for it in the middle of
what it would begin again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from trimtab.errors import InputError, NotFinite
from trimtab.groups import Group
from trimtab.parallel.world import world
from trimtab.training.memory import give_back, out_of_memory
from trimtab.training.run import Run
from trimtab.training.state import SKIPPED, State

Gradient = Callable[[int], tuple[float, dict[str, float]]]
"""Adds up a step's gradient in micro-batches of at most so many tokens; the loss, and what is shown of it."""

_IN_A_ROW = "skipped_in_a_row/"
_LAST = "skipped_last"

T = TypeVar("T")


@dataclass
class Update:
    """What a step did; without an update only ``done`` says so."""

    done: bool
    loss: float = float("nan")
    shown: dict[str, float] = field(default_factory=dict)
    grad_norm: float = float("nan")

    def metrics(self) -> dict[str, float]:
        """For the log: nothing of a step that was skipped."""
        return {"loss": self.loss, **self.shown, "grad_norm": self.grad_norm} if self.done else {}


def update(
    run: Run, state: State, groups: list[Group], gradient: Gradient, lr: float, *, role: str = ""
) -> Update:
    """Compute the gradient of ``groups`` and take one step of the policy's optimiser, or of a role's.

    Raises InputError after too many skipped steps in a row, and where one group alone exceeds the memory.
    """
    optimiser = state.others[role] if role else state.optimiser
    row = f"{_IN_A_ROW}{role}"
    try:
        loss, shown = within_memory(run, state, gradient, optimiser.clear)
        norm = optimiser.step(lr)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        # Not taken again: it may be half done.
        raise InputError(
            f"step {state.step + 1}: out of memory in the optimiser's step ({_short(error)}): two numbers in "
            "fp32 a weight that learns; train an adapter (adapter.kind) or a smaller model"
        ) from None
    except NotFinite as fault:
        optimiser.clear()
        state.controllers[row] = state.controllers.get(row, 0) + 1
        if state.controllers.get(_LAST) != state.step:  # policy and critic may both be spoilt
            state.controllers[SKIPPED] = state.controllers.get(SKIPPED, 0) + 1
            state.controllers[_LAST] = state.step
        _skipped(run, state, groups, str(fault), role, int(state.controllers[row]))
        return Update(done=False)
    state.controllers.pop(row, None)
    return Update(True, loss, shown, norm)


def within_memory(
    run: Run,
    state: State,
    work: Callable[[int], T],
    undo: Callable[[], None] = lambda: None,
    *,
    times: int = 1,
) -> T:
    """``work(times * state.micro_batch_tokens)``; out of memory, ``undo()`` and again with half as many.

    ``work`` has to give the same result when it is begun again. Raises InputError where one group alone
    does not fit.
    """
    reason = ""
    while True:
        tokens = state.micro_batch_tokens
        try:
            return work(times * tokens)
        except InputError as error:
            if reason:  # the cut was refused: a group cannot be halved
                raise InputError(f"step {state.step + 1}: out of memory ({reason}), and {error}") from None
            raise
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = _short(error)
        if not world().alone:
            # The others wait where this one did not come to, or are in the middle of other messages.
            raise InputError(
                f"step {state.step + 1}: out of memory in process {world().rank} ({reason}): of several "
                "processes none can halve its micro-batches alone; go on from the last checkpoint "
                f"(--resume auto) with train.micro_batch_tokens = {max(1, tokens // 2)}"
            )
        # Behind the handler: until here the error's traceback held what the pass had kept.
        undo()
        give_back()
        if tokens < 2:
            raise InputError(f"step {state.step + 1}: out of memory ({reason}) with one token at a time")
        state.micro_batch_tokens = tokens // 2
        run.say(
            f"step {state.step + 1}: out of memory; going on with micro-batches of {tokens // 2} tokens "
            f"(train.micro_batch_tokens was {tokens})"
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _skipped(run: Run, state: State, groups: list[Group], fault: str, role: str, in_a_row: int) -> None:
    """Save the groups and say what was skipped. Raises InputError where it was one too many."""
    which = f"step-{state.step + 1:08d}{f'-{role}' if role else ''}.jsonl"
    file = run.out / "skipped" / which
    try:
        if world().first:
            file.parent.mkdir(exist_ok=True)
            about = {"fault": fault, "step": state.step + 1}
            lines = [json.dumps({**about, "group": group.to_dict()}) for group in groups]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot save the skipped step's groups: {error.strerror}") from None
    whose = f" of the {role}" if role else ""
    if in_a_row > run.train.max_skipped:
        raise InputError(
            f"step {state.step + 1}: {fault}{whose}, {in_a_row} step(s) in a row; they did not change the "
            f"weights. Their groups are in {file.parent}: look at them, or go on from the last checkpoint "
            "(run.resume) with a lower train.lr; train.max_skipped says how many may be skipped"
        )
    run.say(f"step {state.step + 1}: {fault}{whose}: skipped; its groups are in {file}")
