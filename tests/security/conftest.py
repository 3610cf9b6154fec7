"""What the tests of untrusted input share: a trap, its trace, a judge that answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trap import Trap

sys.path.insert(0, str(Path(__file__).parent.parent / "rewards"))  # judge_server


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile input tries to make; the test ends by looking that it is not there."""
    file = tmp_path / "trace"
    yield file
    assert not file.exists(), "code that came with the input was run"


@pytest.fixture
def trap(trace: Path) -> Trap:
    return Trap(trace)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from judge_server import Server

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    made = Server()
    yield made
    made.close()
