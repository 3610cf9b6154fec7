"""Whether weights are spread: as configured, or by what fits; and options that would do nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch

from trimtab.config import load_config
from trimtab.errors import InputError
from trimtab.methods.shared.held import held_by
from trimtab.methods.shared.setup import how_to_load
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.rule import Held
from trimtab.parallel.world import World, enter
from trimtab.planning.processes import held_by as planned
from trimtab.spread import weights
from trimtab.studies.job import job_of
from trimtab.training.run import Run

GIB = 2**30


class _Six(World):
    """Six processes of which this one knows what the others would say: the same."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def _chosen(monkeypatch: pytest.MonkeyPatch, free: int | None, learns: float | None, **how: Any) -> str:
    spread: list[int] = []
    monkeypatch.setattr(weights, "free_bytes", lambda device: free)

    def spreads(*_: object) -> str:
        spread.append(1)
        return "spread"

    monkeypatch.setattr(weights, "Spread", spreads)
    given = {"quantised": False, **{k: how.pop(k) for k in list(how) if k in KEYS}}
    held = None if learns is None else Held(learns, how.pop("frozen", ()))
    before = enter(_Six(0, 6))
    try:
        found, line = weights.choose_weights(
            ParallelConfig(**how), held, dtype=torch.bfloat16, device=torch.device("cpu"), **given
        )
    finally:
        enter(before)
    assert (found is None) == (not spread)
    return line


KEYS = ("before", "quantised")


def test_what_fits_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 bytes of what learns in bf16, and 2 of a frozen model beside it; 0.6 of what is free."""
    two: dict[str, Any] = {"frozen": ((GIB, 2),)}
    line = _chosen(monkeypatch, 40 * GIB, GIB, **two)
    assert line == (
        "weights: each of the 6 processes holds all of them (they take about 20.0 GiB with what learns, and "
        "40.0 are free)"
    )
    assert "spread over 6 processes (they take about 20.0" in _chosen(monkeypatch, 33 * GIB, GIB, **two)
    assert "they take about 18.0 GiB" in _chosen(monkeypatch, 33 * GIB, GIB), "alone it fits"


def test_a_frozen_base_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds all of them" in _chosen(monkeypatch, 4 * GIB, 0, frozen=((GIB, 2),))
    assert "spread over 6" in _chosen(monkeypatch, 3 * GIB, 0, frozen=((GIB, 2),))


def test_a_run_that_goes_on_holds_them_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free by now: what is spread rounds otherwise."""
    assert "spread over 6 processes (as the run" in _chosen(monkeypatch, 99 * GIB, 1, before="shard")
    assert "holds all of them (as the run" in _chosen(monkeypatch, 1, GIB, before="replicate")
    assert "as configured" in _chosen(monkeypatch, 1, GIB, before="replicate", weights="shard")


def test_how_a_run_began_is_a_part_of_its_state(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Of as many processes it goes on so; of others it is decided anew."""
    config = tiny.configure("sft", tiny_model, tiny_data, tmp_path / "run", model__dtype="float32")
    monkeypatch.setattr(weights, "Spread", lambda *_: SimpleNamespace(chosen={}))
    monkeypatch.setattr(weights, "free_bytes", lambda device: 99 * GIB)

    def chosen(**before: Any) -> tuple[Any, dict[str, Any]]:
        run = SimpleNamespace(
            environment=before,
            chosen={},
            say=lambda line: None,
            compute_dtype=lambda *_: torch.float32,
        )
        world = enter(_Six(0, 6))
        try:
            return how_to_load(config, cast(Run, run))["holder"], run.chosen
        finally:
            enter(world)

    assert chosen() == (None, {"weights": "replicate"})
    began = {"weights": "shard", "gather": {"policy": "layers"}}
    holder, kept = chosen(processes=6, **began)
    assert kept == began
    assert holder.chosen is kept["gather"], "what is decided later is kept too"
    assert chosen(processes=4, **began) == (None, {"weights": "replicate"})


REWARD = {"name": "reward_model", "args": {"path": "RM"}}
JUDGED = {"name": "judge", "args": {"kind": "reward_model", "args": {"path": "RM"}}}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("sft", {}),
        ("sft", {"adapter__kind": "lora"}),
        ("dpo", {"dpo__reference": "MODEL"}),
        ("kto", {"kto__reference": "MODEL"}),
        ("reward", {}),
        ("grpo", {"reward__terms": [REWARD], "model__dtype": "float64"}),
        ("grpo", {"grpo__beta": 0.0, "grpo__log_kl": False, "grpo__overlap": True}),
        ("grpo", {"grpo__refresh_reference_every": 2, "grpo__reference_average": 0.5}),
        ("online-dpo", {"reward__terms": [{**JUDGED}]}),
        ("ppo", {"critic__path": "RM", "reward__terms": [REWARD]}),
        ("ppo", {"critic__share": "trunk"}),
        ("ppo", {"adapter__kind": "lora", "critic__path": "RM", "reward__terms": [REWARD]}),
        ("spin", {}),
    ],
)
def test_a_run_counts_the_models_that_its_plan_counts(
    name: str, changed: dict[str, Any], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    rewarding = tiny.save_reward_model(tmp_path / "rm")
    text = json.dumps({"model__dtype": "float32", **changed})
    given = json.loads(text.replace("MODEL", str(tiny_model)).replace("RM", str(rewarding)))
    config = tiny.configure(name, tiny_model, tiny_data, tmp_path / "run", **given)
    job, _, _ = job_of(name, config)
    ours, theirs = held_by(config, getattr(torch, job.compute)), planned(job)
    assert ours is not None
    assert ours.learns == theirs.learns
    assert sorted(ours.frozen) == sorted(theirs.frozen)
    assert ours.learns + len(ours.frozen) > 0


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
