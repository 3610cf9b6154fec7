"""A heartbeat: when one process of a run ends early or falls silent, the others end too, and one says why.

A process that waits for another in a collective cannot look after itself, so a thread does: every few seconds
it leaves a beat in a store, a few bytes, and reads those of the others. It beats on while the process waits,
evaluates or writes for hours, and stops where the process is killed, stopped or cut off. What a process ends
with is left in the store too, by whoever is first, and the first has the word. A second thread watches that
the store answers, since the process that holds it may be the lost one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trimtab.errors import InputError, Lost, Terminated
from trimtab.parallel.peers import LEFT, Heard, Peer, is_gone
from trimtab.parallel.signals import Asked

LOST = 75
"""The exit code of a process that ends because another is gone: try again (``EX_TEMPFAIL``)."""
GRACE_S = 2.0
"""What a process has to end by itself after another did, before the watching thread ends it."""
HURRY_S = 5.0
"""Silence that is enough once a message between processes has failed."""
ANSWER_S = 12.0
"""What the store may take to answer. Its one thread looks up the name of every process that connects, and a
resolver that hears nothing asks twice, for 5 s each time.
"""
FRESH_S = 1.0
"""How old the step that others know of a process may be, while steps are short."""
NONE = "-"
"""What stands in the store for no fault."""
_COLLECTIVE = re.compile(r"\bgloo\b|nccl|connection (closed|reset) by peer", re.IGNORECASE)
"""Words of errors that messages between processes end in; not of those that other connections end in."""


@dataclass(frozen=True)
class Cause:
    """Why this process has to end though nothing is wrong with it."""

    line: str
    """What happened, in one line."""
    code: int
    speaks: bool
    """It is this process that says so."""


class Watch:
    """Of one process over all others, between :meth:`begin` and the end of :meth:`told`."""

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        peers: Sequence[Peer],
        *,
        lost_after_s: float,
        store_of: int | None = None,
        held: Any = None,
    ) -> None:
        """``connect``: a new connection to the store; ``store_of``: the process that holds it, if one does.

        ``held``: what has to be kept for the store to be there.
        """
        self._held = held
        self.rank, self.lost_after_s, self.store_of = rank, lost_after_s, store_of
        self.every = min(3.0, lost_after_s / 8)
        self._gap = (
            2 * self.every + 1
        )  # a longer one is not the others' doing: the store or this process stood
        self._connect = connect
        self._store = connect()
        self._word = connect()  # for what this process ends with: a new one could have to wait
        self._me = peers[rank]
        now = time.monotonic()
        self._others = {p.rank: Heard(p, at=now) for p in peers if p.rank != rank}
        self._answered = now
        self._count = 0
        self._step = ""
        self._hurry = self._leaving = self._waited = False
        self._stop, self._found, self._done = threading.Event(), threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._lock, self._beating = threading.Lock(), threading.Lock()
        self._said_left = self._ending = False
        self._cause: Cause | None = None
        self._ends: list[Callable[[BaseException], None]] = []
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """From here on this process beats, and watches."""
        for work, name in ((self._beat, "heartbeat"), (self._guard, "watch")):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def at(self, step: int) -> None:
        """The step that is done, for the line that others say should this process be lost."""
        self._step = str(step)
        if time.monotonic() - self._answered > FRESH_S:
            self._wake.set()

    def on_end(self, work: Callable[[BaseException], None]) -> Callable[[], None]:
        """``work(cause)`` is called before the watching thread ends this process; returns how to undo it."""
        self._ends.append(work)
        return lambda: self._ends.remove(work) if work in self._ends else None

    def leaving(self) -> None:
        """This process ends by itself, and has files to close: it is given the time, whoever else asks."""
        self._leaving = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    # What the main thread does with an error.

    def cause(self, error: BaseException | None) -> BaseException | None:
        """What ended this process: the error, or the end of another process behind it.

        An error that a message between processes ended in is waited with until it is known who is lost; once,
        whoever asks again.
        """
        asked = isinstance(error, Asked)
        if error is None or (
            isinstance(error, Lost | InputError | Terminated | KeyboardInterrupt) and not asked
        ):
            return error
        if (asked or _of_a_message(error)) and not self._waited:
            self._hurry = True
            self._wake.set()
            # torchrun asks those to end that are left when one has: it is known soon if that is so.
            self._found.wait(2 * GRACE_S if asked else self.lost_after_s + HURRY_S)
            self._waited = True
        if self._cause is None:
            return error
        return Lost(self._cause.line, self._cause.code)

    @contextmanager
    def told(self, disband: Callable[[bool], None] = lambda failed: None) -> Iterator[None]:
        """Within it an error that ends this process ends all; around it one process has an error that speaks.

        In that one the error stays what it is, or is a Lost that names the lost one. In the others it becomes
        a Lost without words. ``disband(failed)`` takes the processes' group apart, on which the others may
        wait: once it is known why.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, Terminated) and not isinstance(error, Asked):  # all do, and at the same step
                self._leave(disband)
                if self.rank:
                    raise Lost(code=143) from error
                raise
            self.leaving()
            ended_by = self._ended_by(error)
            self._end(disband)
            if ended_by is error:
                raise
            raise ended_by from error
        else:
            self._leave(disband)
            if self._cause is not None:
                raise Lost(self._cause.line if self._cause.speaks else "", self._cause.code)

    def _ended_by(self, error: BaseException) -> BaseException:
        found = self.cause(error)
        if self._cause is not None:
            return Lost(self._cause.line if self._cause.speaks else "", self._cause.code)
        code = 2 if isinstance(error, InputError | OSError) else 1
        code = 130 if isinstance(error, KeyboardInterrupt) else 143 if isinstance(error, Asked) else code
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        mine = self._published(" ".join(str(error).split())[:500] or type(error).__name__, code)
        if mine is None:
            return found or error
        return Lost(code=mine["code"])

    def _published(self, line: str, code: int) -> dict[str, Any] | None:
        """Leave in the store what this process ends with; another's that was there before, else None.

        None too where the store does not answer: whoever cannot know has to speak.
        """
        answer: list[bytes] = []

        def publish() -> None:
            with suppress(RuntimeError):
                mine = json.dumps({"rank": self.rank, "line": line, "code": code})
                answer.append(self._word.compare_set("fault", NONE, mine))

        thread = threading.Thread(target=publish, daemon=True)
        thread.start()
        thread.join(ANSWER_S)
        found = _fault(answer[0]) if answer else None
        return None if found is None or found["rank"] == self.rank else found

    # The end.

    def _leave(self, disband: Callable[[bool], None]) -> None:
        """The run is done, here and elsewhere: wait for the others, watching on, then stop."""
        self._say_left()
        with suppress(RuntimeError):
            while not self._found.is_set() and not all(one.left for one in self._others.values()):
                self._listen(self._store)
                time.sleep(0.02)
            disband(self._found.is_set())
            if self.store_of is not None and not self._found.is_set():
                self._last()
        self._close()

    def _end(self, disband: Callable[[bool], None]) -> None:
        """This process has failed: whoever holds the store gives the others time to read why."""
        disband(True)
        self._say_left()
        if self.store_of == self.rank:
            until = time.monotonic() + 3 * GRACE_S + 2 * self.every
            with suppress(RuntimeError):
                while time.monotonic() < until and not all(
                    one.left or is_gone(one.peer, self._me) for one in self._others.values()
                ):
                    self._listen(self._store)
                    time.sleep(0.05)
        self._close()

    def _last(self) -> None:
        """The process that holds the store waits until no other asks it anything."""
        if self.store_of != self.rank:
            self._store.add("gone", 1)
            return
        until = time.monotonic() + self.lost_after_s
        while self._store.add("gone", 0) < len(self._others) and time.monotonic() < until:
            time.sleep(0.01)

    def _say_left(self) -> None:
        self._said_left = True
        held = self._beating.acquire(timeout=GRACE_S)  # no beat comes behind it
        with suppress(RuntimeError):
            self._store.set(_beat_of(self.rank), LEFT)
        if held:
            self._beating.release()

    def _close(self) -> None:
        with self._lock:
            self._done.set()
        if self._ending:  # the line is being said
            threading.Event().wait()
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(1.0)

    # The threads.

    def _beat(self) -> None:
        store = None
        while not self._stop.is_set():
            try:
                store = store or self._connect()
                self._count += 1
                gone = [r for r, one in self._others.items() if not one.left and is_gone(one.peer, self._me)]
                with self._beating:
                    if not self._said_left:
                        store.set(_beat_of(self.rank), f"{self._count} {self._step}".rstrip())
                fault = self._listen(store)
            except RuntimeError:
                silence = time.monotonic() - self._answered
                if not self._stop.is_set():
                    self._store_lost(silence if silence > self._gap else None)
                return
            if self._stop.is_set():
                return
            if fault is not None:
                line = fault["line"]
                if fault["code"] != LOST:
                    line = f"process {fault['rank']} ended: {line}"
                self._conclude(Cause(line, fault["code"], speaks=False))
                return
            lost = self._lost(gone)
            if lost:
                other = self._published(lost, LOST)
                self._conclude(Cause(lost, LOST if other is None else other["code"], speaks=other is None))
                return
            self._wake.wait(min(self.every, 0.3) if self._hurry else self.every)
            self._wake.clear()

    def _listen(self, store: Any) -> dict[str, Any] | None:
        """Take in the others' beats; what one of them ended with, if one did."""
        ranks = list(self._others)
        told = store.multi_get([*map(_beat_of, ranks), "fault"])
        *beats, fault = (one.decode() for one in told)
        before, now = self._answered, time.monotonic()
        self._answered = now
        # While the store answered nobody, nobody could be heard.
        deaf = now - before if now - before > self._gap else 0.0
        for rank, beat in zip(ranks, beats, strict=True):
            heard = self._others[rank]
            heard.at = min(now, heard.at + deaf)
            if beat != heard.beat:
                heard.beat, heard.at = beat, now
        found = _fault(fault)
        return None if found is None or found["rank"] == self.rank else found

    def _lost(self, gone: Sequence[int]) -> str:
        """A line about the processes that are lost; empty while there is none."""
        now = time.monotonic()
        enough = min(self.lost_after_s, HURRY_S + self.every) if self._hurry else self.lost_after_s
        ended = [self._others[rank] for rank in gone if not self._others[rank].left]
        silent = [one for one in self._others.values() if not one.left and now - one.at > enough]
        if not ended and not silent:
            return ""
        one = (ended or silent)[0]
        what = "has ended without a word" if ended else f"was last heard of {now - one.at:.0f} s ago"
        more = len({other.peer.rank for other in (*ended, *silent)}) - 1
        return f"{one.peer.name} {what}{one.step}{f', as were {more} more' if more else ''}{_GO_ON}"

    def _guard(self) -> None:
        """The store may hang with the process that holds it, and with it the thread that asks it."""
        last = time.monotonic()
        while not self._stop.wait(self.every / 2):
            now = time.monotonic()
            if now - last > self._gap:  # this process itself was stopped, or the whole machine
                self._answered = now
                for one in self._others.values():
                    one.at = now
            last = now
            if now - self._answered > self.lost_after_s + self.every:
                self._store_lost(now - self._answered)
                return

    def _store_lost(self, silence: float | None = None) -> None:
        """Whoever holds the store is lost, so nobody can be asked: the first other of each machine speaks."""
        if self.store_of is None or self.store_of == self.rank:
            who = "the store in which the processes meet (torchrun holds it)"
            at = ""
        else:
            one = self._others[self.store_of]
            who, at = one.peer.name, one.step
        what = "has ended without a word" if silence is None else f"was last heard of {silence:.0f} s ago"
        here = [one.peer.rank for one in self._others.values() if one.peer.host == self._me.host]
        first = min([self.rank, *(rank for rank in here if rank != self.store_of)])
        self._conclude(Cause(f"{who} {what}{at}{_GO_ON}", LOST, speaks=first == self.rank))

    def _conclude(self, cause: Cause) -> None:
        """Have the main thread end by itself, if it can; else end the process."""
        with self._lock:
            if self._cause is not None or self._done.is_set():
                return
            self._cause = cause
        self._found.set()
        if self._done.wait(GRACE_S) or (self._leaving and self._done.wait(self.lost_after_s)):
            return
        with self._lock:
            if self._done.is_set():
                return
            self._ending = True
        for work in list(self._ends):
            with suppress(Exception):
                work(Lost(cause.line, cause.code))
        if cause.speaks:
            with suppress(OSError, ValueError):
                print(f"lost: {cause.line}", file=sys.stderr, flush=True)
        thread = threading.Thread(target=self._say_left, daemon=True)
        thread.start()
        thread.join(0.5)
        os._exit(cause.code)


