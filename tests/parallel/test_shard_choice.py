"""Whether weights are spread: as configured, or by what fits; and options that would do nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.world import World, enter
from trimtab.spread import weights

GIB = 2**30


class _Six(World):
    """Six processes of which this one knows what the others would say: the same."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def _chosen(monkeypatch: pytest.MonkeyPatch, free: int | None, parameters: int | None, **how: Any) -> str:
    spread: list[int] = []
    monkeypatch.setattr(weights, "free_bytes", lambda device: free)

    def spreads(*_: object) -> str:
        spread.append(1)
        return "spread"

    monkeypatch.setattr(weights, "Spread", spreads)
    given = {"frozen": False, "quantised": False, **{k: how.pop(k) for k in list(how) if k in KEYS}}
    before = enter(_Six(0, 6))
    try:
        found, line = weights.choose_weights(
            ParallelConfig(**how), parameters, dtype=torch.bfloat16, device=torch.device("cpu"), **given
        )
    finally:
        enter(before)
    assert (found is None) == (not spread)
    return line


KEYS = ("frozen", "quantised")


def test_what_fits_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 bytes a parameter: two in bf16 for each of two models, 16 of what learns; 0.6 of what is free."""
    line = _chosen(monkeypatch, 40 * GIB, GIB)
    assert line == (
        "weights: each of the 6 processes holds all of them (they take about 20.0 GiB with what learns, and "
        "40.0 are free)"
    )
    assert "spread over 6 processes (they take about 20.0" in _chosen(monkeypatch, 33 * GIB, GIB)


def test_a_frozen_base_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds all of them" in _chosen(monkeypatch, 4 * GIB, GIB, frozen=True)
    assert "spread over 6" in _chosen(monkeypatch, 3 * GIB, GIB, frozen=True)


def test_what_is_asked_for_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "spread over 6 processes (as configured)" in _chosen(monkeypatch, 99 * GIB, 1, weights="shard")
    line = _chosen(monkeypatch, 99 * GIB, 1, weights="shard", shard_over=2)
    assert "spread over 2 processes, in 3 copies" in line
    assert "as configured" in _chosen(monkeypatch, 1, GIB, weights="replicate")


def test_what_cannot_be_told_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "size is not known" in _chosen(monkeypatch, GIB, None)
    assert "free is not known" in _chosen(monkeypatch, None, GIB)


def test_a_quantised_base_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "being quantised" in _chosen(monkeypatch, 1, GIB, quantised=True)
    with pytest.raises(InputError, match="cannot spread a quantised base"):
        _chosen(monkeypatch, 1, GIB, quantised=True, weights="shard")


def test_an_option_without_effect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"parallel.gather has no effect here, since the weights fit"):
        _chosen(monkeypatch, 99 * GIB, GIB, gather="layers")
    for name, value in (("shard_over", 2), ("gather", "whole")):
        with pytest.raises(InputError, match=f"{name} has no effect with weights"):
            load_config(ParallelConfig, None, {"weights": "replicate", name: value})
    with pytest.raises(InputError, match="shard_over = 1"):
        load_config(ParallelConfig, None, {"shard_over": 1})
