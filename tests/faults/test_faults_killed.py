"""A process that SIGKILL ends at the worst places, and the run that goes on from what it left.

``make faults`` does the same at random places of every method; these are the places around each sync, rename
and removal, in the middle of a step, and where a resumed run rewrites its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults_runs import LONG, RESUME, World, checkpoints, chosen, kill, logged

SAVED = "checkpoints/*step-00000004*"
BESIDE = range(4, 7)
"""A checkpoint is written, and an old one removed, beside the training: at most until the next one is due."""
PLACES: list[tuple[str, str, dict[str, Any], list[str], range]] = [
    # What it is, the case, where; the checkpoints that are then there, and the last step in the log.
    (
        "the tensors are half written",
        "reward",
        kill("write", n=7, when="middle", path="checkpoints/*3*/tensors*"),
        ["step-00000001", "step-00000002"],
        range(3, 5),
    ),
    (
        "before the tensors are synced",
        "sft",
        kill("sync", path=f"{SAVED}tensors*"),
        ["step-00000002"],
        BESIDE,
    ),
    (
        "after the tensors are synced",
        "sft",
        kill("sync", when="after", path=f"{SAVED}tensors*"),
        ["step-00000002"],
        BESIDE,
    ),
    (
        "before the checkpoint has its name",
        "grpo",
        kill("rename", path="checkpoints/step-00000004"),
        ["step-00000002"],
        BESIDE,
    ),
    (
        "after the checkpoint has its name",
        "ppo",
        kill("rename", when="after", path="checkpoints/step-00000004"),
        ["step-00000002", "step-00000004"],
        BESIDE,
    ),
    (
        "an old checkpoint is half removed",
        "dpo",
        kill("remove", n=2, path="checkpoints/*step-00000002*"),
        ["step-00000004"],
        BESIDE,
    ),
    ("between the critic's step and the policy's", "ppo", kill("adam", n=9, when="after"), [], range(4, 5)),
    (
        "in the middle of a line of the log",
        "sft",
        kill("write", n=5, when="middle", path="metrics*"),
        [],
        range(3, 4),
    ),
    ("the model is half written", "sft", kill("tensors", when="middle", path="*model*"), [], range(6, 7)),
    (
        "the lineage is half written",
        "sft",
        kill("write", n=4, when="middle", path="*lineage*"),
        [],
        range(6, 7),
    ),
]


@pytest.mark.parametrize(
    ("name", "fault", "saved", "last"), [place[1:] for place in PLACES], ids=[place[0] for place in PLACES]
)
def test_killed(
    name: str, fault: dict[str, Any], saved: list[str], last: range, world: World, out: Path
) -> None:
    ended = world.run(name, out, faults=[fault])
    assert ended.status == -9, f"the fault did not come: {ended.err}"
    if saved:
        assert checkpoints(out) == saved
    assert logged(out)[-1] in last
    world.finish(name, out)


@pytest.mark.parametrize("name", chosen(["dpo", "grpo", "dpo adapter"], ["dpo"]))
def test_killed_between_two_micro_batches(name: str, world: World, out: Path) -> None:
    """Half of a step's gradient is there, and is lost with the process."""
    events = [e for e in world.timed(name)[1].events if e.startswith(("backward after", "adam before"))]
    between = [i for i in range(len(events) - 1) if events[i : i + 2] == ["backward after "] * 2]
    n = 1 + sum(event.startswith("backward") for event in events[: between[-1]])
    ended = world.run(name, out, faults=[kill("backward", n, "after")])
    assert ended.status == -9, ended.err
    world.finish(name, out)


@pytest.mark.parametrize("kind", chosen(["write", "rename"], ["write"]))
@pytest.mark.parametrize("file", ["config.toml", "metrics.jsonl"])
def test_killed_while_a_resumed_run_rewrites_its_files(
    kind: str, file: str, world: World, stopped: Any
) -> None:
    out = stopped("sft")
    when = "middle" if kind == "write" else "before"
    ended = world.run("sft", out, *RESUME, faults=[kill(kind, when=when, path=f"*{file}*")])
    assert ended.status == -9, ended.err
    world.finish("sft", out)


@pytest.mark.skipif(not LONG, reason="takes 5 s: TRIMTAB_FAULTS=long")
def test_a_new_process_goes_on(world: World, stopped: Any) -> None:
    """Not forked: other hash seeds, other addresses."""
    world.finish("grpo", stopped("grpo"), new=True)
