"""The whole of ``trimtab grpo`` on a real model: sampler, rewards, advantages, loss, optimiser, schedule.

Some 50,000 samples a run (more where the noise is largest), drawn on policy, with a learning rate that falls
to 0 from so low a start that the noise of much of the run averages out. The bound is a total variation of
0.01; the other optima lie 0.05 and more away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from theory_enumeration import Table
from theory_loop import conditionals, metrics, online_sections, save_model
from theory_optima import OPTIMA, effective_beta, token_level_optimum, total_variation

from trimtab.methods import grpo

LIMIT, APART = 0.01, 0.05


def run(folder: Path, rewards: dict[str, float], options: dict[str, Any], train: dict[str, Any]) -> Path:
    """Train from ``start`` on the reward of each answer; the folder of the saved model."""
    config = grpo.Config.model_validate(
        {
            **online_sections(folder, rewards, train),
            "grpo": {
                "scale": "none",
                "reduction": "constant",
                "constant_length": 1,
                "clip_low": 0.9,
                "clip_high": 9.0,
                **options,
            },
        }
    )
    result = grpo.train(config)
    steps = metrics(result.out)
    assert len(steps) == train["steps"]
    assert steps[-1]["lr"] == pytest.approx(train["lr"] / train["steps"])
    assert max(step["clip_fraction"] for step in steps) == 0.0
    # In fp32 the sampler's log-probabilities are the training forward's, unless it is a rollout behind.
    gap = max(step["sampler_gap"] for step in steps)
    assert gap > 0.001 if options.get("overlap") else gap < 1e-5
    return result.out / "model"


@pytest.mark.parametrize(("estimator", "overlap"), [("k2", False), ("k3", False), ("k2", True)])
def test_one_token(tmp_path: Path, estimator: str, overlap: bool) -> None:
    ref_V = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
    rewards = {"": 0.9, "a": 0.5, "b": 0.4, "c": 0.5, "d": 0.2, "e": 0.7}
    save_model(tmp_path / "start", list("abcde"), ref_V)
    options = {"group_size": 4, "beta": 0.225, "kl_estimator": estimator, "overlap": overlap}
    # One thread for each side of an overlap: two that share the cores wait for each other in every product.
    more = {"threads": 1, "steps": 150} if overlap else {}
    model = run(tmp_path, rewards, options, {"steps": 200, "batch_groups": 64, "lr": 0.002, **more})

    policy = conditionals(model, length=1)[0]
    ref = conditionals(tmp_path / "start", length=1)[0]
    assert total_variation(ref, ref_V) < 1e-5
    values = torch.tensor(list(rewards.values()), dtype=torch.float64)
    right = effective_beta(0.225, 4, "group_mean")
    assert total_variation(policy, OPTIMA[estimator](ref, values, right)) < LIMIT
    assert total_variation(policy, OPTIMA[estimator](ref, values, 0.225)) > APART
    other = {"k2": "k3", "k3": "k2"}[estimator]
    assert total_variation(policy, OPTIMA[other](ref, values, right)) > APART


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "level", "groups"),
    [("k2", "token", 16), ("k2", "sequence", 16), ("k3", "token", 40), ("k3", "sequence", 16)],
)
def test_two_tokens(tmp_path: Path, estimator: str, level: str, groups: int) -> None:
    # One answer is the end token alone: responses of unequal length. A large group keeps the noise of its
    # baseline low; the factor G/(G − 1) is the business of the test above.
    size, beta = 12, 0.33
    rewards = {"": 0.4, "a": 0.2, "a a": 1.0, "a b": 0.0, "b": 0.5, "b a": 0.4, "b b": 0.6}
    save_model(tmp_path / "start", ["a", "b"])
    options = {"group_size": size, "beta": beta, "kl_estimator": estimator, "kl_level": level}
    model = run(tmp_path, rewards, options, {"steps": 300, "batch_groups": groups, "lr": 0.001})

    ref_KV = conditionals(tmp_path / "start", length=2)
    table = Table(ref_KV, length=2, end=0)
    assert [" ".join(" ab"[t] for t in answer).strip() for answer in table.answers] == list(rewards)
    policy = table.probabilities(conditionals(model, length=2))
    values = dict(zip(table.answers, rewards.values(), strict=True))
    flat = torch.tensor(list(rewards.values()), dtype=torch.float64)
    right = effective_beta(beta, size, "group_mean")
    distances = {}
    for name, optimum in OPTIMA.items():
        token = token_level_optimum(ref_KV, values, right, optimum)
        sequence = optimum(table.probabilities(ref_KV), flat, right)
        distances[name, "token"] = total_variation(policy, token)
        distances[name, "sequence"] = total_variation(policy, sequence)
    assert distances.pop((estimator, level)) < LIMIT
    assert min(distances.values()) > APART
