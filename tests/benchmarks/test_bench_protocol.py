"""The worker's end: what it answers, what it times, and that a library's printing cannot spoil a reply."""

from __future__ import annotations

import io
import json
import mmap
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import ROOT, Launch, measure
from benchmarks.protocol import Channel, peak_mb

NOISY = """if True:
    import os, time
    from benchmarks.protocol import Channel
    channel = Channel()
    channel.ready(threads=3)
    while channel.wait():
        print("a progress bar")
        os.write(1, b"a line from C\\n")
        time.sleep(0.05)
        channel.done()
"""


def talk(*commands: str) -> tuple[Channel, io.StringIO]:
    requests = io.StringIO("".join(json.dumps({"cmd": command}) + "\n" for command in commands))
    replies = io.StringIO()
    return Channel(requests, replies), replies


def test_each_request_has_its_reply_and_stop_ends_it() -> None:
    channel, replies = talk("step", "peak", "step", "stop", "step")
    channel.ready(threads=2)
    steps = 0
    while channel.wait():
        steps += 1
        channel.done()
    ready, first, peak, second = map(json.loads, replies.getvalue().splitlines())
    assert ready == {"ready": {"threads": 2}}
    assert list(first) == list(second) == ["seconds"]
    assert peak["peak_mb"] > 1
    assert steps == 2


def test_the_clock_covers_the_step_and_not_the_waiting() -> None:
    channel, replies = talk("step", "step")
    assert channel.wait()
    time.sleep(0.05)
    channel.done()
    time.sleep(0.3)  # not asked for: must not be counted
    assert channel.wait()
    channel.done()
    first, second = (json.loads(line)["seconds"] for line in replies.getvalue().splitlines())
    assert 0.05 <= first < 0.3
    assert second < 0.05
    assert not channel.wait()


def test_an_unknown_command_is_refused() -> None:
    channel, _ = talk("jump")
    with pytest.raises(ValueError, match="unknown command 'jump'"):
        channel.wait()


def test_printing_goes_to_the_log(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    sides = measure({"ours": Launch([sys.executable, "-c", NOISY], environ, tmp_path)}, runs=2, warm_up=0)
    assert all(0.05 <= seconds < 1 for seconds in sides["ours"].seconds)
    assert sides["ours"].facts == {"threads": 3}
    log = (tmp_path / "log.txt").read_text()
    assert sorted(log.splitlines()) == ["a line from C"] * 2 + ["a progress bar"] * 2


def test_peak_reads_the_high_water_mark(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmPeak:\t  9000 kB\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert peak_mb(status) == 2.0
    assert peak_mb(tmp_path / "missing") is None


def test_loaded_is_what_was_held_at_the_first_call() -> None:
    channel, replies = talk("peak")
    channel.loaded()
    # Mapped anew: the heap may have room from earlier tests, already resident.
    more = mmap.mmap(-1, 64 * 2**20)
    more.write(b"x" * len(more))
    channel.loaded()  # a second model: not the policy
    assert not channel.wait()
    peak = json.loads(replies.getvalue())
    assert peak["peak_mb"] - peak["loaded_mb"] > 60
    more.close()
