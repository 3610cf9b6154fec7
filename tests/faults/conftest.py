"""One server of forked runs for all tests of this folder, and the runs to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults_runs import WAITING, Server, World, checkpoints, copied, kill


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    server = Server(folder)
    yield World(folder, server)
    server.close()


@pytest.fixture
def out(world: World) -> Path:
    """A run directory that is not there yet."""
    return world.scratch() / "run"


@pytest.fixture(scope="session")
def stopped(world: World) -> Callable[..., Path]:
    """``stopped("sft")``: a copy of a run killed in its last step, with checkpoints of steps 2 and 4."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = world.scratch() / "run"
            ended = world.run(name, made[name], *WAITING, faults=[kill("adam", 6)])
            assert ended.status == -9, ended.err
            assert checkpoints(made[name]) == ["step-00000002", "step-00000004"]
        return copied(made[name], world.scratch() / "run")

    return make
