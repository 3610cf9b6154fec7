"""Each file of a run directory truncated, altered, removed or replaced, and then a resume."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults_runs import RESUME, World, checkpoints, chosen, logged, same
from safetensors.torch import load_file

DRAW = random.Random(5)
NEWEST = "checkpoints/step-00000004"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit somewhere: in a header, a number, a checksum."""
    content = bytearray(path.read_bytes())
    content[DRAW.randrange(len(content))] ^= 1 << DRAW.randrange(8)
    path.write_bytes(content)


def replace(path: Path) -> None:
    path.write_bytes(DRAW.randbytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "flipped": flip,
    "replaced": replace,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_good_checkpoint_is_taken(damage: str, world: World, stopped: Any) -> None:
    straight = world.straight("sft")
    for file in sorted(p.name for p in (stopped("sft") / NEWEST).iterdir()):
        out = stopped("sft")
        DAMAGES[damage](out / NEWEST / file)
        ended = world.run("sft", out, *RESUME)
        assert ended.status == 0, f"{file}: {ended.err}"
        assert "step-00000004 is damaged (" in ended.err, f"{file}: {ended.err}"
        assert "going on from step-00000002" in ended.err
        same(straight, out)


def test_all_checkpoints_damaged(world: World, stopped: Any) -> None:
    out = stopped("sft")
    files = sorted(p for p in (out / "checkpoints").rglob("*") if p.is_file())
    for path in files:
        flip(path)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    ended = world.run("sft", out, *RESUME)
    assert ended.status == 2, ended.err
    assert "no checkpoint is whole: step-00000004 (" in ended.error
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_run(world: World, stopped: Any) -> None:
    """Files that are whole, each for itself, but of two checkpoints."""
    out = stopped("sft")
    shutil.copy(out / "checkpoints/step-00000002/tensors.safetensors", out / NEWEST / "tensors.safetensors")
    ended = world.finish("sft", out)
    assert "step-00000004 is damaged (tensors.safetensors: checksum)" in ended.err


@pytest.mark.parametrize("damage", chosen(DAMAGES, ["replaced"]))
@pytest.mark.parametrize("file", ["config.toml", "lineage.json"])
def test_what_a_run_writes_again(file: str, damage: str, world: World, stopped: Any) -> None:
    """Neither is read by a resume: both are made new."""
    out = stopped("sft")
    if not (out / file).exists():
        (out / file).write_text("{" * 100)
    DAMAGES[damage](out / file)
    world.finish("sft", out)


@pytest.mark.parametrize("damage", chosen(DAMAGES, ["cut", "replaced"]))
def test_a_damaged_log(damage: str, world: World, stopped: Any) -> None:
    """Lines that are lost stay lost, what follows is right, and the model is the same."""
    out = stopped("sft")
    assert logged(out) == [0, 1, 2, 3, 4, 5]
    DAMAGES[damage](out / "metrics.jsonl")
    ended = world.run("sft", out, *RESUME)
    assert ended.status == 0, ended.err
    assert logged(out)[-2:] == [5, 6]
    assert checkpoints(out)[-1] == "step-00000006"
    ours, theirs = (load_file(o / "model/model.safetensors") for o in (out, world.straight("sft")))
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())


def test_a_torn_last_line_of_the_log(world: World, stopped: Any) -> None:
    out = stopped("sft")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    world.finish("sft", out)
