"""Reward functions in processes of their own, so that they run while the next groups are sampled.

A worker loads the functions by name, as the run itself did; what crosses the pipe is text, columns and
numbers. It is a new interpreter, never a fork (a forked process may hold locks of threads that it does not
have), and it does not run the caller's main module again. It answers response by response, so that a function
which crashes or hangs is known by name; the worker is then replaced, and only that group has no value.

What goes to a worker is pickled, since columns may hold what JSON cannot, and only the run can write there.
What comes back is JSON: a worker runs code of others, and the run unpickles nothing that it sent.

A worker ends, and what it started with it, when the pipe closes, whatever became of the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group, Response, prompt_text
from trimtab.rewards.base import NoValue, accepted_names, function_value, response_text

Specification = tuple[str, str, dict[str, Any]]
"""A term's name in the mixture, and the name and args that :func:`load_function` takes."""

Row = list[float | str]
"""One term on one group: each response's value, or why it has none."""

READY_WITHIN_S = 120.0
"""For a worker to start and import what the functions need."""

LONGEST_REASON = 10_000
"""Characters of a failure's words that are sent."""
LONGEST_ANSWER = 1 << 17
"""Bytes of a message from a worker; a longer one is no answer of ours."""

NO_ANSWER = "the worker sent something that is no answer"
CLOSED = "the reward workers were closed"

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The cores are the model's: a function that calls numpy must not start a thread for each of them."""


class Pool:
    """``workers`` processes that score groups with plain reward functions, in any order.

    Raises InputError, naming the term, where a worker cannot load a function.
    """

    def __init__(self, workers: int, terms: list[Specification], *, timeout_s: float) -> None:
        self.terms = terms
        self.timeout_s = timeout_s
        self.closed = False
        self._gate = threading.Lock()
        """Nothing enters the queue once the pool is closed: nobody would answer it."""
        self._jobs: queue.SimpleQueue[tuple[bytes, int, Future[dict[str, Row]]] | None] = queue.SimpleQueue()
        self._workers = [_Worker(terms) for _ in range(workers)]
        self._threads: list[threading.Thread] = []
        try:
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            thread = threading.Thread(target=self._serve, args=(worker,), name="rewards", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, group: Group) -> Future[dict[str, Row]]:
        """Every term's row for the group, some time.

        Raises InputError for columns that cannot be sent, RuntimeError once the pool is closed.
        """
        bare = Group(
            id=group.id,
            prompt=group.prompt,
            responses=[Response(text=response.text) for response in group.responses],
            columns=group.columns,
        )
        future: Future[dict[str, Row]] = Future()
        try:
            job = pickle.dumps(bare)
        except Exception as error:
            raise InputError(
                f"reward on {group.id}: its columns cannot be sent to a worker ({error}): "
                "set reward.workers = 0"
            ) from error
        with self._gate:
            if self.closed:
                raise RuntimeError(CLOSED)
            self._jobs.put((job, len(group.responses), future))
        return future

    def close(self) -> None:
        """End every worker, also one in the middle of a call. What was not answered fails. Safe to repeat."""
        with self._gate:
            self.closed = True
        for worker in self._workers:
            self._jobs.put(None)
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:  # one may have been replaced while it was being ended
            worker.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[2].set_exception(RuntimeError(CLOSED))

    def _serve(self, worker: _Worker) -> None:
        while (job := self._jobs.get()) is not None:
            payload, size, future = job
            try:
                if self.closed:
                    raise RuntimeError(CLOSED)
                future.set_result(self._score(worker, payload, size))
            except BaseException as error:  # it belongs to whoever waits for the group
                future.set_exception(error)

    def _score(self, worker: _Worker, payload: bytes, size: int) -> dict[str, Row]:
        rows: dict[str, Row] = {name: [] for name, _, _ in self.terms}
        broken: str | None = None
        with contextlib.suppress(OSError):  # a worker that died before: the first answer says so
            worker.connection.send_bytes(payload)
        for row in rows.values():
            while len(row) < size:
                if broken is None:
                    answer, broken = worker.answer(self.timeout_s)
                    if answer is None and broken is None:
                        broken = NO_ANSWER
                row.append(answer if broken is None else broken)
        if broken is not None and not self.closed:
            worker.restart()
        return rows


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, terms: list[Specification]) -> None:
        self._terms = terms
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from trimtab.rewards.pool import work; work({theirs.fileno()})"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                # Ctrl-C reaches the run alone, which ends its workers and whatever they have started.
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it died at once, which waiting for it reports
            self.connection.send_bytes(pickle.dumps(self._terms))

    def wait_until_ready(self) -> None:
        """Raises InputError where a function cannot be loaded in the worker."""
        answer, broken = self.answer(READY_WITHIN_S)
        problem = broken and f"reward.workers: while starting, {broken}"
        if problem or answer is not None:
            raise InputError(f"{problem or answer} (in a worker process; reward.workers = 0 does without)")

    def restart(self) -> None:
        """A new process in the place of this one."""
        self.kill()
        self._start()
        self.wait_until_ready()

    def answer(self, timeout_s: float) -> tuple[Any, str | None]:
        """The next thing that the worker says; or why it will say nothing more."""
        try:
            if self.connection.poll(timeout_s):
                return _received(self.connection.recv_bytes(LONGEST_ANSWER)), None
            return None, f"no answer within {timeout_s:g} s (reward.timeout_s)"
        except ValueError:
            self.kill()
            return None, NO_ANSWER
        except (OSError, EOFError):
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:  # alive, but it has closed its end of the pipe
                self.kill()
            return None, f"the worker process died ({_ending(self.process.returncode)})"

    def kill(self) -> None:
        """End the process now. The pipe stays readable, so that who waits for an answer sees its end."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _received(message: bytes) -> float | str | None:
    """A worker's message: a value, why there is none, None for ready. Raises ValueError for anything else."""
    try:
        answer = json.loads(message)
    except RecursionError:
        raise ValueError from None
    if isinstance(answer, float) and math.isfinite(answer):
        return answer
    if answer is None or isinstance(answer, str):
        return answer
    raise ValueError


def _message(answer: float | str | None) -> bytes:
    if isinstance(answer, str):
        answer = answer[:LONGEST_REASON]
    return json.dumps(answer).encode()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


# ---------------------------------------------------------------- inside a worker


def work(fd: int) -> None:
    """The worker's life: load the functions, then answer until the pipe closes."""
    connection = Connection(fd)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # A thread of its own, so that the end of the run is seen while a function is running.
        with contextlib.suppress(OSError, EOFError):
            while True:
                jobs.put(connection.recv_bytes())
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    terms: list[Specification] = pickle.loads(jobs.get())
    from trimtab.rewards.functions import load_function

    functions = []
    try:
        for _, name, args in terms:
            function = load_function(name, args)
            functions.append((function, accepted_names(function)))
    except InputError as error:
        connection.send_bytes(_message(str(error)))
        return
    connection.send_bytes(_message(None))
    while True:
        group: Group = pickle.loads(jobs.get())
        prompt = prompt_text(group.prompt)
        for function, accepted in functions:
            for response in group.responses:
                try:
                    value: float | str = function_value(
                        function, accepted, group, prompt, response_text(response.text)
                    )
                except NoValue as error:
                    value = str(error)
                connection.send_bytes(_message(value))
