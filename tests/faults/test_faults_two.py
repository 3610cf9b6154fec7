"""A run of two processes of which SIGKILL ends one or both: what is left goes on, and as if nothing had been.

``make faults`` does the same at random places. Where one is killed the other ends by itself, with code 75.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults_runs import World, checkpoints, chosen, kill, logged

PLACES: dict[str, tuple[str, int, bool, dict[str, Any], list[str], int]] = {
    # The case, the process that is killed, whether the other is too, where; the checkpoints that are then
    # there, and the last step that the log may have (−1: any, since it is saved beside the training).
    "a piece is half written": (
        "dpo sharded",
        1,
        False,
        kill("write", n=3, when="middle", path="checkpoints/*4*/tensors-00002*"),
        ["step-00000002", "step-00000003"],
        -1,
    ),
    "before the checkpoint has its name": (
        "grpo sharded",
        0,
        True,
        kill("rename", path="checkpoints/step-00000004"),
        ["step-00000002"],
        -1,
    ),
    "the other is behind its sync": (
        "dpo sharded",
        1,
        True,
        kill("sync", when="after", path="checkpoints/*4*/tensors-00002*"),
        ["step-00000002", "step-00000003"],
        -1,
    ),
    "the first writes for both": (
        "dpo two",
        0,
        False,
        kill("write", n=4, when="middle", path="checkpoints/*4*/tensors*"),
        ["step-00000002"],
        -1,
    ),
    "in a step": ("dpo two", 1, False, kill("backward", n=5, when="after"), [], 5),
    "both in a step": ("ppo two", 0, True, kill("adam", n=9, when="after"), [], 5),
    "the model is half written": (
        "dpo sharded",
        0,
        False,
        kill("tensors", when="middle", path="*model*"),
        [],
        6,
    ),
}
SHORT = ["a piece is half written", "before the checkpoint has its name", "the first writes for both"]


@pytest.mark.parametrize("place", chosen(PLACES, SHORT))
def test_killed(place: str, world: World, out: Path) -> None:
    name, rank, both, fault, saved, last = PLACES[place]
    ended = world.run(name, out, faults=[fault], rank=rank, both=both)
    assert ended.statuses[rank] == -9, f"the fault did not come: {ended.err}"
    assert ended.statuses[1 - rank] == (-9 if both else 75), ended.err
    if saved:
        assert [checkpoint for checkpoint in checkpoints(out) if checkpoint in saved] == saved
        assert "step-00000004" not in checkpoints(out)
    if last >= 0:
        assert (logged(out) or [0])[-1] <= last
    world.finish(name, out)
