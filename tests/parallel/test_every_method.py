"""Every method: a few steps on one process and on two give the same numbers, and both hold the same."""

from __future__ import annotations

from typing import Any

import pytest
from parity import Runs, assert_same_run

from trimtab import methods

# What a method does beyond its defaults with the numbers that processes tell each other.
MORE: dict[str, dict[str, Any]] = {
    "dpo": {"dpo.label_smoothing": 0.1},
    "grpo": {"grpo.beta": 0.05, "grpo.refresh_reference_every": 2, "grpo.overlap": True},
    "kto": {"kto.kl": "batch"},
    "online-dpo": {"online_dpo.opponents": "both", "online_dpo.refresh_reference_every": 2},
    "ppo": {"ppo.rollout_groups": 10, "ppo.kl_control": "adaptive"},
    "spin": {"spin.iterations": 2},
}


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize("name", methods.names())
def test_two_processes_are_one(name: str, weights: str, runs: Runs) -> None:
    changed = {"train.steps": 3, **MORE.get(name, {})}
    alone = runs.alone(name, changed=changed)
    together = runs(name, changed=changed | {"parallel.weights": weights})
    assert_same_run(alone, together)
    assert len(alone["metrics"]) == 3
    assert len({m["grad_norm"] for m in alone["metrics"]}) == 3
