"""The whole of ``trimtab rloo`` on a real model meets π_ref·exp(r/β)/Z of whole responses, at β itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from theory_enumeration import Table
from theory_loop import conditionals, metrics, online_sections, save_model
from theory_optima import OPTIMA, reverse_kl_optimum, token_level_optimum, total_variation

from trimtab.methods import rloo

LIMIT, APART = 0.01, 0.05


@pytest.mark.slow
def test_two_tokens(tmp_path: Path) -> None:
    # One answer is the end token alone: responses of unequal length, and every option at its default but β.
    beta, steps = 0.33, 300
    rewards = {"": 0.4, "a": 0.2, "a a": 1.0, "a b": 0.0, "b": 0.5, "b a": 0.4, "b b": 0.6}
    save_model(tmp_path / "start", ["a", "b"])
    train = {"steps": steps, "batch_groups": 16, "lr": 0.001}
    sections = online_sections(tmp_path, rewards, train)
    config = rloo.Config.model_validate({**sections, "rloo": {"group_size": 12, "beta": beta}})
    out = rloo.train(config).out
    assert max(step["sampler_gap"] for step in metrics(out)) < 1e-5

    ref_KV = conditionals(tmp_path / "start", length=2)
    table = Table(ref_KV, length=2, end=0)
    assert [" ".join(" ab"[t] for t in answer).strip() for answer in table.answers] == list(rewards)
    policy = table.probabilities(conditionals(out / "model", length=2))
    flat = torch.tensor(list(rewards.values()), dtype=torch.float64)
    ref_S = table.probabilities(ref_KV)
    assert total_variation(policy, reverse_kl_optimum(ref_S, flat, beta)) < LIMIT
    # Not the optimum of another strength, of the other divergence, or of a KL that each token sees alone.
    values = dict(zip(table.answers, rewards.values(), strict=True))
    assert total_variation(policy, reverse_kl_optimum(ref_S, flat, 1.5 * beta)) > APART
    assert total_variation(policy, OPTIMA["k3"](ref_S, flat, beta)) > APART
    assert total_variation(policy, token_level_optimum(ref_KV, values, beta, OPTIMA["k2"])) > LIMIT
