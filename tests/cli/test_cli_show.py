"""What the terminal shows of a comparison: every column, whatever its width; the judge before the table."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.cli.show import show

JUDGE = {"pairs": 400, "accuracy": 0.7, "accuracy_ci95": [0.65, 0.75], "ece": 0.03}
WEAK = {"pairs": 40, "accuracy": 0.5, "accuracy_ci95": [0.35, 0.65], "ece": 0.1}


def summary(**more: Any) -> dict[str, Any]:
    methods = {
        "sft": {"gold_reward": 5.0, "gold_reward_ci95": [4.9, 5.1], "response_tokens": 14, "wall_s": 50},
        "ppo": {
            "gold_reward": 6.0,
            "gold_reward_ci95": [5.9, 6.1],
            "win_rate": 0.7,
            "win_rate_ci95": [0.6, 0.8],
            "response_tokens": 14,
            "wall_s": 83,
            "learned_reward_s": 12,
            "generated_tokens": 4321,
            "reward_seen": "the learned reward",
        },
    }
    return {"title": "A study", "reference": "sft", "methods": methods, **more}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_column_is_shown_within_the_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show(summary(), "runs/x")
    out = capsys.readouterr().out
    for cell in ("6.00 [5.90, 6.10]", "70 % [60, 80]", "1 min 23 s", "12 s", "4,321", "the learned reward"):
        assert cell in out, cell
    assert max(map(len, out.splitlines())) <= width
    assert out.count("┃ Method") == out.count("┏") == (1 if width == 200 else out.count("┃ Method"))


def test_the_judge_comes_first_and_a_weak_one_ends_in_nothing_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(summary(judge=JUDGE), "runs/x")
    out = capsys.readouterr().out
    assert out.index("70.0 %") < out.index("A study")
    assert "PPO beats SFT" in out
    assert "(and 12 s for the learned reward)" in " ".join(out.split())
    show(summary(judge=WEAK), "runs/x")
    out = capsys.readouterr().out
    assert "Nothing is shown" in out
    assert "PPO beats SFT" not in out
