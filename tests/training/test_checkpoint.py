"""Checkpoints on disk: whole or not believed, whatever was killed or spoilt; and which of them stay."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_states import advance, everything, group, new

from trimtab.errors import InputError
from trimtab.registry.files import write_atomic, write_synced
from trimtab.training import checkpoint as checkpoint_module
from trimtab.training.checkpoint import (
    SUMS,
    TENSORS,
    Damaged,
    checkpoints,
    contents,
    newest_good,
    sealed,
    surplus,
    tensor_file,
    verify,
    write,
)
from trimtab.training.config import TrainConfig
from trimtab.training.saver import Saver

FILES = ("tensors.safetensors", "state.json", "checksums.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 2 and 10."""
    folder = tmp_path / "checkpoints"
    model, state = new()
    state.pending = [group()]
    for step in (2, 10):
        advance(model, state)
        state.step = step
        write(folder, state.snapshot({"loss": 1.5, "kl": float("nan")}))
    return folder


# ---------------------------------------------------------------- the files


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(d): torch.randn(5, 3).to(d) for d in checkpoint_module.DTYPES if d != torch.bool}
    tensors |= {
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(3, 2).T,
        'a "quoted" ü': torch.ones(1, dtype=torch.bfloat16),
        "odd": torch.arange(3, dtype=torch.uint8),
    }
    size, _ = write_synced(tmp_path / TENSORS, tensor_file(tensors))
    assert size == (tmp_path / TENSORS).stat().st_size
    read = load_file(tmp_path / TENSORS)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_checkpoints_are_ordered_by_step(saved: Path) -> None:
    (saved / "step-100000000").mkdir()
    (saved / "step-00000011").write_text("a file")
    (saved / "step-00000012.old").mkdir()
    (saved / ".step-00000013.partial").mkdir()
    assert [p.name for p in checkpoints(saved)] == ["step-00000002", "step-00000010", "step-100000000"]
    assert checkpoints(saved / "nowhere") == []
    assert newest_good(saved / "nowhere") == (None, {})


def test_every_single_byte_is_covered(saved: Path) -> None:
    """One bit of each byte of each file, one at a time."""
    newest = saved / "step-00000010"
    rng = random.Random(0)
    for name in FILES:
        whole = (newest / name).read_bytes()
        for place in range(len(whole)):
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << rng.randrange(8)
            (newest / name).write_bytes(spoilt)
            with pytest.raises(Damaged, match=r"checksum|format"):
                verify(newest)
        (newest / name).write_bytes(whole)
    assert verify(newest)["metrics"]["loss"] == 1.5


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def noise(file: Path) -> None:
    file.write_bytes(random.Random(1).randbytes(file.stat().st_size))


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


SPOIL: list[Callable[[Path], Any]] = [empty, cut, longer, noise, a_folder, Path.unlink]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", FILES)
def test_the_newest_whole_one_is_taken(name: str, spoil: Callable[[Path], Any], saved: Path) -> None:
    older, newest = checkpoints(saved)
    assert newest_good(saved) == (newest, {})
    spoil(newest / name)
    good, damaged = newest_good(saved)
    assert good == older
    assert damaged.keys() == {newest}
    assert name in damaged[newest]
    spoil(older / name)
    before = sorted(p for p in saved.rglob("*"))
    with pytest.raises(
        InputError, match=rf"no checkpoint is whole: step-00000010 \({name}.*step-00000002 \("
    ):
        newest_good(saved)
    assert sorted(p for p in saved.rglob("*")) == before, "nothing is deleted"


def test_files_of_two_checkpoints_make_none(saved: Path) -> None:
    older, newest = checkpoints(saved)
    copy = saved / "step-00000011"
    shutil.copytree(newest, copy)
    with pytest.raises(Damaged, match="it is that of step 10"):
        verify(copy)
    for name in FILES[:2]:
        shutil.rmtree(copy)
        shutil.copytree(newest, copy)
        values = contents(newest)
        del values["format"]
        (copy / SUMS).write_bytes(sealed({**values, "step": 11}))
        verify(copy)
        shutil.copy(older / name, copy / name)
        with pytest.raises(Damaged, match=name):
            verify(copy)


