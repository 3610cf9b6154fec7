"""Reward functions in worker processes: the same values and failures, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import Mixture, RewardConfig
from trimtab.rewards.functions import build_mixture

REWARDS = """
import os, signal, subprocess, sys, time


def words(prompt, response, answer="", *, unit=1.0):
    return unit * len(response.split()) + len(prompt) + len(answer)


def picky(prompt, response):
    if "bad" in response:
        raise ValueError(f"no {response}")
    return float("nan") if "nan" in response else response.startswith("a")


def surroundings(prompt, response):
    return 10.0 * int(os.environ["OMP_NUM_THREADS"]) + ("torch" in sys.modules)


def process(prompt, response):
    return os.getpid()


def slow(prompt, response):
    time.sleep(float(response))
    return 1.0


def breaks(prompt, response):
    if response == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "exit":
        sys.exit(3)
    if response == "hang":
        time.sleep(600)
    return 1.0


def spawns(prompt, response):
    child = subprocess.Popen(["sleep", "600"])
    with open(response, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""


@pytest.fixture
def mixture(tmp_path: Path) -> Iterator[Callable[..., Mixture]]:
    """``mixture("words", "picky", workers=2)``: started, and closed at the end."""
    (tmp_path / "fns.py").write_text(REWARDS)
    with ExitStack() as closing:

        def make(*names: str, args: dict[str, Any] | None = None, **options: Any) -> Mixture:
            terms = [{"name": f"{tmp_path / 'fns.py'}:{name}", "args": args or {}} for name in names]
            made = build_mixture(RewardConfig.model_validate({"terms": terms, **options}))
            closing.callback(made.close)
            made.start()
            return made

        yield make


def group(name: str, *texts: str, **columns: Any) -> Group:
    return Group(id=name, prompt="2+2=", responses=[Response(text=t) for t in texts], columns=columns)


def some() -> list[Group]:
    groups = [group(f"r:{i}", *(f"a {'b ' * j}" for j in range(i % 4 + 1)), answer="x" * i) for i in range(9)]
    groups[2] = group("r:2", "a", "bad", "worse", "nan")
    groups[5] = group("r:2", "a c", "b", prompt="taken")  # an id that came before, and a name that is taken
    return groups


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_values_failures_and_their_order_are_those_of_one_process(mixture: Callable[..., Mixture]) -> None:
    both = []
    for workers in (0, 2):
        scored, groups = mixture("words", "picky", workers=workers, on_error="skip"), some()
        if workers:
            for one in reversed(groups[1:]):  # the order in which they finish is not theirs; one never came
                scored.submit(one)
        report = scored.score(groups)
        both.append((report, [(r.reward, r.reward_terms) for one in groups for r in one.responses]))
    assert both[0] == both[1]
    report, rewards = both[0]
    assert (report.skipped, report.failures) == (4, {"words": 2, "picky": 2})
    assert report.skipped_groups == ["r:2", "r:2"]
    assert rewards[0] == (6.0, {"words": 5.0, "picky": 1.0})


def test_an_error_is_the_same_line(mixture: Callable[..., Mixture]) -> None:
    lines = []
    for workers in (0, 2):
        with pytest.raises(InputError) as caught:
            mixture("picky", workers=workers).score(some())
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert lines[0] == "reward 'picky' on r:2: ValueError: no bad"


def test_args_are_bound_and_an_evaluation_needs_no_worker(mixture: Callable[..., Mixture]) -> None:
    one = group("r:1", "a b")
    mixture("words", args={"unit": 10.0}, workers=1).score([one])
    assert one.responses[0].reward == 24.0
    config = RewardConfig.model_validate({"terms": [{"name": "exact_match"}], "workers": 1})
    never_started = build_mixture(config)
    never_started.submit(one)
    never_started.score([right := group("r:1", "4", answer="4")])
    assert right.responses[0].reward == 1.0


def test_workers_are_processes_of_one_thread_without_torch(mixture: Callable[..., Mixture]) -> None:
    groups = [group(f"r:{i}", "x") for i in range(4)]
    mixture("surroundings", workers=1).score(groups)
    assert {one.responses[0].reward for one in groups} == {10.0}
    mixture("process", workers=1).score(groups)
    assert os.getpid() not in {one.responses[0].reward for one in groups}


def test_rewards_are_found_while_the_next_groups_are_sampled(mixture: Callable[..., Mixture]) -> None:
    scored, groups = mixture("slow", workers=1), [group(f"r:{i}", "0.2") for i in range(5)]
    for one in groups:
        time.sleep(0.25)  # the next group's sampling
        scored.submit(one)
    sampled = time.perf_counter()
    assert scored.score(groups).scored == 5
    assert time.perf_counter() - sampled < 0.5  # the last one's, not all five's


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("crash", r"the worker process died \(SIGKILL\)"),
        ("exit", r"the worker process died \(exit code 3\)"),
        ("hang", r"no answer within 0\.5 s \(reward\.timeout_s\)"),
    ],
)
def test_a_crash_or_a_hang_costs_its_group_alone(
    mixture: Callable[..., Mixture], text: str, why: str
) -> None:
    def groups() -> list[Group]:
        return [
            group("r:1", "fine"),
            group("r:2", "fine", text, "fine"),
            group("r:3", "fine"),
            group("r:4", "x"),
        ]

    began = time.perf_counter()
    scored = mixture("breaks", workers=1, timeout_s=0.5, on_error="skip")
    report = scored.score(three := groups())
    assert report.skipped_groups == ["r:2"]
    assert [r.reward for r in three[1].responses] == [1.0, None, None]
    assert [one.responses[0].reward for one in three[2:]] == [1.0, 1.0]
    with pytest.raises(InputError, match=rf"^reward 'breaks' on r:2: {why}$"):
        mixture("breaks", workers=2, timeout_s=0.5).score(groups())
    assert time.perf_counter() - began < 20


