"""The loop that every method runs: step, evaluate, log, save, until the steps or a budget are spent.

SIGTERM (a scheduler's notice) ends it behind the step in hand: a checkpoint, then ``Terminated``. Of many
processes it ends all behind the same step, whichever it came to.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trimtab.errors import InputError, Terminated
from trimtab.parallel.watch import watch
from trimtab.parallel.world import world
from trimtab.training.run import Run
from trimtab.training.state import SKIPPED, State
from trimtab.training.update import within_memory

TWICE_S = 5.0


def loop(
    run: Run,
    state: State,
    total: int,
    step: Callable[[], dict[str, Any]],
    *,
    evaluate: Callable[[], dict[str, float]] | None = None,
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Call ``step`` until ``total`` steps are done, a budget is spent, or ``watch`` ends the run.

    ``step`` moves the state on by one step and returns its metrics. ``evaluate`` runs before the first step,
    every ``train.eval_every`` steps and at the end. ``settle`` makes whatever is still under way part of the
    state, before it is saved or evaluated. At the end the models that learn have the weights to be kept:
    those of the last step, or with ``watch.restore_best`` of the best evaluation.
    """
    stopping = run.stopping

    def measured() -> dict[str, float]:
        def cut(tokens: int) -> dict[str, float]:
            run.train.micro_batch_tokens = tokens  # an evaluation reads the option
            return evaluate() if evaluate else {}

        found = within_memory(run, state, cut)
        for line in getattr(evaluate, "notes", list)():
            run.say(line)
        return found

    def ended() -> bool:
        return state.step >= total or run.spent(state) or bool(stopping.reason(state))

    if evaluate is None and getattr(getattr(run.config, "watch", None), "measures", False):
        raise InputError(
            "watch.prompts, watch.heldout and watch.safety are measured by an evaluation, and train was "
            "called without: give it on_eval=heldout_evaluation(config)"
        )
    run.start(total, state.step)
    with asked_to_end() as asked:
        if evaluate and state.step == 0:
            metrics = measured()
            best = stopping.evaluated(state, metrics)
            run.log(state, metrics)
            if best and stopping.options.restore_best:
                run.checkpoint(state)
        done = ended()
        while not done:
            metrics = world().agreed(step())  # what clocks say differs between processes
            stopping.stepped(state, metrics)
            if skipped := state.controllers.get(SKIPPED):
                metrics[SKIPPED] = int(skipped)
            metrics["seconds"] = run.elapsed(state)
            best, done = False, ended()
            if done or run.due(run.train.eval_every, state):
                if evaluate:
                    settle()
                    metrics |= measured()
                best = stopping.evaluated(state, metrics)
                done = done or bool(stopping.reason(state))
            run.log(state, metrics)
            if best and stopping.options.restore_best:
                settle()
                run.checkpoint(state)
            if not done and world().any(asked()):  # a signal may have come to one of them
                settle()
                run.checkpoint(state, wait=True)
                world().barrier()  # whoever ends first ends all
                raise Terminated(f"step {state.step} is saved in {run.out / 'checkpoints'}")
            if run.due(run.train.save_every, state):
                settle()
                run.checkpoint(state)
    settle()
    run.end(state, total)


@contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM is noted, not obeyed: whether it has come. A second one ends the process at once.

    A launcher passes a scheduler's SIGTERM on to processes that had it from the scheduler too: of many
    processes a second one counts when it comes ``TWICE_S`` later.
    """
    came = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # signals are the main thread's
        return

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not came.is_set():
            first = time.monotonic()
            came.set()
            if world().alone:
                signal.signal(signal.SIGTERM, before)
        elif time.monotonic() - first > TWICE_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    except BaseException:
        # torchrun asks the others to end when one has: this one is about to, and has to say why.
        watch().leaving()
        before = signal.getsignal(signal.SIGTERM) if not world().alone else before
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
