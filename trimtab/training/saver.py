"""When and how a run's checkpoints are written: beside the training where memory has room for a copy.

Of many processes the first writes, and deletes what is old; where weights are sharded each writes its part.
All of them learn how it ended, and which checkpoint to go on from.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.parallel.world import World, world
from trimtab.training.checkpoint import (
    Damaged,
    Snapshot,
    checkpoints,
    contents,
    folder_name,
    newest_good,
    remove,
    step_of,
    surplus,
    sweep,
    write,
)
from trimtab.training.config import TrainConfig
from trimtab.training.memory import available_bytes
from trimtab.training.state import State


class Saver:
    """The checkpoints of one run: one is written at a time, and deleted ones are those that nobody needs."""

    def __init__(self, folder: Path, train: TrainConfig, say: Callable[[str], None]) -> None:
        self.folder, self.train, self.say = folder, train, say
        self.taken: Path | None = None
        """The checkpoint that the run goes on from."""
        self.damaged: dict[Path, str] = {}
        """Those newer than it that are not to be believed, and why: left alone until they are replaced."""
        self._saved = -1
        """The step that was saved, or gone on from, last."""
        self._kept: int | None = None
        """The step whose weights the run may end with."""
        self._logged: tuple[int, dict[str, Any]] = (-1, {})
        """The step whose metrics came last, and they."""
        self._names: set[str] = set()
        """Every metric seen so far."""
        self._metrics: dict[int, dict[str, Any]] = {}
        """What each checkpoint has recorded of its step."""
        self._thread: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None
        self._apart: World | None = None
        """The processes, with messages that the thread may send beside the training's."""
        self._told = False

    def choose(self) -> None:
        """Find the checkpoint to go on from, once. Raises InputError where none of several is whole."""
        here = world()
        if here.first:
            sweep(self.folder)
        self.taken, self.damaged = newest_good(self.folder, here)
        if self.taken is not None:
            self._saved = step_of(self.taken)
        for step, recorded in here.found_first(self._recorded):
            self._metrics[step] = recorded
            self._names |= recorded.keys()

    def _recorded(self) -> list[tuple[int, dict[str, Any]]]:
        """The metrics that each checkpoint holds, but for damaged ones."""
        found = []
        for checkpoint in set(checkpoints(self.folder)) - self.damaged.keys():
            try:
                found.append((step_of(checkpoint), contents(checkpoint)["metrics"]))
            except Damaged:
                continue
        return found

    def note(self, step: int, metrics: dict[str, Any]) -> None:
        """Remember what was logged of a step."""
        self._logged = step, dict(metrics)
        self._names |= metrics.keys()

    def save(self, state: State, *, wait: bool, kept: int | None = None) -> None:
        """Write a checkpoint, unless this very step has one; ``wait``: it is on the disk on return.

        ``kept``: the step whose checkpoint stays from here on, whatever the options say. Raises InputError
        when this one or the one before it could not be written.
        """
        self.settle()
        # Not before: a save that was under way might have deleted the last one with the next not yet there.
        self._kept = kept
        if self._saved == state.step:
            # Replacing it would risk it for nothing; a kill may have come before older ones were removed.
            _in_all(world(), lambda: self._thin(state.step))
            return
        step, metrics = self._logged
        self._metrics[state.step] = metrics if step == state.step else {}
        snapshot = state.snapshot(self._metrics[state.step])
        own = None if wait else self._copy(snapshot)
        if own is None:
            self._write(snapshot, world())
        else:
            self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
            self._apart = self._apart or world().apart()
            self._future = self._thread.submit(self._write, own, self._apart)
        self._saved = state.step
        best = self.train.keep_best.removeprefix("-")
        # Without a loss so far no step was whole (skipped, or a critic warming up): the name may be right.
        if best and best not in self._names and "loss" in self._names:
            self.settle()  # what is saved is saved: the run can go on from it under another name
            raise InputError(
                f"train.keep_best: no metric is called {best!r}; there are {', '.join(sorted(self._names))}"
            )

    def settle(self) -> None:
        """Wait for a save under way. Raises what it raised, once."""
        future, self._future = self._future, None
        if future is not None and (error := future.exception()) is not None:
            self._saved = -1
            raise error

    def check(self) -> None:
        """Raise what a save raised that has ended meanwhile; does not wait. All processes do it together."""
        if self._future is None:
            return
        done = self._future.done()
        found = world().gather([done, done and self._future.exception() is not None])
        # A save that failed does so in all of them, if not at the same moment.
        if all(done for done, _ in found) or any(failed for _, failed in found):
            self.settle()

    def close(self) -> None:
        """Wait for a save under way and end the thread. Raises what the save raised."""
        try:
            self.settle()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _copy(self, snapshot: Snapshot) -> Snapshot | None:
        """One to write while training goes on; None unless it fits into memory twice, in every process."""
        if not self.train.save_in_background:
            return None
        here = world()
        # Processes of one machine take from the same memory.
        free, size = available_bytes(), snapshot.size * (here.local_size if snapshot.spread else 1)
        found = here.gather([size, -1 if free is None else free])
        own: Snapshot | None = None
        if all(free > 2 * size for size, free in found):
            with contextlib.suppress(MemoryError, RuntimeError):  # a limit of this process
                own = snapshot.copied()
            if not here.any(own is None):
                return own
            found = [[size, 0]]
        if not self._told:
            self._told = True
            size, left = min(found, key=lambda one: one[1] - 2 * one[0])
            known = f"{left / 2**20:,.0f} MiB is free" if left else "too little is free"
            self.say(
                f"training waits while checkpoints are written: a copy takes {size / 2**20:,.0f} MiB of "
                f"memory, and {known if left >= 0 else 'what is free is not known'}"
            )
        return None

    def _write(self, snapshot: Snapshot, here: World) -> None:
        """Write, and thin out. ``here``: the processes, by whose messages all learn how it ended."""
        _in_all(here, lambda: self._store(snapshot, here))

    def _store(self, snapshot: Snapshot, here: World) -> None:
        size = sum(here.gather(snapshot.size)) if snapshot.spread else snapshot.size
        try:
            if snapshot.spread or here.first:
                write(self.folder, snapshot, here if snapshot.spread else None)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot save step {snapshot.step}: {error.strerror or error}"
                f"{self._shortage(size)}; earlier ones are kept"
            ) from None
        self.damaged.pop(self.folder / folder_name(snapshot.step), None)
        self._thin(snapshot.step)

    def _thin(self, newest: int) -> None:
        """Delete what nobody needs, never the checkpoint of step ``newest``; the first process does."""
        if not world().first:
            return
        good = {step_of(p): p for p in checkpoints(self.folder) if p not in self.damaged}
        name = self.train.keep_best.removeprefix("-")
        values = {
            step: float(value)
            for step in good
            if isinstance(value := self._metrics.get(step, {}).get(name), int | float)
        }
        old = surplus(good, self.train.keep_checkpoints, self.train.keep_every, self.train.keep_best, values)
        try:
            remove(good[step] for step in sorted(old - {newest, self._kept}))
        except OSError as error:
            raise InputError(
                f"{self.folder}: step {newest} is saved, but an older checkpoint cannot be removed: "
                f"{error.strerror or error}"
            ) from None

    def _shortage(self, size: int) -> str:
        """A hint for the message: other reasons than a full disk exist."""
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            return ""
        return f" (it takes {size / 2**20:,.1f} MiB; {free / 2**20:,.1f} are free)"


def _in_all(here: World, act: Callable[[], None]) -> None:
    """``act()`` in every process. What one of them raises all do, as InputError in one wording."""
    if here.alone:
        act()
        return
    said, fault = "", None
    try:
        act()
    except InputError as error:
        said = str(error)
    except Exception as error:  # the others wait to hear of it
        said, fault = f"{type(error).__name__}: {error}", error
    found = [line for line in here.gather(said) if line]
    if fault is not None:
        raise fault
    if found:
        raise InputError(found[0])