def test_what_a_worker_cannot_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "only_here", lambda prompt, response: 1.0, raising=False)
    config = RewardConfig.model_validate({"terms": [{"name": "__main__:only_here"}], "workers": 2})
    mixture = build_mixture(config)
    with pytest.raises(
        InputError, match=r"reward '__main__:only_here'.*in a worker process; reward\.workers = 0"
    ):
        mixture.start()


def test_columns_that_cannot_be_sent_are_named(mixture: Callable[..., Mixture]) -> None:
    with pytest.raises(InputError, match=r"reward on r:1: its columns cannot be sent.*reward\.workers = 0"):
        mixture("words", workers=1).score([group("r:1", "a", hook=lambda: None)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": [{"name": "exact_match"}], "timeout_s": 3.0}, "timeout_s has no effect"),
        ({"terms": [{"name": "judge", "args": {}}], "workers": -1}, "workers"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig.model_validate(options)


def test_workers_with_nothing_to_do_are_refused() -> None:
    judge = {"name": "judge", "args": {"kind": "function", "name": "exact_match", "mode": "score"}}
    with pytest.raises(InputError, match=r"reward\.workers has no effect without a reward function"):
        build_mixture(RewardConfig.model_validate({"terms": [judge], "workers": 1}))


def test_mathematics_runs_in_a_worker_whatever_thread_waits() -> None:
    pytest.importorskip("math_verify")
    mixture = build_mixture(RewardConfig.model_validate({"terms": [{"name": "math"}], "workers": 1}))
    one = group("r:1", "so \\boxed{0.5}", answer="\\frac{1}{2}")
    try:
        mixture.start()
        thread = threading.Thread(target=mixture.score, args=([one],))
        thread.start()
        thread.join()
    finally:
        mixture.close()
    assert one.responses[0].reward == 1.0


def test_closing_ends_workers_in_the_middle_of_a_call(
    mixture: Callable[..., Mixture], tmp_path: Path
) -> None:
    scored, note = mixture("spawns", workers=1), tmp_path / "pids"
    waiting = [group("r:1", str(note)), group("r:2", str(note))]
    failed: list[BaseException] = []

    def score() -> None:
        try:
            scored.score(waiting)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    worker, child = read_pids(note)
    assert is_alive(worker)
    assert is_alive(child)
    began = time.perf_counter()
    scored.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(failed) == 1
    assert time.perf_counter() - began < 5
    assert gone(worker)
    assert gone(child)
    with pytest.raises(RuntimeError, match="closed"):  # and no wait for an answer that never comes
        scored.score([group("r:3", "late")])
    scored.close()


def read_pids(note: Path) -> tuple[int, int]:
    deadline = time.monotonic() + 30
    while not (note.exists() and len(note.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker, child = map(int, note.read_text().split())
    return worker, child


def test_a_killed_run_leaves_no_worker(tmp_path: Path) -> None:
    (tmp_path / "fns.py").write_text(REWARDS)
    note = tmp_path / "pids"
    term = {"name": f"{tmp_path / 'fns.py'}:spawns"}
    code = (
        "from trimtab.groups import Group, Response\n"
        "from trimtab.rewards.base import RewardConfig\n"
        "from trimtab.rewards.functions import build_mixture\n"
        f"m = build_mixture(RewardConfig(terms=[{term!r}], workers=2))\n"
        "m.start()\n"
        f"m.score([Group(id='r', responses=[Response(text={str(note)!r})])])\n"
    )
    # No `if __name__ == "__main__"`: a worker that ran the main module again would start workers of its own.
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=environment)
    try:
        worker, child = read_pids(note)
        run.send_signal(signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    assert gone(worker)
    assert gone(child)
