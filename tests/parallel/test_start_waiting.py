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


class Store:
    """A store that answers ``late_s`` seconds after it is asked."""

    def __init__(self, late_s: float) -> None:
        self.late_s = late_s
        self.held: dict[str, bytes] = {"fault": watch.NONE.encode(), "beat/0": b"1", "beat/1": b"1"}

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(self.late_s)
        return [self.held[key] for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        time.sleep(self.late_s)
        if self.held[key] == expected.encode():
            self.held[key] = desired.encode()
        return self.held[key]


def two_at(store: Store, lost_after_s: float) -> list[watch.Watch]:
    peers = [Peer(rank, "here", 1 + rank, "", "") for rank in range(2)]
    return [watch.Watch(lambda: store, rank, peers, lost_after_s=lost_after_s) for rank in range(2)]


def test_of_two_with_an_error_one_speaks_though_the_store_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HURRY_S", 0.1)
    first, second = two_at(Store(late_s=0.3), 1.0)
    assert first._published("both have found it", 2) is None
    assert second._published("both have found it", 2) == {"rank": 0, "line": "both have found it", "code": 2}


def test_while_the_store_is_silent_nobody_is_missed() -> None:
    store = Store(late_s=0.0)
    one, _ = two_at(store, lost_after_s=0.2)
    one._listen(store)
    store.late_s = 1.5  # above what it takes for silence to be the store's
    one._listen(store)
    assert one._lost(()) == ""
    store.late_s = 0.25  # now it answers, and the other's beat has not changed
    one._listen(store)
    assert one._lost(()).startswith("process 1 (here, pid 2) was last heard of 0 s ago")


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
