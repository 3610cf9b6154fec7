"""A full disk and a read-only folder: one line and exit code 2, nothing lost, and the run goes on later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults_runs import RESUME, Server, World, checkpoints, chosen, fault, logged

SAVED_2 = {"kind": "rename", "when": "after", "path": "checkpoints/step-00000002"}
PLACES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    # From when on there is no room; what the line names; the checkpoints that are then there.
    "a checkpoint": (SAVED_2, "step 4", ["step-00000002"]),
    "model": (
        {"kind": "tensors", "path": "*model*"},
        "model",
        ["step-00000004", "step-00000006"],
    ),
}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose runs see a disk of 4 MiB."""
    if shutil.which("unshare") is None:
        pytest.skip("no tmpfs: there is no `unshare` command")
    try:
        server = Server(tmp_path_factory.mktemp("disk"), room_kb=4096)
    except OSError:
        pytest.skip("no tmpfs can be mounted here, neither as root nor in a user namespace")
    yield server
    server.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk(place: str, world: World, small_disk: Server) -> None:
    where, _, saved = PLACES[place]
    out = small_disk.folder / place.replace(" ", "-") / "run"
    small_disk.seen(out).parent.mkdir()
    how: dict[str, Any] = {"server": small_disk, "scratch": world.scratch()}
    ended = world.run("sft", out, faults=[{**where, "do": "fill"}], **how)
    assert ended.status == 2, ended.err
    assert "No space left" in ended.error
    assert checkpoints(small_disk.seen(out)) == saved
    (small_disk.seen(out).parent / "filler").unlink()
    world.finish("sft", out, **how)


@pytest.mark.parametrize("place", chosen(PLACES, ["a checkpoint"]))
def test_no_file_may_grow(place: str, world: World, out: Path) -> None:
    """A limit on the size of files refuses as a full disk does, where no disk can be mounted."""
    where, named, saved = PLACES[place]
    ended = world.run("sft", out, faults=[{**where, "do": "size:20000"}])
    assert ended.status == 2, ended.err
    assert named in ended.error
    assert checkpoints(out) == saved
    world.finish("sft", out)


@pytest.mark.parametrize("do", chosen(["size", "ENOSPC"], ["size"]))
def test_no_room_for_the_log(do: str, world: World, out: Path) -> None:
    ended = world.run("grpo", out, faults=[fault("write", do, n=4, path="metrics*") | {"lasting": True}])
    assert ended.status == 2, ended.err
    assert "metrics.jsonl" in ended.error
    assert checkpoints(out) == ["step-00000002"]
    assert logged(out) == [0, 1, 2]
    world.finish("grpo", out)


def test_no_room_at_all(world: World, out: Path) -> None:
    ended = world.run("sft", out, faults=[fault("mkdir", "ENOSPC")])
    assert ended.status == 2
    assert "No space left" in ended.error
    world.finish("sft", out)


@pytest.mark.parametrize("when", ["at the start", "at a checkpoint", "at the end"])
def test_a_read_only_folder(when: str, world: World) -> None:
    out, scratch = world.scratch() / "run", world.scratch()
    faults: list[dict[str, Any]] = []
    if when == "at the start":
        out.parent.chmod(0o555)
    elif when == "at a checkpoint":
        faults.append({**SAVED_2, "do": "chmod:555:checkpoints"})
    else:
        faults.append(fault("adam", "chmod:555:.", n=6, when="after"))
    ended = world.run("sft", out, faults=faults, powerless=True, scratch=scratch)
    for folder in (out.parent, out, out / "checkpoints"):
        if folder.exists():
            folder.chmod(0o755)
    assert ended.status == 2, ended.err
    assert "Permission denied" in ended.error
    assert str(out) in ended.error
    if when == "at a checkpoint":
        assert "step 4" in ended.error
        assert checkpoints(out) == ["step-00000002"]
    world.finish("sft", out)


def test_a_folder_that_is_read_only_at_resume(world: World, stopped: Any) -> None:
    out = stopped("sft")
    before = contents(out)
    out.chmod(0o555)
    ended = world.run("sft", out, *RESUME, powerless=True)
    out.chmod(0o755)
    assert ended.status == 2, ended.err
    assert str(out) in ended.error
    assert contents(out) == before
    world.finish("sft", out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run directory."""
    found = [Path(folder) / file for folder, _, files in os.walk(out) for file in files]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}
