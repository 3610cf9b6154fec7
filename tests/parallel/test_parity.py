"""Thirty optimiser steps on one process and on several: the same losses, gradient norms and weights, in fp64.

Groups are uneven throughout (see ``parity.uneven``): an odd number of them a step, of 3 to 25 tokens, in
micro-batches that hold one long or several short ones, so that no two processes have as many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity import Found, Runs, assert_same_run, close

STEPS = 30
# Two steps' groups at once, learned from twice: what is pending outlives the step it was sampled in.
SAMPLED: dict[str, dict[str, Any]] = {
    "ppo": {"ppo.rollout_groups": 10, "ppo.epochs_per_rollout": 2, "ppo.kl_control": "adaptive"},
    "grpo": {"grpo.rollout_groups": 10, "grpo.epochs_per_rollout": 2, "grpo.beta": 0.05},
}
METHODS = ("sft", "reward", "dpo", "ppo", "grpo")
SHORT = 6
LORA = {"adapter.kind": "lora", "adapter.rank": 4, "adapter.alpha": 8.0}
TIGHT = {"train.micro_batch_tokens": 24}
"""Room for the longest pair, or for two or three short ones."""


def changed(method: str, weights: str = "replicate", **more: Any) -> dict[str, Any]:
    """Options of a run; ``train__lr`` stands for train.lr."""
    given = {"train.steps": STEPS, "parallel.weights": weights, **SAMPLED.get(method, TIGHT)}
    return given | {key.replace("__", "."): value for key, value in more.items()}


def norms(found: Found) -> list[float]:
    """The gradient norms of the steps that were taken."""
    return [m["grad_norm"] for m in found["metrics"] if "grad_norm" in m]


@pytest.fixture(scope="module")
def trails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what samplers drew."""
    return tmp_path_factory.mktemp("trails")


def compare(method: str, given: dict[str, Any], weights: str, runs: Runs, trail: Path) -> None:
    """One process against two, both on what the one process sampled."""
    replay: dict[str, Any] = {"trail": trail} if method in SAMPLED else {}
    alone = runs.alone(method, changed=given, **replay)
    if replay:
        replay["replayed"] = True
    together = runs(method, changed=given | {"parallel.weights": weights}, **replay)
    assert_same_run(alone, together)
    assert len(norms(alone)) == given["train.steps"]
    assert min(norms(alone)) > 0
    assert together[0]["passes"] != together[1]["passes"], "the processes have as many micro-batches"
    assert any(f["idle"] for f in together) is (weights == "shard")


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize("method", METHODS)
def test_thirty_steps(method: str, weights: str, runs: Runs, trails: Path) -> None:
    compare(method, changed(method), weights, runs, trails / f"{method}.jsonl")


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize("method", METHODS)
def test_with_adapters(method: str, weights: str, runs: Runs, trails: Path) -> None:
    given = changed(method, train__steps=SHORT) | LORA
    compare(method, given, weights, runs, trails / f"{method}-lora.jsonl")


@pytest.mark.parametrize(
    ("method", "weights"), [("ppo", "replicate"), ("grpo", "replicate"), ("grpo", "shard")]
)
def test_thirty_steps_with_live_sampling(method: str, weights: str, runs: Runs) -> None:
    alone = runs.alone(method, changed=changed(method))
    assert_same_run(alone, runs(method, changed=changed(method, weights)))


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_three_processes(weights: str, runs: Runs) -> None:
    assert_same_run(
        runs.alone("dpo", changed=changed("dpo")), runs("dpo", 3, changed=changed("dpo", weights))
    )


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_a_process_without_a_group(weights: str, runs: Runs) -> None:
    # Of two groups those are left out whose responses were all cut off.
    cut = {"train.batch_groups": 2, "grpo.group_size": 2, "grpo.mask_cut_off": True}
    given = {"train.steps": SHORT, "sampling.max_new_tokens": 3, **cut}
    together = runs("grpo", changed=given | {"parallel.weights": weights})
    assert_same_run(runs.alone("grpo", changed=given), together)
    assert (0, 1) in {tuple(sorted(steps)) for steps in zip(*(f["passes"] for f in together), strict=True)}


def test_one_pass_on_one_process_and_several_on_two(runs: Runs) -> None:
    whole = {"train.steps": SHORT, "train.micro_batch_tokens": 4096}
    alone, together = runs.alone("sft", changed=whole), runs("sft", changed={"train.steps": SHORT, **TIGHT})
    assert_same_run(alone, together)
    assert set(alone["passes"]) == {1}
    assert all(max(f["passes"]) > 1 for f in together)


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_gradients_are_clipped_as_a_whole(weights: str, runs: Runs) -> None:
    given = {"train.steps": SHORT, "train.grad_clip": 0.05, "parallel.weights": weights}
    alone = runs.alone("sft", changed=given | {"parallel.weights": "replicate"})
    assert min(norms(alone)) > 0.05
    assert_same_run(alone, runs("sft", changed=given))
    free = runs.alone("sft", changed={"train.steps": SHORT, "train.grad_clip": 0.0})
    with pytest.raises(AssertionError):
        close(free["state"]["norms"], alone["state"]["norms"], "")


@pytest.mark.parametrize("weights", ["replicate", "shard"])
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_step_that_one_process_spoils_is_skipped_by_all(method: str, weights: str, runs: Runs) -> None:
    given = {"train.steps": SHORT}
    # A group of the second step, which one process alone computes.
    spoilt = runs.alone(method, changed=given)["order"][7][1]
    together = runs(method, changed=given | {"parallel.weights": weights}, spoilt=spoilt)
    alone = runs.alone(method, changed=given, spoilt=spoilt)
    assert_same_run(alone, together)
    assert 0 < alone["metrics"][-1]["skipped_steps"] < SHORT
    assert len(norms(alone)) == SHORT - alone["metrics"][-1]["skipped_steps"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_token_budget_ends_after_as_many_steps(size: int, runs: Runs) -> None:
    given = {"train.steps": 0, "train.token_budget": 700, "train.schedule": "cosine"}
    alone = runs.alone("sft", changed=given)
    assert 3 < len(alone["metrics"]) < 30
    assert_same_run(alone, runs("sft", size, changed=given))


@pytest.mark.parametrize(
    "given",
    [
        {"critic.share": "trunk", "critic.warmup_rollouts": 1, "ppo.reward_normalise": "running"},
        {"ppo.whiten": "scale", "ppo.whiten_rewards": True, "ppo.kl_in": "loss", "ppo.clip_end": 0.5},
    ],
    ids=["trunk", "whitened"],
)
@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_what_is_taken_over_a_whole_rollout(given: dict[str, Any], weights: str, runs: Runs) -> None:
    options = changed("ppo", train__steps=SHORT, ppo__samples=3) | given
    assert_same_run(
        runs.alone("ppo", changed=options), runs("ppo", changed=options | {"parallel.weights": weights})
    )


@pytest.mark.parametrize("reduction", ["token_mean", "response_mean", "response_sum", "constant"])
def test_every_reduction_has_a_global_count(reduction: str, runs: Runs) -> None:
    # Responses that were cut off are masked: a process may have none that counts.
    given = {"train.steps": 4, "grpo.reduction": reduction, "grpo.mask_cut_off": True}
    alone = runs.alone("grpo", changed=given)
    assert 0 < alone["metrics"][0]["cut_off"] < 1
    assert_same_run(alone, runs("grpo", changed=given))
