"""The tiny world that the tests of whole runs share; see ``tiny.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab.kernels import build

# The store in which processes meet looks up their names; a resolver that does not answer must not take the
# 5 to 10 s that tests of lost processes have.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model; tests must not change it."""
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a file of each kind of feedback and rewards.py; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    tiny.write_rows(folder / "pairs.jsonl", tiny.pairs())
    tiny.write_rows(folder / "rankings.jsonl", tiny.rankings())
    tiny.write_rows(folder / "labels.jsonl", tiny.labels())
    tiny.write_rows(folder / "steps.jsonl", tiny.steps())
    tiny.write_rows(folder / "demonstrations.jsonl", tiny.demonstrations())
    tiny.write_rows(folder / "prompts.jsonl", tiny.prompts())
    # A share of the response's words that are vowels: every response of some length gets some reward.
    body = "return sum(w in 'aeiou' for w in response.split()) / max(len(response.split()), 1)"
    tiny.write_reward(folder / "rewards.py", body)
    return folder


@pytest.fixture
def configured(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """``configured("dpo", train__steps=3)``: a Config on the tiny world, its run in ``tmp_path/NAME``."""

    def make(name: str, out: str = "", **changed: Any) -> Any:
        return tiny.configure(name, tiny_model, tiny_data, tmp_path / (out or name), **changed)

    return make


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run sets the number of threads and the use of kernels for the whole process; tests do not inherit
    each other's.
    """
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    build.use(True)
