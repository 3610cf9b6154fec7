"""The whole of ``trimtab dpo`` on a real model: it must find the optimum that its pairs determine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from theory_loop import END, PROMPT, conditionals, metrics, save_model, write_rows
from theory_optima import reverse_kl_optimum, total_variation

from trimtab.methods import dpo

WORDS = ["a", "b", "c", "d", "e"]
FIRST_REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
REWARDS = torch.tensor([0.9, 0.5, 0.4, 0.5, 0.2, 0.7], dtype=torch.float64)
BETA = 0.2


def distribution(model: Path) -> torch.Tensor:
    """Over the answers END, "a END", "b END" …, which are what DPO compares.

    Pairs fix the ratios of their answers, not the mass left to texts in no pair, so that is divided out.
    """
    probs_KV = conditionals(model, length=2)
    answers = torch.cat([probs_KV[0, :1], probs_KV[0, 1:] * probs_KV[2:, 0]])
    return answers / answers.sum()


def run(folder: Path, name: str, *, weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """π_ref and the trained policy."""
    if not (folder / "start").exists():
        save_model(folder / "start", WORDS, FIRST_REF)
    rows = []
    for i, chosen in enumerate([END, *WORDS]):
        for j, rejected in enumerate([END, *WORDS]):
            if i != j:
                margin = float(REWARDS[i] - REWARDS[j])
                weight = {"group_weight": 1 / (1 + math.exp(-margin))} if weighted else {}
                rows.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected, **weight})
    config = dpo.Config.model_validate(
        {
            "model": {"path": str(folder / "start"), "dtype": "float32", "device": "cpu"},
            "data": {"sources": [{"path": write_rows(folder / f"{name}.jsonl", rows)}]},
            "train": {"steps": 200, "batch_groups": len(rows), "lr": 0.01, "grad_clip": 0},
            "run": {"out": str(folder / name)},
            "dpo": {"beta": BETA},
        }
    )
    result = dpo.train(config)
    assert metrics(result.out)[-1]["lr"] < 1e-4
    return distribution(folder / "start"), distribution(result.out / "model")


def test_all_pairs_weighted_by_bradley_terry_reach_the_optimum(tmp_path: Path) -> None:
    ref, policy = run(tmp_path, "weighted", weighted=True)
    optimum = reverse_kl_optimum(ref, REWARDS, BETA)
    assert total_variation(ref, optimum) > 0.2
    assert total_variation(policy, optimum) < 0.001
    assert total_variation(policy, reverse_kl_optimum(ref, REWARDS, 1.5 * BETA)) > 0.03


def test_pairs_of_equal_weight_in_both_orders_teach_nothing(tmp_path: Path) -> None:
    # The same rows without their weights: were weights read but not used, the test above would end here.
    ref, policy = run(tmp_path, "equal", weighted=False)
    assert total_variation(policy, ref) == pytest.approx(0.0, abs=0.001)
