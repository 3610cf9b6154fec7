"""``train.token_budget``: every method stops at the same amount of training, whatever a step of it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import assert_same_run, saved_state, stop_at, train

from trimtab import methods
from trimtab.errors import InputError
from trimtab.training.run import UNBOUNDED

Make = Callable[..., Any]

NAMES = ["sft", "dpo", "grpo", "ppo", "reward"]
BUDGET = 400
WHOLE = {
    "train__steps": 0,
    "train__token_budget": BUDGET,
    "train__save_every": 1,
    "train__keep_checkpoints": 99,
}


def tokens_after(out: Path, steps: int) -> list[int]:
    """The count after each step, from its checkpoint."""
    return [saved_state(out, step)["tokens"] for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_it_stops_within_one_step_and_the_rate_falls_with_the_tokens(name: str, configured: Make) -> None:
    result, metrics = train(configured(name, **WHOLE), name)
    spent = tokens_after(result.out, len(metrics))
    assert spent[-1] >= BUDGET > spent[-2], "the last step is the one that reaches the budget"
    assert len(spent) > 2
    assert json.loads((result.out / "lineage.json").read_text())["optimiser_tokens"] == spent[-1]
    expected = [tiny.RATES[name] * (1 - before / BUDGET) for before in [0, *spent[:-1]]]
    assert [m["lr"] for m in metrics] == pytest.approx(expected)
    assert min(expected) > 0


def words(text: str) -> int:
    return len(text.split())


# Of all rows: each prompt once, each answer with its end token.
EXPECTED = {
    "sft": sum(words(r["prompt"]) + words(r["completion"]) + 1 for r in tiny.demonstrations()),
    "dpo": sum(words(r["prompt"]) + words(r["chosen"]) + words(r["rejected"]) + 2 for r in tiny.pairs()),
    "reward": sum(
        words(r["prompt"]) + sum(words(answer) + 1 for answer in r["responses"]) for r in tiny.rankings()
    ),
}


@pytest.mark.parametrize("layout", ["tree", "plain"])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_what_is_counted_of_files(name: str, layout: str, configured: Make, tiny_data: Path) -> None:
    """Not the padding, and a prompt once for all its answers: in the plain layout, too."""
    options: dict[str, Any] = {"train__steps": 1, "train__batch_groups": 8, "model__layout": layout}
    if name == "reward":
        options["data__sources"] = [{"path": str(tiny_data / "rankings.jsonl")}]
    result, _ = train(configured(name, **options), name)
    assert result.state.tokens == EXPECTED[name]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_what_is_counted_of_rollouts(name: str, configured: Make) -> None:
    """Every pass over a rollout counts, since it costs as much; a cut group counts as one."""
    changed = {f"{name}__epochs_per_rollout": 2, "train__micro_batch_tokens": 16}
    result, _ = train(configured(name, train__steps=2, train__save_every=1, **changed), name)
    pending = saved_state(result.out, 1)["pending"]
    rollout = sum(len(g["prompt_tokens"]) + sum(len(r["tokens"]) for r in g["responses"]) for g in pending)
    assert len(pending) == 4
    assert tokens_after(result.out, 2) == [rollout, 2 * rollout]


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_resumed_run_keeps_the_count(name: str, configured: Make) -> None:
    options = WHOLE | {"train__save_every": 2, "train__eval_every": 1}
    straight = methods.find(name).train(configured(name, out="straight", **options))
    with pytest.raises(KeyboardInterrupt):
        methods.find(name).train(configured(name, **options), on_eval=stop_at(3))
    resumed = methods.find(name).train(configured(name, run__resume=True, **options))
    assert resumed.state.tokens == straight.state.tokens
    assert_same_run(straight.out, resumed.out)


def test_a_budget_below_one_step_is_one_step(configured: Make) -> None:
    result, metrics = train(configured("sft", **WHOLE | {"train__token_budget": 1}), "sft")
    assert len(metrics) == 1
    assert metrics[0]["lr"] == tiny.RATES["sft"]
    assert result.state.tokens > 1


def test_steps_and_a_budget_stop_at_whichever_is_first(configured: Make) -> None:
    few = configured("sft", out="few", train__steps=2, train__token_budget=10**6)
    assert len(train(few, "sft")[1]) == 2
    poor = configured("sft", out="poor", train__steps=10**6, train__token_budget=100)
    _, metrics = train(poor, "sft")
    assert 2 <= len(metrics) < 10
    assert UNBOUNDED > 10**6


def test_the_end_is_evaluated(configured: Make) -> None:
    done: list[int] = []

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        done.append(step)
        return {}

    _, metrics = train(configured("dpo", **WHOLE), "dpo", on_eval=on_eval)
    assert done == [0, len(metrics)]


def test_epochs_beside_a_budget_are_refused(configured: Make) -> None:
    with pytest.raises(InputError, match="epochs has no effect with token_budget"):
        configured("sft", train__steps=0, train__token_budget=100, train__epochs=2.0)
