"""Checkpoints of weights that are spread over processes: each writes its rows; any number reads them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trimtab.errors import InputError
from trimtab.parallel.world import world
from trimtab.training import saver as saving
from trimtab.training.checkpoint import (
    Damaged,
    checkpoints,
    contents,
    newest_good,
    piece_name,
    sealed,
    verify,
)
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.pieces import Stored, row_counts
from trimtab.training.saver import Saver
from trimtab.training.state import State

ROWS = {"0.weight": 5, "0.bias": 5, "1.weight": 1, "1.bias": 1}
"""Of the weights below: cut unevenly, and fewer than there are processes."""


# ---------------------------------------------------------------- what runs in each process


def _state(spread: bool, seed: int = 0, over: int = 0) -> tuple[nn.Module, State]:
    """Two layers, a head beside them, and a reference; ``over``: processes that share one copy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)).double()
    head = nn.Parameter(torch.randn(2).double())
    if spread:
        size = world().size
        shape, names = ((size // over, over), ("replicate", "shard")) if over else ((size,), ("shard",))
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        with torch.no_grad():  # FSDP2 is ready after a first pass
            model(torch.zeros(1, 3).double())
    state = State(Optimiser(model, TrainConfig(grad_clip=0.0), torch.float64, beside={"head": head}))
    state.extra = {f"reference.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return model, state


def _advance(model: nn.Module, state: State) -> None:
    """A step on the same inputs in every process; the gradients of replicated weights are added up."""
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3) * (state.step + 1)
    head = state.optimiser.beside["head"]
    share = 1 if any(isinstance(p, DTensor) for p in model.parameters()) else world().size
    state.optimiser.backward((model(inputs).square().mean() + (head * head).sum()) / share)
    state.optimiser.step(0.01)
    state.step += 1


def _digest(state: State) -> dict[str, str]:
    """Every tensor of the state, whole."""
    found = {**state.optimiser.tensors(), **state.extra}
    plain = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}
    return {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in plain.items()}


def _saved(
    folder: Path, spread: bool, over: int = 0, steps: int = 2, background: bool = False, keep: int = 9
) -> list[Any]:
    """Save every step; the digests of each, and in which process they were found."""
    model, state = _state(spread, over=over)
    train = TrainConfig(save_every=1, save_in_background=background, keep_checkpoints=keep)
    saver = Saver(folder, train, lambda line: None)
    found = []
    for _ in range(steps):
        _advance(model, state)
        saver.save(state, wait=not background)
        found.append(_digest(state))
    saver.close()
    world().barrier()
    return found


def _loaded(folder: Path, spread: bool, over: int = 0) -> dict[str, Any]:
    """Restore the newest; what came, what was read of it, and what the next step gives."""
    model, state = _state(spread, seed=1, over=over)
    read: dict[str, int] = {}
    own = Stored._rows

    def rows(self: Stored, name: str, *rest: Any) -> torch.Tensor:
        found = own(self, name, *rest)
        read[name] = max(read.get(name, 0), len(found) if found.dim() else 1)
        return found

    Stored._rows = rows  # type: ignore[assignment, method-assign]
    try:
        newest, damaged = newest_good(folder, world())
        assert newest is not None
        state.restore(newest)
    finally:
        Stored._rows = own  # type: ignore[method-assign]
    came = _digest(state)
    _advance(model, state)
    damage = {checkpoint.name: why for checkpoint, why in damaged.items()}
    return {"came": came, "read": read, "next": _digest(state), "damaged": damage, "step": state.step}


@contextmanager
def _failing(rank: int, call: str, n: int) -> Iterator[None]:
    """In one process the n-th of such calls says that the disk is full."""
    own, seen = getattr(os, call), 0

    def fails(*given: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if world().rank == rank and seen >= n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(*given, **named)

    setattr(os, call, fails)
    try:
        yield
    finally:
        setattr(os, call, own)


def _full_disk(folder: Path, spread: bool, rank: int, call: str, n: int, background: bool) -> list[Any]:
    """A whole checkpoint, then one that fails in one process: what each raises, and where."""
    _saved(folder, spread, steps=1)
    model, state = _state(spread)
    saver = Saver(folder, TrainConfig(save_every=1, save_in_background=background), lambda line: None)
    saver.choose()
    assert saver.taken is not None
    state.restore(saver.taken)
    for _ in range(2):
        _advance(model, state)
    where, said = "nowhere", ""
    with _failing(rank, call, n):
        try:
            where = "save"
            saver.save(state, wait=not background)
            where = "check"
            until = time.monotonic() + 20
            while background and time.monotonic() < until:
                saver.check()
                time.sleep(0.01)
            where = "nowhere"
        except InputError as error:
            said = str(error)
    world().barrier()
    _advance(model, state)
    saver.save(state, wait=True)
    saver.close()
    return [where, said]


def _background(folder: Path) -> list[Any]:
    """Saves under way while the processes send messages of their own."""
    model, state = _state(True)
    saver = Saver(folder, TrainConfig(save_every=1, keep_checkpoints=20), lambda line: None)
    truth = []
    own = saving.write

    def late(*given: Any) -> Path:
        time.sleep(0.4)  # until the next step has been done
        return own(*given)

    saving.write = late  # type: ignore[assignment]
    for step in range(4):
        _advance(model, state)
        truth.append(_digest(state))
        saver.save(state, wait=False)
        for number in range(5):
            assert world().gather([step, number]) == [[step, number]] * world().size
        saver.check()
    saver.close()
    saving.write = own
    return truth


# ---------------------------------------------------------------- any number from any number


@pytest.mark.parametrize(
    ("wrote", "over", "reads", "spread"),
    [
        (2, 0, 1, False),
        (1, 0, 2, True),
        (2, 0, 3, True),
        (3, 0, 2, True),
        (2, 0, 2, True),
        (2, 0, 2, False),
        (4, 2, 2, True),
        (2, 0, 4, True),
    ],
)
def test_it_loads_at_another_number(
    wrote: int, over: int, reads: int, spread: bool, processes: Processes, tmp_path: Path
) -> None:
    written = processes.run(_saved, size=wrote, folder=tmp_path, spread=wrote > 1, over=over)
    assert all(found == written[0] for found in written)
    newest = checkpoints(tmp_path)[-1]
    files = sorted(p.name for p in newest.iterdir())
    count = over or wrote
    own = [piece_name(n + 1, count) for n in range(count)] if wrote > 1 else ["tensors.safetensors"]
    assert files == sorted(["checksums.json", "state.json", *own])
    found = processes.run(_loaded, size=reads, folder=tmp_path, spread=spread, over=2 if reads == 4 else 0)
    for one in found:
        assert one["came"] == written[0][-1]
        assert one["next"] == found[0]["next"]
        assert one["damaged"] == {}
    parts = {1: 1, 2: 2, 3: 3, 4: 2}[reads] if spread else 1
    for name, rows in ROWS.items():
        most = -(-rows // parts)
        for key in ("master", "exp_avg", "exp_avg_sq", "extra.reference"):
            assert max(one["read"][f"{key}.{name}"] for one in found) == most, f"{key}.{name}"


def test_two_processes_go_on_bit_for_bit(processes: Processes, tmp_path: Path) -> None:
    straight = processes.run(_saved, folder=tmp_path / "straight", spread=True, steps=3)
    processes.run(_saved, folder=tmp_path / "stopped", spread=True, steps=2)
    for one in processes.run(_loaded, folder=tmp_path / "stopped", spread=True):
        assert one["next"] == straight[0][-1]


def test_replicated_weights_leave_what_one_process_leaves(processes: Processes, tmp_path: Path) -> None:
    """Byte for byte, but for the seconds."""
    processes.run(_saved, folder=tmp_path / "two", spread=False)
    processes.run(_saved, folder=tmp_path / "one", spread=False, size=1)
    for checkpoint in checkpoints(tmp_path / "one"):
        twin = tmp_path / "two" / checkpoint.name
        assert {p.name for p in twin.iterdir()} == {p.name for p in checkpoint.iterdir()}
        for file in checkpoint.iterdir():
            assert (twin / file.name).read_bytes() == file.read_bytes(), file.name


def test_only_what_is_needed_stays(processes: Processes, tmp_path: Path) -> None:
    processes.run(_saved, folder=tmp_path, spread=True, steps=4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


# ---------------------------------------------------------------- beside the training


def test_in_the_background_it_is_the_moment_that_is_saved(processes: Processes, tmp_path: Path) -> None:
    truth = processes.run(_background, folder=tmp_path)[0]
    assert [p.name for p in checkpoints(tmp_path)] == [f"step-{n + 1:08d}" for n in range(4)]
    for checkpoint in checkpoints(tmp_path):
        verify(checkpoint)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    assert processes.run(_loaded, folder=tmp_path, spread=True)[1]["came"] == truth[1]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("spread", "rank", "call", "n"),
    [
        (True, 1, "fsync", 1),
        (True, 0, "fsync", 1),
        (True, 0, "fsync", 3),
        (True, 0, "rename", 1),
        (False, 0, "fsync", 1),
    ],
)
def test_a_full_disk_in_one_process_is_said_by_all(
    spread: bool, rank: int, call: str, n: int, background: bool, processes: Processes, tmp_path: Path
) -> None:
    found = processes.run(
        _full_disk, folder=tmp_path, spread=spread, rank=rank, call=call, n=n, background=background
    )
    assert found[0] == found[1], "one says something else, or elsewhere"
    where, said = found[0]
    assert where == ("check" if background else "save")
    assert "cannot save step 3: " in said
    assert "No space left on device" in said
    assert f"process {rank}: " in said or not spread
    assert said.endswith("are free); earlier ones are kept")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-00000001", "step-00000004"], "what failed is gone, and the next save works"
    for checkpoint in checkpoints(tmp_path):
        verify(checkpoint)


# ---------------------------------------------------------------- damage


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    file.write_bytes(bytes([*file.read_bytes()[:-1], file.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("spoil", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", [piece_name(1, 2), piece_name(2, 2), "state.json", "checksums.json"])
def test_a_damaged_file_is_found_by_all(
    name: str, spoil: Callable[[Path], Any], saved_by_two: Path, processes: Processes, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_by_two, tmp_path / "copy"))
    newest = checkpoints(folder)[-1]
    spoil(newest / name)
    alone, damaged = newest_good(folder)
    assert alone is not None
    assert alone.name == "step-00000001"
    assert name in damaged[newest]
    for one in processes.run(_loaded, folder=folder, spread=True):
        assert one["step"] == 2
        assert one["damaged"] == {"step-00000002": damaged[newest]}


@pytest.fixture(scope="module")
def saved_by_two(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("spread")
    processes.run(_saved, folder=folder, spread=True)
    return folder


def test_a_list_of_rows_that_fits_no_files_is_damage(saved_by_two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_by_two, tmp_path / "copy"))
    newest = checkpoints(folder)[-1]
    values = contents(newest)
    del values["format"]
    name = next(iter(values["rows"]))
    for rows in ([3], [3, -1], [3, 2.0], [3, 1, 1], 5, [True, 4], []):
        (newest / "checksums.json").write_bytes(sealed({**values, "rows": {**values["rows"], name: rows}}))
        with pytest.raises(Damaged, match=r"checksums\.json: checksum"):
            verify(newest)
    (newest / "checksums.json").write_bytes(sealed({k: v for k, v in values.items() if k != "rows"}))
    with pytest.raises(Damaged, match=r"checksums\.json: checksum"):
        verify(newest)
    (newest / "checksums.json").write_bytes(sealed(values))
    verify(newest)
    assert json.loads((newest / "checksums.json").read_text())["rows"]["master.0.weight"] == [3, 2]


def test_rows_are_there_once() -> None:
    assert row_counts([{"a": [0, 3], "b": [0, 0]}, {"a": [3, 5]}]) == {"a": [3, 2], "b": [0, 0]}
    for second in ([2, 5], [4, 5]):
        with pytest.raises(OSError, match="a: row"):
            row_counts([{"a": [0, 3]}, {"a": second}])
