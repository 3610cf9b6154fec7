"""The pool of processes that the tests in this folder use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from processes import Processes, ProcessFailed

from trimtab.parallel.world import world


def _ranks(given: Path, more: list[int]) -> dict[str, object]:
    here = world()
    assert isinstance(given, Path)
    return {
        "ranks": here.gather(here.rank),
        "given": given,
        "more": more,
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


def _fails_in(rank: int) -> list[int]:
    if world().rank == rank:
        raise KeyError("the reason")
    return world().gather(0)


def _hangs() -> None:
    print("about to wait")
    if os.environ["RANK"] == "1":
        time.sleep(60)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_function_runs_in_each(processes: Processes, tmp_path: Path, size: int) -> None:
    found = processes.run(_ranks, size=size, given=tmp_path, more=[1])
    assert [f["ranks"] for f in found] == [list(range(size))] * size
    assert all(f["given"] == tmp_path and f["more"] == [1] and f["threads"] == 1 for f in found)


def test_the_processes_stay_from_call_to_call(processes: Processes, tmp_path: Path) -> None:
    runs = [processes.run(_ranks, given=tmp_path, more=[]) for _ in range(2)]
    pids = [[f["pid"] for f in found] for found in runs]
    assert pids[0] == pids[1]
    assert len({*pids[0], os.getpid()}) == 3


def test_what_goes_wrong_fails_the_test_and_the_next_call_works(tmp_path: Path) -> None:
    pool = Processes()
    try:
        with pytest.raises(ProcessFailed, match="the reason") as failed:
            pool.run(_fails_in, rank=1)
        assert failed.value.errors[1] is not None
        pids = [f["pid"] for f in pool.run(_ranks, given=tmp_path, more=[])]
        with pytest.raises(ProcessFailed, match=r"1\] of 2 did not answer") as hung:
            pool.run(_hangs, limit=1.0, join=False)
        assert "about to wait" in str(hung.value)
    finally:
        pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
