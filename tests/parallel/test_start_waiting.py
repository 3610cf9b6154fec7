"""What one process does by itself: it waits for the others, looks at its errors, is ended by its watch."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from processes import _free_port

from trimtab.errors import Lost
from trimtab.parallel import watch
from trimtab.parallel.peers import Peer
from trimtab.parallel.start import joined
from trimtab.training.run import Run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_heard_while_the_first_process_is_waited_for(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    # A shell starts what runs in its background with Ctrl-C ignored, and this process inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(Lost) as ended, joined(wait_s=4.0):
            pytest.fail("nobody was there")
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert (ended.value.code, str(ended.value)) == (code, "")
    assert time.monotonic() - began < 2.0


def watching(monkeypatch: pytest.MonkeyPatch) -> watch.Watch:
    monkeypatch.setattr(watch, "HURRY_S", 0.3)
    peers = [Peer(rank, "here", 1 + rank, "", "") for rank in range(2)]
    return watch.Watch(lambda: None, 0, peers, lost_after_s=0.3)


def seconds(of: watch.Watch, error: Exception) -> float:
    began = time.monotonic()
    assert of.cause(error) is error
    return time.monotonic() - began


def test_an_error_of_another_connection_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    one = watching(monkeypatch)
    for line in ("the connection to the label server was refused", "socket: no such host", "gloomy"):
        assert seconds(one, RuntimeError(line)) < 0.2


@pytest.mark.parametrize(
    "line",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4711",
        "NCCL error in: NCCLUtils.hpp:268, remote process exited",
    ],
)
def test_an_error_of_a_message_is_held_back_once(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    one, error = watching(monkeypatch), RuntimeError(line)
    assert seconds(one, error) > 0.5
    assert seconds(one, error) < 0.2


def test_the_live_line_is_stopped_before_the_watch_ends_the_process() -> None:
    """Whatever else cannot be closed: the terminal's cursor would stay hidden."""
    closed = []

    class Log:
        def close(self) -> None:
            closed.append(1)
            raise ValueError("closed already")

    class Lineage:
        def stop(self, reason: Any) -> None:
            raise OSError("no space left")

    run = Run.__new__(Run)
    run._log, run._own, run.lineage = Log(), None, Lineage()  # type: ignore[assignment]
    with suppress(OSError):
        run._cut_off(Lost("process 1 is gone", 75))
    assert closed == [1]