_GO_ON = "; go on with --resume auto"


def _beat_of(rank: int) -> str:
    return f"beat/{rank}"


def _fault(text: str | bytes) -> dict[str, Any] | None:
    """What a process ended with, if one did."""
    return json.loads(text) if text not in (NONE, NONE.encode()) else None


def _of_a_message(error: BaseException) -> bool:
    """Whether it looks like what a message between processes ends in where one is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)) is not None


@dataclass
class Unwatched:
    """Of a process that is alone: does nothing."""

    ends: list[Any] = field(default_factory=list)

    def at(self, step: int) -> None:
        """Nobody asks."""

    def leaving(self) -> None:
        """Nobody waits."""

    def on_end(self, work: Callable[[BaseException], None]) -> Callable[[], None]:
        """Never called."""
        return lambda: None

    def cause(self, error: BaseException | None) -> BaseException | None:
        """The error itself."""
        return error


_WATCH: Watch | Unwatched = Unwatched()


def watch() -> Watch | Unwatched:
    """Over the processes of this one's run."""
    return _WATCH


def put_on(new: Watch | Unwatched) -> Watch | Unwatched:
    """Make it this process's watch; the one before."""
    global _WATCH
    before, _WATCH = _WATCH, new
    return before


def store_at(address: str, port: int, wait_s: float, *, holds: bool = False) -> Any:
    """A connection to the store in which the processes meet. Raises dist.DistError."""
    wait = timedelta(seconds=wait_s)
    return dist.TCPStore(address, port, is_master=holds, timeout=wait, wait_for_workers=False)
