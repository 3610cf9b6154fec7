"""The State of a run after each of its steps, so that those of several processes can be compared.

def grpo_states(configuration) -> ...:      # in a test's module, run in each process
    return states.followed("grpo", model, data, out, **changed)

first, second = processes.run(grpo_states, …)
assert first["states"] == second["states"]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab import methods
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.scored import Rollout
from trimtab.models.shards import whole
from trimtab.parallel.world import world
from trimtab.training.run import Run
from trimtab.training.state import State

OWN_CLOCK = ("threads", "reward_fact/judge_seconds")
"""What a process may have for itself."""


def shown(state: State) -> dict[str, Any]:
    """All that a State holds, tensors as digests; weights that are spread as a whole (then collective)."""
    tensors = {**state.optimiser.tensors(), **{f"extra.{k}": v for k, v in state.extra.items()}}
    for role, optimiser in state.others.items():
        tensors |= {f"{role}/{k}": v for k, v in optimiser.tensors().items()}
    return {
        "step": state.step,
        "position": state.position,
        "tokens": state.tokens,
        "controllers": {k: v for k, v in sorted(state.controllers.items()) if k not in OWN_CLOCK},
        "pending": [_digest(json.dumps(group.to_dict()).encode()) for group in state.pending],
        "ahead": [_digest(json.dumps(group.to_dict()).encode()) for group in state.ahead],
        "environment": {k: v for k, v in state.environment.items() if k not in OWN_CLOCK},
        "tensors": {name: _digest(_bytes(tensor)) for name, tensor in sorted(tensors.items())},
    }


def followed(
    name: str,
    model: Path,
    data: Path,
    out: Path,
    changed: dict[str, Any],
    *,
    prepare: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> dict[str, Any]:
    """Run the method in fp64; its State after each step, every rollout as it came, and what was logged.

    ``changed`` as for ``tiny.configure``.
    """
    found: dict[str, Any] = {"states": [], "metrics": [], "rollouts": []}
    given = {"model__dtype": "float64", **changed}
    config = tiny.configure(name, model, data, out / f"{name}-{world().size}", **given)
    log, store = Run.log, Rollouts._store

    def note(run: Run, state: State, metrics: dict[str, Any]) -> None:
        found["states"].append(shown(state))
        found["metrics"].append({k: v for k, v in metrics.items() if isinstance(v, int | float)})
        log(run, state, metrics)

    def take(rollouts: Rollouts, rollout: Rollout, state: State) -> None:
        store(rollouts, rollout, state)
        rows = [[group.id, *([r.tokens, r.reward] for r in group.responses)] for group in rollout.groups]
        found["rollouts"].append({"rows": rows, "drawn": rollout.drawn, "counts": rollout.counts})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "log", note)
        patched.setattr(Rollouts, "_store", take)
        if prepare is not None:
            prepare(patched)
        methods.find(name).train(config)
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any], within: float) -> list[str]:
    """Metrics of two runs, but the clock's, that differ by more than ``within`` (relative, at least 1)."""
    lines = []
    for step, (a, b) in enumerate(zip(ours["metrics"], theirs["metrics"], strict=True)):
        names = {k for k in {*a, *b} if not k.endswith("_s") and k not in tiny.TIME_KEYS}
        if abs(a.get("reward_margin", 1.0)) < within:
            names -= {"accuracy"}  # rounding decides then who is ahead
        for key in sorted(names):
            x, y = a.get(key), b.get(key)
            if x is None or y is None or not abs(x - y) <= within * max(1.0, abs(x)):
                lines.append(f"{step} {key}: {x} {y}")
    return lines


def _bytes(tensor: torch.Tensor) -> bytes:
    return whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
