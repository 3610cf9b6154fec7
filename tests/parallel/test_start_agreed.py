"""What each process would find for itself, all take from one: clocks, measurements, threads."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import Processes, ProcessFailed
from torch import nn

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.models.load import ModelConfig
from trimtab.parallel import same
from trimtab.parallel.same import same_data, same_weights
from trimtab.parallel.start import joined
from trimtab.parallel.world import world
from trimtab.training import precision
from trimtab.training import run as run_module
from trimtab.training.processes import choose_threads


def measured() -> list[Any]:
    """Each process would choose otherwise: the first finds bf16 twice as fast, the second half as fast."""
    ratio = 2.0 if world().first else 0.5
    own, precision._seconds = precision._seconds, lambda dtype, *_: ratio if dtype == torch.float32 else 1.0
    kernels, precision._kernels_ratio = precision._kernels_ratio, lambda: ratio
    try:
        dtype, why = precision.choose_dtype("auto", None, torch.device("cpu"), 64)
        used, line = precision.choose_kernels("auto", "cpu")
    finally:
        precision._seconds, precision._kernels_ratio = own, kernels
    return [str(dtype), why, used, line]


def for_other_devices() -> list[Any]:
    """A collective behind a decision that differs would take the next one's message."""
    used, _ = precision.choose_kernels("on", "cuda" if world().rank else "cpu")
    return [used, world().gather("next")]


def test_kernels_of_other_devices(processes: Processes) -> None:
    first, second = processes.run(for_other_devices)
    assert first[1] == second[1] == ["next", "next"]


def joins_again() -> list[Any]:
    """The first process holds the store."""
    found = []
    for _ in range(3):
        with joined(wait_s=10, lost_after_s=10) as here:
            found.append(here.gather(here.rank))
    return found


def test_processes_meet_again(processes: Processes) -> None:
    assert processes.run(joins_again, join=False) == [[[0, 1]] * 3] * 2


def test_measurements_are_the_first_process_s(processes: Processes) -> None:
    first, second = processes.run(measured)
    assert first == second
    assert first[0] == "torch.bfloat16"
    assert "2.0x" in first[1]


def threads() -> list[int]:
    """With OMP_NUM_THREADS one has three and one has two; a saved number holds for as many processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 - world().rank)
    try:
        own = choose_threads({}, 0)
    finally:
        torch.set_num_threads(before)
    kept, other = choose_threads({"threads": 5, "processes": 2}, 1), choose_threads({"threads": 5}, 1)
    limit = os.environ.pop("OMP_NUM_THREADS")
    shared = choose_threads({}, 0)
    os.environ["OMP_NUM_THREADS"] = limit
    return [own, kept, other, shared]


def test_threads_are_the_same_and_share_the_cores(processes: Processes) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert processes.run(threads) == [[2, 5, 1, max(1, cores // 2)]] * 2


def budget(model: Path, data: Path, out: Path) -> list[float]:
    """The second process's clock runs a thousand times as fast; by it the budget is spent at once."""

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return time.perf_counter() * (1 if world().first else 1000)

    run_module.time = Clock  # type: ignore[assignment]
    try:
        config = tiny.configure("dpo", model, data, out, train__steps=3, train__time_budget_s=500.0)
        result, metrics = tiny.train(config, "dpo")
    finally:
        run_module.time = time
    return [result.state.step, result.state.seconds, metrics[-1]["seconds"], metrics[-1]["tokens_per_s"]]


def test_the_time_budget_goes_by_one_clock(
    processes: Processes, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first, second = processes.run(budget, model=tiny_model, data=tiny_data, out=tmp_path / "run")
    assert first == second
    assert first[0] == 3
    assert first[2] < 100


def different(what: str) -> str:
    """Something that one process has otherwise."""
    odd = world().rank
    groups = [Group(id=f"a:{i}", prompt_tokens=[1, 2], responses=[Response(tokens=[3])]) for i in range(3)]
    try:
        if what == "weights":
            torch.manual_seed(0)
            last = nn.Linear(2, 2)
            model = nn.Sequential(nn.Linear(2, 2), last)
            same_weights(model)
            with torch.no_grad():
                last.bias[0] += 1e-6 * odd
            same_weights(model)
        elif what == "devices":
            same.same_run("dpo", ModelConfig(path="m"), ["cuda:0", "cuda:1"][odd])
            same.same_run("dpo", ModelConfig(path="m"), ["cpu", "cuda:0"][odd])
        elif what == "how a number is written":
            about = {"a": 1, "b": [{"x": 1, "y": 2}, {"y": 2, "x": 1}][odd], "c": [1, 1.0][odd]}
            return str(same._difference(about))
        elif what == "a label":
            groups[1].responses[0].label = bool(odd)
            same_data({}, groups)
        elif what == "a token":
            groups[2].responses[0].tokens = [3 + odd]
            same_data({}, groups)
        else:
            same_data({"a": "1" * 64}, groups)
            same_data({"a": "1" * 64}, groups[: 3 - odd])
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "the model's weight 1.bias differs between processes 0 and 1"),
        ("devices", "the device that models run on differs between processes: cpu in process 0 and cuda in"),
        ("how a number is written", "('c', 0, '1', 1, '1.0')"),
        ("a label", "a:1 is not the same in processes 0 and 1"),
        ("a token", "a:2 is not the same in processes 0 and 1"),
        ("fewer", "the number of groups that the data gives differs between processes: 3 in process 0, 2 in"),
    ],
)
def test_a_difference_is_named_by_all_alike(processes: Processes, what: str, words: str) -> None:
    first, second = processes.run(different, what=what)
    assert first == second
    assert first.startswith(words)


def test_an_error_in_one_process_is_known_in_the_other(processes: Processes) -> None:
    with pytest.raises(ProcessFailed) as failed:
        processes.run(one_fails)
    first, second = failed.value.errors
    assert "InputError: process 1 alone" in str(second)
    assert "Lost" in str(first)


def one_fails() -> None:
    """The other waits for it."""
    if world().rank:
        raise InputError("process 1 alone")
    world().barrier()
