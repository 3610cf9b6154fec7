"""Tests of many processes; ``processes.py`` says how to use the pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from parity import Runs, uneven
from processes import Processes
from ranks import Ranks


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Processes that run a function together."""
    pool = Processes()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs of several processes that can be killed; see ``ranks.py``."""
    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 11 rows of each kind of feedback, of very different lengths."""
    return uneven(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="session")
def runs(
    processes: Processes, tiny_model: Path, uneven_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """``runs("dpo", 2)`` runs a method on 2 processes; see ``parity.py``."""
    return Runs(processes, tiny_model, uneven_data, tmp_path_factory.mktemp("runs"))