def test_checksums_that_name_other_files_are_damage(saved: Path) -> None:
    _, newest = checkpoints(saved)
    values = contents(newest)
    del values["format"]
    for files in ({}, {"../step-00000002/state.json": values["files"]["state.json"]}, [], None):
        (newest / SUMS).write_bytes(sealed({**values, "files": files}))
        with pytest.raises(Damaged, match=r"checksums\.json: checksum"):
            verify(newest)


def test_another_format_is_refused_in_one_line(saved: Path) -> None:
    older, newest = checkpoints(saved)
    (newest / SUMS).unlink()
    (newest / "state.json").write_text('{"format": 1, "step": 10}')
    values = json.loads((older / SUMS).read_text())
    (older / SUMS).write_text(json.dumps(values | {"format": 3}))
    with pytest.raises(
        InputError, match=r"step-00000010 \(format 1 is not the 2 read here\), step-00000002 \(format 3 is"
    ):
        newest_good(saved)


# ---------------------------------------------------------------- kills and failing disks


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def fail_at(n: int, patched: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> list[str]:
    """The n-th of the calls that change the disk raises (0: none); the calls so far.

    A file whose sync does not come back keeps an arbitrary part of what was written.
    """
    done: list[str] = []
    rng = random.Random(n)

    def wrap(name: str) -> None:
        own = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            if len(done) == n:
                if name == "fsync" and (size := os.fstat(arguments[0]).st_size) and rng.random() < 0.7:
                    with contextlib.suppress(OSError):  # a folder has none
                        os.ftruncate(arguments[0], rng.randrange(size))
                raise error()
            return None if name == "fsync" else own(*arguments, **named)

        patched.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return done


def sitting(folder: Path, upto: int, reached: list[int], snaps: dict[int, Any] | None = None) -> None:
    """Go on from the newest whole checkpoint to step ``upto``, saving every step."""
    train = TrainConfig(save_every=1, keep_checkpoints=2, keep_every=3)
    saver = Saver(folder, train, lambda line: None)
    saver.choose()
    model, state = new()
    if saver.taken is not None:
        state.restore(saver.taken)
    while state.step < upto:
        advance(model, state)
        state.pending = [group(str(state.step))]
        if snaps is not None:
            snaps[state.step] = everything(state)
        saver.save(state, wait=True)
        reached.append(state.step)


def test_a_kill_at_any_call_leaves_a_whole_checkpoint_and_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four saves, the first over a damaged checkpoint; behind each kill a sitting ends the run."""
    start, straight = tmp_path / "start", tmp_path / "straight"
    truth: dict[int, Any] = {}
    with monkeypatch.context() as patched:
        fail_at(0, patched, Killed)
        sitting(start, 4, [], truth)
        cut(start / "step-00000004" / "state.json")
        shutil.copytree(start, straight)
    with monkeypatch.context() as patched:
        calls = fail_at(0, patched, Killed)
        sitting(straight, 7, [], truth)
    names = [p.name for p in checkpoints(straight)]
    assert names == ["step-00000003", "step-00000006", "step-00000007"]
    assert len(calls) > 40

    for n in range(1, len(calls) + 1):
        folder = tmp_path / f"kill-{n}"
        shutil.copytree(start, folder)
        reached = [3]
        with monkeypatch.context() as patched:
            fail_at(n, patched, Killed)
            with pytest.raises(Killed):
                sitting(folder, 7, reached)
        good, _ = newest_good(folder)
        assert good is not None
        _, state = new(seed=9)
        state.restore(good)
        assert state.step >= reached[-1], f"{calls[n - 1]}, call {n}: a save that had returned is gone"
        assert everything(state) == truth[state.step], f"{calls[n - 1]}, call {n}"
        with monkeypatch.context() as patched:
            fail_at(0, patched, Killed)
            sitting(folder, 7, [])
        _, state = new(seed=9)
        state.restore(folder / "step-00000007")
        assert everything(state) == truth[7]
        # Killed behind the last rename the folder may keep one more than asked, never one fewer.
        left = {p.name for p in checkpoints(folder)}
        assert left >= set(names)
        assert len(left - set(names)) <= 1
        for checkpoint in checkpoints(folder):
            verify(checkpoint)
        shutil.rmtree(folder)


def test_a_call_that_fails_is_one_line_and_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    sitting(start, 3, [])
    with monkeypatch.context() as patched:
        shutil.copytree(start, tmp_path / "straight")
        calls = fail_at(0, patched, Killed)
        sitting(tmp_path / "straight", 5, [])
    seen = set()
    for n, call in enumerate(calls, start=1):
        folder = tmp_path / f"full-{n}"
        shutil.copytree(start, folder)
        reached = [3]
        with monkeypatch.context() as patched:
            fail_at(n, patched, lambda: OSError(28, "No space left on device"))
            said = ""
            try:
                sitting(folder, 5, reached)
            except InputError as error:
                said = str(error)
        if said:
            seen.add(call)
            assert f"step {reached[-1] + 1}" in said
            assert "No space left on device" in said
            if "cannot save" in said:
                assert said.endswith("are free); earlier ones are kept")
                assert not list(folder.glob(".*.partial")), f"{call}, call {n}"
        else:
            assert call in ("unlink", "rmdir"), "only what cannot be deleted may stay without a word"
        good, damaged = newest_good(folder)
        assert good is not None
        assert not damaged
        assert int(good.name[5:]) >= reached[-1]
    assert seen >= {"fsync", "rename", "mkdir"}


def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lineage.json"
    write_atomic(file, "old")
    outcomes = []
    for kind in (Killed, lambda: OSError(28, "No space left on device")):
        for n in itertools.count(1):
            write_atomic(file, "old")
            with monkeypatch.context() as patched:
                calls = fail_at(n, patched, kind)
                try:
                    write_atomic(file, "new ü")
                except Killed:
                    outcomes.append(file.read_text(encoding="utf-8"))
                except OSError:
                    outcomes.append(file.read_text(encoding="utf-8"))
                    left = [p.name for p in tmp_path.iterdir()]
                else:
                    assert len(calls) == n - 1
                    break
    assert outcomes == ["old", "old", "new ü"] * 2
    assert left == ["lineage.json"]
    assert file.read_text(encoding="utf-8") == "new ü"


def test_files_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sync a power cut may leave the new name with empty files behind it."""
    order: list[str] = []
    own_sync, own_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        own_sync(handle)

    def rename(old: Path, new: Path) -> None:
        order.append(f"{Path(old).name} -> {Path(new).name}")
        own_rename(old, new)

    if not Path("/proc/self/fd").exists():
        pytest.skip("which file a handle belongs to is read from /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write(tmp_path / "checkpoints", new()[1].snapshot({}))
    assert order == [
        *(f"sync {name}" for name in FILES),
        "sync .step-00000000.partial",
        ".step-00000000.partial -> step-00000000",
        "sync checkpoints",
    ]


# ---------------------------------------------------------------- which stay


def test_which_checkpoints_stay() -> None:
    """Every choice of options over short histories, against the sentence in the documentation."""
    for last, keep, every, best in itertools.product(range(7), (1, 2, 3), (0, 2, 3), ("", "m", "-m")):
        steps = list(range(1, last + 1))
        for values in itertools.product((0.0, 1.0, None), repeat=min(last, 4)):
            known = {step: value for step, value in zip(steps, values, strict=False) if value is not None}
            stay = {s for s in steps if s > last - keep or (every and s % every == 0)}
            if best and known:
                top = (max if best == "m" else min)(known.values())
                stay.add(min(s for s, value in known.items() if value == top))
            assert surplus(reversed(steps), keep, every, best, known) == set(steps) - stay


def test_what_is_not_a_number_is_never_the_best() -> None:
    values = {1: float("nan"), 2: 0.5, 3: float("inf"), 4: float("-inf")}
    assert surplus([1, 2, 3, 4, 5], 1, 0, "m", values) == {1, 3, 4}
    assert surplus([1, 2, 3, 4, 5], 1, 0, "-m", values) == {1, 3, 4}
