"""The verdict: sentences that claim what the intervals allow, and the one that ends a comparison."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest

import trimtab.evaluation.figures
import trimtab.evaluation.reward_model
import trimtab.evaluation.verdict
from trimtab.errors import InputError
from trimtab.evaluation.figures import display_name, listed
from trimtab.evaluation.verdict import head_to_head, one_sentence, verdict

SUMMARY: dict[str, Any] = {
    "reference": "sft",
    "methods": {
        "sft": {"gold_reward": 0.41, "gold_reward_ci95": [0.38, 0.44], "response_tokens": 38.2},
        "grpo": {
            "gold_reward": 0.71,
            "gold_reward_ci95": [0.68, 0.74],
            "win_rate": 0.78,
            "win_rate_ci95": [0.73, 0.82],
            "kl_nats_per_token": 0.0124,
            "response_tokens": 45.0,
        },
    },
}


def changed(**figures: Any) -> dict[str, Any]:
    summary = copy.deepcopy(SUMMARY)
    summary["methods"]["grpo"].update(figures)
    return summary


@pytest.mark.parametrize("module", ["figures", "reward_model", "verdict"])
def test_the_examples_in_the_docstrings_hold(module: str) -> None:
    result = doctest.testmod(getattr(trimtab.evaluation, module))
    assert result.attempted > 0
    assert result.failed == 0


def test_verdict_of_a_clear_win() -> None:
    assert verdict(SUMMARY) == [
        "GRPO beats SFT: win rate 78 % [73, 82].",
        "Highest gold reward: GRPO, 0.71 [0.68, 0.74], at a KL of 0.012 nats per token.",
    ]


@pytest.mark.parametrize(
    ("rate", "interval", "sentence"),
    [
        (0.53, [0.48, 0.58], "GRPO against SFT: no difference shown, win rate 53 % [48, 58]."),
        (0.55, [0.5, 0.6], "GRPO against SFT: no difference shown, win rate 55 % [50, 60]."),
        (0.40, [0.35, 0.45], "GRPO loses to SFT: win rate 40 % [35, 45]."),
        (0.55, [0.503, 0.6], "GRPO beats SFT: win rate 55.0 % [50.3, 60.0]."),  # never "beats … [50, 60]"
        (0.45, [0.40, 0.4997], "GRPO loses to SFT: win rate 45.00 % [40.00, 49.97]."),
        (0.9, None, "GRPO against SFT: win rate 90 % without an interval, so no difference is shown."),
    ],
)
def test_verdict_claims_what_the_interval_allows(
    rate: float, interval: list[float] | None, sentence: str
) -> None:
    assert verdict(changed(win_rate=rate, win_rate_ci95=interval))[0] == sentence


def test_verdict_orders_by_strength_and_warns_of_length() -> None:
    summary = changed(win_rate=0.6, win_rate_ci95=[0.55, 0.65])
    summary["methods"]["dpo"] = {"win_rate": 0.7, "win_rate_ci95": [0.65, 0.75], "response_tokens": 76.4}
    assert verdict(summary)[:3] == [
        "DPO beats SFT: win rate 70 % [65, 75].",
        "DPO's responses are 2.0 times as long as SFT's: length may explain part of its win.",
        "GRPO beats SFT: win rate 60 % [55, 65].",
    ]
    shorter = verdict(changed(response_tokens=19.1))
    assert (
        shorter[1] == "GRPO's responses are 2.0 times as short as SFT's: length may explain part of its win."
    )
    assert len(verdict(changed(response_tokens=19.1, win_rate=0.5, win_rate_ci95=[0.45, 0.55]))) == 2


def test_overlapping_gold_rewards_are_not_ordered() -> None:
    summary = changed()
    summary["methods"]["ppo"] = {"gold_reward": 0.70, "gold_reward_ci95": [0.67, 0.73]}
    summary["methods"]["dpo"] = {"gold_reward": 0.60}
    assert verdict(summary)[-1].endswith(
        "Its interval is not clear of PPO and DPO, so their order is not settled."
    )


def test_verdict_without_a_comparison() -> None:
    assert verdict({"methods": {"sft": {}}}) == [
        "Nothing was compared: no method has a win rate or a gold reward."
    ]


def test_a_summary_without_methods_is_refused() -> None:
    for say in (verdict, one_sentence, head_to_head):
        with pytest.raises(InputError, match="no methods"):
            say({"methods": {}})


def test_a_row_that_sees_the_judge_is_marked_last_and_never_the_best() -> None:
    summary = changed()
    summary["methods"]["gold"] = dict(
        summary["methods"]["grpo"], sees_judge=True, win_rate=0.9, win_rate_ci95=[0.87, 0.93], gold_reward=2.0
    )
    assert verdict(summary) == [
        "GRPO beats SFT: win rate 78 % [73, 82].",
        "gold (sees the judge) beats SFT: win rate 90 % [87, 93].",
        "Highest gold reward: GRPO, 0.71 [0.68, 0.74], at a KL of 0.012 nats per token.",
    ]
    assert one_sentence(summary) == "GRPO beats SFT: win rate 78 % [73, 82]."


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        ({"proxy_reward": 1.9, "proxy_reward_ci95": [1.8, 2.0]}, True),
        ({"proxy_reward": 1.9}, True),  # without an interval the figure counts as it stands
        ({"proxy_reward": 0.7, "proxy_reward_ci95": [0.55, 0.85]}, False),  # may not have risen
        ({"proxy_reward": 0.1, "proxy_reward_ci95": [0.0, 0.2]}, False),  # both fell: only worse
        ({"proxy_reward": 1.9, "gold_reward": 0.35, "gold_reward_ci95": [0.3, 0.4]}, False),
        ({"proxy_reward": 1.9, "gold_reward_ci95": None}, False),
        ({}, False),
    ],
)
def test_over_optimisation_is_named(figures: dict[str, Any], named: bool) -> None:
    summary = changed(**({"gold_reward": 0.2, "gold_reward_ci95": [0.15, 0.25]} | figures))
    summary["methods"]["sft"] |= {"proxy_reward": 0.5, "proxy_reward_ci95": [0.4, 0.6]}
    assert any("over-optimised" in sentence for sentence in verdict(summary)) is named


def test_over_optimisation_in_words() -> None:
    summary = changed(proxy_reward=1.9, gold_reward=0.2, gold_reward_ci95=[0.15, 0.25])
    summary["methods"]["sft"]["proxy_reward"] = 0.5
    summary["score_name"] = "Judge's score"
    assert verdict(summary)[1:] == [
        "Highest judge's score: SFT, 0.41 [0.38, 0.44].",
        "GRPO is over-optimised: its proxy reward rises from 0.50 to 1.90 while the judge's score falls from "
        "0.41 [0.38, 0.44] to 0.20 [0.15, 0.25].",
    ]


# --- the sentence that ends a comparison


def study(*rates: float, **more: Any) -> dict[str, Any]:
    """DPO, PPO and GRPO at these win rates, each with 5 points to either side."""
    methods = {
        name: {"win_rate": rate, "win_rate_ci95": [rate - 0.05, rate + 0.05]}
        for name, rate in zip(("dpo", "ppo", "grpo"), rates, strict=False)
    }
    return {"reference": "sft", "methods": {"sft": {}, **methods}, **more}


def duel(key: str, rate: float) -> dict[str, Any]:
    return {key: {"win_rate": rate, "ci95": [rate - 0.05, rate + 0.05]}}


LEVEL = (
    "DPO and PPO both beat SFT; no difference shown between them: win rates 64 % [59, 69] and 60 % [55, 65]."
)
OTHER = "DPO beats SFT: win rate 64 % [59, 69]"


@pytest.mark.parametrize(
    ("duels", "sentence"),
    [
        (duel("dpo>ppo", 0.54), LEVEL),
        (duel("ppo>dpo", 0.47), LEVEL),  # from the other side
        ({"dpo>ppo": {"win_rate": 0.6}}, LEVEL),  # no interval separates them
        (duel("dpo>ppo", 0.58), f"{OTHER}, and PPO head to head: 58 % [53, 63]."),
        (duel("ppo>dpo", 0.42), f"{OTHER}, and PPO head to head: 58 % [53, 63]."),
        (
            duel("dpo>ppo", 0.42),
            f"{OTHER}; PPO beats SFT too, 60 % [55, 65], and DPO head to head: 58 % [53, 63].",
        ),
        ({}, f"{OTHER}; PPO beats SFT too, 60 % [55, 65], and was not compared with DPO head to head."),
    ],
)
def test_two_winners(duels: dict[str, Any], sentence: str) -> None:
    assert one_sentence(study(0.64, 0.601, head_to_head=duels)) == sentence


def test_three_winners_of_which_two_are_level() -> None:
    duels = duel("dpo>ppo", 0.52) | duel("dpo>grpo", 0.6)
    assert one_sentence(study(0.64, 0.601, 0.57, head_to_head=duels)) == LEVEL
    duels |= duel("dpo>grpo", 0.51)
    assert one_sentence(study(0.64, 0.601, 0.57, head_to_head=duels)) == (
        "DPO, PPO and GRPO all beat SFT; no difference shown between DPO, which has the highest win rate, "
        "and the others: win rates 64 % [59, 69], 60 % [55, 65] and 57 % [52, 62]."
    )


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ((0.52, 0.4), "No difference shown: the best against SFT is DPO with a win rate of 52 % [47, 57]."),
        ((0.55, 0.4), "No difference shown: the best against SFT is DPO with a win rate of 55 % [50, 60]."),
        (
            (0.3, 0.4),
            "No method beats SFT: the best of those that lose to it is PPO with a win rate of 40 % [35, 45].",
        ),
        ((), "Nothing was compared: no method has a win rate against the reference."),
    ],
)
def test_no_winner(rates: tuple[float, ...], sentence: str) -> None:
    assert one_sentence(study(*rates)) == sentence


def test_a_win_by_seeing_the_judge_is_none() -> None:
    summary = study(0.9, 0.52)
    summary["methods"]["dpo"]["sees_judge"] = True
    assert one_sentence(summary) == (
        "No difference shown: the best against SFT is PPO with a win rate of 52 % [47, 57]; "
        "not counted: DPO (sees the judge)."
    )


def test_the_cost_says_what_is_known() -> None:
    summary = study(0.7)
    summary["methods"]["dpo"]["wall_s"] = 4000
    assert one_sentence(summary) == "DPO beats SFT: win rate 70 % [65, 75], at a cost of 1 h 06 min."


def test_a_judge_at_chance_shows_nothing() -> None:
    summary = study(0.7, judge={"pairs": 90, "accuracy": 0.56, "accuracy_ci95": [0.46, 0.66]})
    summary |= {"head_to_head": duel("dpo>sft", 0.7)}
    nothing = (
        "Nothing is shown: the judge's accuracy, 56.0 % [46.0, 66.0] of held-out pairs, is not clear of "
    )
    assert one_sentence(summary) == nothing + "chance."
    assert verdict(summary) == [nothing + "chance."]
    assert head_to_head(summary) == []
    summary["judge"] = {"pairs": 90, "accuracy": 0.66, "accuracy_ci95": [0.56, 0.76]}
    assert one_sentence(summary) == "DPO beats SFT: win rate 70 % [65, 75]."
    assert verdict(summary)[0] == "DPO beats SFT: win rate 70 % [65, 75]."
    summary["judge"] = {"pairs": 90}
    assert one_sentence(summary) == "Nothing is shown: the judge's accuracy was not measured."


def test_listed() -> None:
    assert [listed(names) for names in (["A"], ["A", "B"], ["A", "B", "C"])] == ["A", "A and B", "A, B and C"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("grpo", "GRPO"),
        ("simpo", "SimPO"),
        ("dpo-beta0.3", "DPO-beta0.3"),
        ("my_run", "my_run"),
        ("2nd", "2nd"),
    ],
)
def test_display_name(name: str, shown: str) -> None:
    assert display_name(name) == shown


def test_the_sentence_carries_the_caveat_of_length_and_the_whole_cost() -> None:
    sft = {"gold_reward": 0.0, "response_tokens": 47.0}
    grpo = {"win_rate": 0.8, "win_rate_ci95": [0.73, 0.86], "wall_s": 175, "learned_reward_s": 33}
    study = {"reference": "sft", "methods": {"sft": sft, "grpo": {**grpo, "response_tokens": 11.0}}}
    assert one_sentence(study) == (
        "GRPO beats SFT: win rate 80 % [73, 86], at a cost of 2 min 55 s (and 33 s for the learned reward); "
        "but GRPO's responses are 4.3 times as short as SFT's: length may explain part of its win."
    )
    study["methods"]["grpo"] = {**grpo, "response_tokens": 40.0}
    assert "but" not in one_sentence(study)
