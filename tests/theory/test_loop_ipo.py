"""The whole of ``trimtab ipo`` on a real model: it must find the optimum that its pairs determine."""

from __future__ import annotations

from pathlib import Path

import torch
from theory_loop import END, PROMPT, conditionals, save_model, write_rows
from theory_optima import reverse_kl_optimum, total_variation

from trimtab.methods import ipo

WORDS = ["a", "b", "c", "d", "e"]
FIRST_REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64) * 3
TAU = 0.5


def distribution(model: Path) -> torch.Tensor:
    """Over the answers END, "a END", "b END" …; the mass left to texts in no pair is divided out."""
    probs_KV = conditionals(model, length=2)
    answers = torch.cat([probs_KV[0, :1], probs_KV[0, 1:] * probs_KV[2:, 0]])
    return answers / answers.sum()


def test_all_pairs_weighted_by_their_chances_reach_the_closed_form(tmp_path: Path) -> None:
    save_model(tmp_path / "start", WORDS, FIRST_REF)
    chances_VV = torch.sigmoid(REWARDS[:, None] - REWARDS[None, :])
    answers = [END, *WORDS]
    rows = [
        {"prompt": PROMPT, "chosen": w, "rejected": r, "group_weight": float(chances_VV[i, j])}
        for i, w in enumerate(answers)
        for j, r in enumerate(answers)
        if i != j
    ]
    config = ipo.Config.model_validate(
        {
            "model": {"path": str(tmp_path / "start"), "dtype": "float32", "device": "cpu"},
            "data": {"sources": [{"path": write_rows(tmp_path / "pairs.jsonl", rows)}]},
            "train": {"steps": 200, "batch_groups": len(rows), "lr": 0.01, "grad_clip": 0},
            "run": {"out": str(tmp_path / "run")},
            "ipo": {"beta": TAU},
        }
    )
    policy = distribution(ipo.train(config).out / "model")
    ref = distribution(tmp_path / "start")
    # π ∝ π_ref·exp(mean chance of winning/τ), p(y ≻ y) = ½ among it.
    optimum = torch.softmax(ref.log() + chances_VV.mean(-1) / TAU, dim=-1)
    assert total_variation(ref, optimum) > 0.1
    assert total_variation(policy, optimum) < 0.001
    assert total_variation(policy, reverse_kl_optimum(ref, REWARDS, TAU)) > 0.1
