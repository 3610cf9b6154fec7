"""The whole of ``trimtab spin`` and ``trimtab online-dpo`` on a real model whose answers are all listed.

Some ten thousand samples a run; the bound is a total variation of 0.03.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from theory_loop import END, PROMPT, conditionals, metrics, online_sections, save_model, write_rows
from theory_optima import reverse_kl_optimum, total_variation

from trimtab.methods import online_dpo, spin

WORDS = ["a", "b", "c", "d", "e"]
FIRST_REF = torch.tensor([0.05, 0.25, 0.15, 0.2, 0.2, 0.15], dtype=torch.float64)
DATA = torch.tensor([0.3, 0.1, 0.2, 0.05, 0.25, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([2.7, 1.5, 1.2, 1.5, 0.6, 2.1], dtype=torch.float64)
LIMIT = 0.03

JUDGE = """
import math, random

REWARDS = {rewards!r}
DRAW = random.Random(7)


def judge(*, mode):
    def answer(groups):
        out = []
        for group in groups:
            first, second = (REWARDS[r.text.strip()] for r in group.responses)
            out.append({{"preferences": [[0, 1, float(DRAW.random() < 1 / (1 + math.exp(second - first)))]]}})
        return out

    return answer
"""


def test_spin_finds_the_distribution_of_its_demonstrations(tmp_path: Path) -> None:
    """β = 1, where one iteration's minimum is the data; the second begins there and stays.

    Demonstrations hold one token, as the samples do: their texts end where the model would go on, so the
    first token alone is compared ("truncate" takes the end token away).
    """
    save_model(tmp_path / "start", WORDS, FIRST_REF)
    rows = [
        {"prompt": PROMPT, "completion": word}
        for k, word in enumerate([END, *WORDS])
        for _ in range(round(float(DATA[k]) * 400))
    ]
    random.Random(0).shuffle(rows)
    config = spin.Config.model_validate(
        {
            "model": {"path": str(tmp_path / "start"), "dtype": "float32", "device": "cpu"},
            "data": {
                "sources": [{"path": write_rows(tmp_path / "rows.jsonl", rows)}],
                "max_tokens": 2,
                "on_long": "truncate",
            },
            "train": {"steps": 60, "batch_groups": 200, "lr": 0.01, "grad_clip": 0, "seed": 1},
            "run": {"out": str(tmp_path / "run")},
            "sampling": {"max_new_tokens": 1},
            "spin": {"beta": 1.0, "iterations": 2, "iteration_groups": 1600, "keep_previous": False},
        }
    )
    result = spin.train(config)
    start, policy = (
        conditionals(folder, length=1)[0] for folder in (tmp_path / "start", result.out / "model")
    )
    assert total_variation(start, DATA) > 0.3
    assert total_variation(policy, DATA) < LIMIT
    lines = metrics(result.out)
    assert lines[-1]["iteration"] == 1
    assert lines[29]["reward_margin"] > 0.5  # the first iteration told the two apart
    assert abs(lines[-1]["reward_margin"]) < 0.05  # the last could not


@pytest.mark.parametrize("opponents", ["self", pytest.param("reference", marks=pytest.mark.slow)])
def test_online_dpo_finds_the_optimum_of_the_judges_reward(tmp_path: Path, opponents: str) -> None:
    beta = 1.0
    save_model(tmp_path / "start", WORDS, FIRST_REF)
    named = dict(zip(["", *WORDS], REWARDS.tolist(), strict=True))
    (tmp_path / "judge.py").write_text(JUDGE.format(rewards=named))
    sections: dict[str, Any] = online_sections(
        tmp_path, named, {"steps": 100, "batch_groups": 80, "lr": 0.005}
    )
    judge = {"kind": "custom", "name": f"{tmp_path / 'judge.py'}:judge", "mode": "pairwise"}
    sections["reward"] = {"terms": [{"name": "judge", "args": judge}]}
    sections["online_dpo"] = {"beta": beta, "opponents": opponents}
    result = online_dpo.train(online_dpo.Config.model_validate(sections))
    ref, policy = (conditionals(folder, length=1)[0] for folder in (tmp_path / "start", result.out / "model"))
    optimum = reverse_kl_optimum(ref, REWARDS, beta)
    assert total_variation(ref, optimum) > 0.15
    assert total_variation(policy, optimum) < LIMIT
    assert total_variation(policy, reverse_kl_optimum(ref, REWARDS, 2 * beta)) > 2 * LIMIT
    assert total_variation(policy, reverse_kl_optimum(ref, REWARDS, beta / 2)) > 2 * LIMIT
