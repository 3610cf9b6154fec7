"""A run stopped on some number of processes goes on on another, and ends as one that was left alone.

On the same number bit for bit; on another within 1e-9 in fp64, since sums are then taken in another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import Processes
from safetensors.torch import load_file

from trimtab.training.checkpoint import checkpoints, piece_name, verify

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"train__micro_batch_tokens": 24, "parallel__weights": "replicate"}),
    "ppo sharded": ("ppo", {"ppo__rollout_groups": 8, "parallel__weights": "shard"}),
    "grpo sharded": (
        "grpo",
        {
            "grpo__rollout_groups": 8,
            "grpo__refresh_reference_every": 2,
            "grpo__reference_average": 0.5,
            "parallel__weights": "shard",
        },
    ),
    "dpo adapter sharded": (
        "dpo",
        {"adapter__kind": "lora", "adapter__rank": 4, "parallel__weights": "shard"},
    ),
}
"""Name → method and options. The critic, a refreshed reference and groups that wait are part of the state."""


def _ran(name: str, model: Path, data: Path, out: Path, stop: int = 0, resume: bool = False) -> list[Any]:
    """One sitting in this process: the metrics of the whole log."""
    method, changed = CASES[name]
    more: dict[str, Any] = {"model__dtype": "float64", "train__save_every": 2, "train__kernels": "auto"}
    more |= {"run__resume": resume, "data__heldout_fraction": 0.3, "train__eval_every": 5}
    config = tiny.configure(method, model, data, out, **{**changed, **more})
    try:
        _, metrics = tiny.train(config, method, on_eval=tiny.stop_at(stop) if stop else _nothing)
    except KeyboardInterrupt:
        return []
    return tiny.comparable(metrics)


def _nothing(lm: object, heldout: object, done: int) -> dict[str, float]:
    return {}


Ran = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every run of this file: those that were left alone serve several tests."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ran(processes: Processes, tiny_model: Path, tiny_data: Path, folder: Path) -> Ran:
    """``ran("dpo", "NAME", 2)``: a sitting on two processes, in which the others log what the first does."""
    known: dict[str, list[Any]] = {}

    def run(name: str, out: str, size: int, **how: Any) -> list[Any]:
        out = f"{name} {out}"
        if out not in known or how:
            given: dict[str, Any] = {"model": tiny_model, "data": tiny_data, "out": folder / out}
            found = processes.run(_ran, size=size, name=name, **given, **how)
            assert all(one == found[0] for one in found)
            known[out] = found[0]
        return known[out]

    return run


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("dpo", 2, 1),
        ("dpo", 1, 2),
        ("dpo", 2, 2),
        ("ppo sharded", 2, 1),
        ("ppo sharded", 1, 2),
        ("ppo sharded", 2, 2),
        ("grpo sharded", 2, 1),
        ("dpo adapter sharded", 1, 2),
    ],
)
def test_at_another_number(name: str, first: int, then: int, ran: Ran, folder: Path) -> None:
    exact = first == then
    straight = ran(name, "both" if exact else "alone", then if exact else 1)
    again = f"{first} {then}"
    ran(name, again, first, stop=5)
    out, wanted = folder / f"{name} {again}", folder / f"{name} {'both' if exact else 'alone'}"
    newest = checkpoints(out / "checkpoints")[-1]
    assert newest.name == "step-00000004"
    pieces = first == 2 and "sharded" in name
    assert (newest / piece_name(2, 2)).exists() == pieces
    assert (newest / "tensors.safetensors").exists() != pieces
    found = ran(name, again, then, resume=True)
    if exact:
        assert found == straight
    else:
        _close(found, straight)
    _same_model(out, wanted, exact=exact)
    for checkpoint in checkpoints(out / "checkpoints"):
        verify(checkpoint)


def _close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-11, nan_ok=True), (
                f"{theirs['step']} {key}"
            )


def _same_model(ours: Path, theirs: Path, *, exact: bool) -> None:
    """Every file of every model that the run left."""
    for folder in ("model", "critic"):
        if not (theirs / folder).exists():
            continue
        names = {p.name for p in (theirs / folder).iterdir()}
        assert {p.name for p in (ours / folder).iterdir()} == names
        for name in names:
            mine, other = ours / folder / name, theirs / folder / name
            if name.endswith(".safetensors") and not exact:
                read, wanted = load_file(mine), load_file(other)
                assert read.keys() == wanted.keys()
                for key, tensor in wanted.items():
                    torch.testing.assert_close(read[key], tensor, rtol=1e-6, atol=1e-7)
            else:
                assert _digest(mine) == _digest(other), f"{folder}/{name}"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
