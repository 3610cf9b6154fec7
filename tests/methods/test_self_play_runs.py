"""Whole runs of SPIN and online DPO: resume, layouts, micro-batches, adapters, two players, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import assert_same_run, comparable, stop_at

from trimtab import methods
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods import online_dpo, spin
from trimtab.training.metrics import read_metrics

Make = Callable[..., Any]
ADAPTER = {"adapter__kind": "lora", "adapter__rank": 4}
# A checkpoint after step 3 falls into the second pass over a rollout, and the reference that was refreshed in
# step 3 is first read in step 5; in SPIN into an
# iteration whose pairs partly are the last one's.
ONLINE = {
    "train__batch_groups": 2,
    "online_dpo__rollout_groups": 4,
    "online_dpo__epochs_per_rollout": 2,
    "online_dpo__refresh_reference_every": 3,
}
SPIN = {"spin__iterations": 3, "spin__iteration_groups": 5, "spin__beta_by_iteration": [0.1, 0.2, 0.5]}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("online-dpo", ONLINE),
    ("online-dpo", ONLINE | {"online_dpo__opponents": "reference", "online_dpo__pairing": "all"}),
    ("online-dpo", {"online_dpo__overlap": True}),
    ("online-dpo", ONLINE | {"online_dpo__reference_average": 0.5, "online_dpo__loss": "ipo"}),
    ("spin", SPIN),
    ("spin", {"spin__iterations": 2, "spin__restart": False, "spin__keep_previous": False}),
    ("spin", SPIN | ADAPTER),
    ("online-dpo", ONLINE | ADAPTER),
]


@pytest.fixture
def letters(tmp_path: Path) -> list[dict[str, str]]:
    """A reward that only equal texts have alike."""
    body = "return sum(math.sqrt(ord(letter)) * k for k, letter in enumerate(response))"
    return [{"name": tiny.write_reward(tmp_path / "letters.py", body), "label": "letters"}]


def run_of(name: str, config: Any, **keywords: Any) -> tuple[Path, list[dict[str, Any]]]:
    result = methods.find(name).train(config, **keywords)
    return result.out, read_metrics(result.out / "metrics.jsonl")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "changed"), CASES)
def test_resume_is_bit_exact(name: str, changed: dict[str, Any], dtype: str, configured: Make) -> None:
    options = {"train__save_every": 3, "train__eval_every": 1, "model__dtype": dtype, **changed}
    straight, _ = run_of(name, configured(name, out="straight", **options))
    with pytest.raises(KeyboardInterrupt):
        run_of(name, configured(name, out="stopped", **options), on_eval=stop_at(5))
    torch.manual_seed(12345)
    stopped, _ = run_of(name, configured(name, out="stopped", run__resume=True, **options))
    if "adapter__kind" in changed:
        metrics = [comparable(read_metrics(out / "metrics.jsonl")) for out in (straight, stopped)]
        assert metrics[0] == metrics[1]
        last = "checkpoints/step-00000006/tensors.safetensors"
        ours, theirs = load_file(straight / last), load_file(stopped / last)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    else:
        assert_same_run(straight, stopped)


def test_spin_checkpoint_holds_what_the_iteration_began_with(configured: Make) -> None:
    """The opponent's log-probabilities, of old pairs too: with one spoilt it goes on otherwise."""
    options = {"train__save_every": 3, "train__eval_every": 1, **SPIN}
    straight, _ = run_of("spin", configured("spin", out="straight", **options))
    config = configured("spin", out="stopped", **options)
    with pytest.raises(KeyboardInterrupt):
        run_of("spin", config, on_eval=stop_at(4))
    state = tiny.saved_state(Path(config.run.out), 3)
    assert state["controllers"]["fresh"] == 5
    assert len(state["pending"]) == 10
    for pair in state["pending"]:
        pair["responses"][0]["ref_logps"][0] -= 1.0
    checkpoint = Path(config.run.out) / "checkpoints/step-00000003"
    (checkpoint / "state.json").write_text(json.dumps(state))
    tiny.reseal(checkpoint)
    stopped, _ = run_of("spin", configured("spin", out="stopped", run__resume=True, **options))
    with pytest.raises(AssertionError):
        assert_same_run(straight, stopped)


@pytest.mark.usefixtures("norms_in_their_own_dtype")
@pytest.mark.parametrize("name", ["spin", "online-dpo"])
def test_layouts_and_micro_batches_do_not_change_what_is_learned(name: str, configured: Make) -> None:
    common: dict[str, Any] = {
        "train__steps": 3,
        "model__dtype": "float64",
        "train__adam_eps": 1e-3,
        "train__lr": 1e-2,
    }
    if name == "spin":
        common["spin__iterations"] = 2
    else:
        common |= {"online_dpo__pairing": "all", "online_dpo__epochs_per_rollout": 3}
    runs = [
        methods.find(name).train(
            configured(
                name,
                out=f"{layout}{tokens}",
                train__micro_batch_tokens=tokens,
                model__layout=layout,
                **common,
            )
        )
        for layout, tokens in (("tree", 4096), ("tree", 48), ("plain", 4096), ("plain", 80))
    ]
    first = runs[0].state.optimiser
    assert max(state["exp_avg"].abs().max().item() for state in first.adam.state.values()) > 1e-3
    for other in runs[1:]:
        for key, weight in first.masters.items():
            assert (weight - other.state.optimiser.masters[key]).abs().max().item() <= 1e-10, key


def test_the_first_step_starts_at_ln_2_and_learns(configured: Make) -> None:
    for name in ("spin", "online-dpo"):
        out, metrics = run_of(name, configured(name, train__steps=6))
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
        assert metrics[0]["grad_norm"] > 0
        assert json.loads((out / "lineage.json").read_text())["models_in_memory"] == (
            1 if name == "spin" else 2
        )


def test_every_iteration_begins_with_the_policy_as_its_opponent(configured: Make) -> None:
    """The loss is back at ln 2 with the first step of an iteration."""
    _, metrics = run_of("spin", configured("spin", train__steps=9, spin__iterations=3, train__lr=0.02))
    begins = [m for i, m in enumerate(metrics) if i % 3 == 0]
    assert [m["iteration"] for m in begins] == [0, 1, 2]
    assert [m["loss"] for m in begins] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert abs(metrics[2]["reward_margin"]) > 1e-3
    assert [m["lr"] for m in begins] == [0.02] * 3


def test_the_schedule_over_the_run_and_given_values(configured: Make) -> None:
    options: dict[str, Any] = {"spin__iterations": 3, "spin__steps_per_iteration": 2, "train__steps": 0}
    _, whole = run_of("spin", configured("spin", out="whole", spin__restart=False, **options))
    assert [m["lr"] for m in whole] == pytest.approx([0.01 * (1 - k / 6) for k in range(6)])
    given = {"spin__lr_by_iteration": [4e-3, 2e-3, 1e-3], "spin__beta_by_iteration": [0.1, 0.1, 5.0]}
    _, given_values = run_of("spin", configured("spin", out="given", train__lr=1e-6, **options, **given))
    assert [m["lr"] for m in given_values] == pytest.approx([4e-3, 2e-3, 2e-3, 1e-3, 1e-3, 5e-4])
    assert [m["beta"] for m in given_values] == [0.1, 0.1, 0.1, 0.1, 5.0, 5.0]


def test_a_token_budget_leaves_the_schedule_of_an_iteration_alone(configured: Make) -> None:
    """The budget is the run's: counted in, the second iteration would begin far below the peak."""
    options = {"spin__iterations": 2, "spin__steps_per_iteration": 2, "train__steps": 0}
    _, metrics = run_of("spin", configured("spin", train__token_budget=10_000, **options))
    _, tight = run_of("spin", configured("spin", out="tight", train__token_budget=200, **options))
    assert [m["lr"] for m in metrics] == pytest.approx([0.01, 0.005, 0.01, 0.005])
    assert 2 < len(tight) <= 4
    assert [m["lr"] for m in tight] == pytest.approx([0.01, 0.005, 0.01, 0.005][: len(tight)])


def test_lengths_of_iterations(configured: Make) -> None:
    def lengths(**changed: Any) -> list[int]:
        return spin.iteration_lengths(configured("spin", **{"train__steps": 0, **changed}), 8)

    # Eight demonstrations in batches of 4; from the second iteration on twice as many pairs.
    assert lengths() == [2, 4, 4, 4]
    assert lengths(spin__keep_previous=False, train__epochs=2.0) == [4, 4, 4, 4]
    assert lengths(train__steps=10) == [2, 3, 2, 3]
    assert lengths(spin__steps_per_iteration=7, spin__iterations=2) == [7, 7]
    assert lengths(spin__iteration_groups=3, spin__iterations=2) == [1, 2]
    with pytest.raises(InputError, match="fills an iteration of 2 steps"):
        lengths(train__warmup_steps=2)
    with pytest.raises(InputError, match="fills an iteration of 1 steps"):
        lengths(spin__steps_per_iteration=1, train__warmup_steps=5)
    assert lengths(spin__steps_per_iteration=1, train__warmup_steps=1) == [1, 1, 1, 1]
    assert [spin.place([2, 3], k) for k in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_a_pass_takes_every_pair_once_and_the_next_has_its_own_order() -> None:
    pairs = [Group(id=str(k)) for k in range(6)]
    steps = [[g.id for g in spin.pairs_of_step(pairs, 1, at, 4, seed=0)] for at in range(3)]
    drawn = [name for step in steps for name in step]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [str(k) for k in range(6)]
    assert drawn[:6] != drawn[6:]
    assert [g.id for g in spin.pairs_of_step(pairs, 2, 0, 4, seed=0)] != steps[0]


def test_the_two_players_draw_with_noise_of_their_own(configured: Make, letters: list[Any]) -> None:
    """Before the first update both are one model: with one noise every answer would meet its twin."""
    options = {"online_dpo__opponents": "reference", "online_dpo__samples": 2, "train__steps": 2}
    _, metrics = run_of("online-dpo", configured("online-dpo", reward__terms=letters, **options))
    assert metrics[0]["pairs"] == 4
    assert metrics[0]["ties"] == 0
    assert all(line["reference_reward"] != line["reward_mean"] for line in metrics)


def test_refreshing_the_reference_starts_the_margin_anew(configured: Make, letters: list[Any]) -> None:
    options: dict[str, Any] = {
        "reward__terms": letters,
        "train__lr": 0.05,
        "train__schedule": "constant",
        "train__steps": 4,
    }
    _, kept = run_of("online-dpo", configured("online-dpo", out="kept", **options))
    _, fresh = run_of(
        "online-dpo", configured("online-dpo", out="new", online_dpo__refresh_reference_every=2, **options)
    )
    assert fresh[2]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(kept[2]["loss"] - math.log(2)) > 1e-3


def test_steps_without_a_pair_leave_the_weights_and_end(configured: Make, tmp_path: Path) -> None:
    """A reward that is always the same: nothing is learned, nothing is divided by, and a budget is spent."""
    reward = tiny.write_reward(tmp_path / "same.py", "return 1.0")
    terms = [{"name": reward, "label": "same"}]
    config = configured("online-dpo", reward__terms=terms, train__steps=0, train__token_budget=400)
    before = load_file(Path(config.model.path) / "model.safetensors")
    out, metrics = run_of("online-dpo", config)
    assert all(m["pairs"] == 0 and m["ties"] == 1 and "loss" not in m for m in metrics)
    after = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["tied_pairs"] == 6 * 4 * len(metrics)
    assert lineage["optimiser_tokens"] >= 400


def test_a_pairwise_judge_labels_the_pairs(configured: Make, tmp_path: Path) -> None:
    """As a reward term. It prefers more words; what it said of a step is in the step's metrics."""
    said = tmp_path / "said"
    (tmp_path / "longer.py").write_text(
        "def judge(*, mode):\n"
        "    def answer(groups):\n"
        "        sizes = [[len(r.text.split()) for r in g.responses] for g in groups]\n"
        "        outcomes = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in sizes]\n"
        f"        open({str(said)!r}, 'a').write(f'{{outcomes}}\\n')\n"
        "        return [{'preferences': [[0, 1, outcome]]} for outcome in outcomes]\n"
        "    return answer\n"
    )
    judge = {"kind": "custom", "name": f"{tmp_path / 'longer.py'}:judge", "mode": "pairwise"}
    for opponents in ("self", "reference"):
        said.write_text("")
        config = configured(
            "online-dpo",
            out=opponents,
            reward__terms=[{"name": "judge", "args": judge}],
            online_dpo__samples=2,
            online_dpo__opponents=opponents,
            train__steps=4,
        )
        _, metrics = run_of("online-dpo", config)
        outcomes = [json.loads(line) for line in said.read_text().splitlines()]
        assert sum(value != 0.5 for row in outcomes for value in row) > 4
        for line, row in zip(metrics, outcomes, strict=True):
            assert line["pairs"] == sum(value != 0.5 for value in row)
            assert line["ties"] == sum(value == 0.5 for value in row) / 4
            # The first response is the policy's; where both are, their win fractions add up to 1.
            assert line.get("win_rate", sum(row) / 4) == sum(row) / 4
            assert line["reward_mean"] == (0.5 if opponents == "self" else sum(row) / 4)


def test_the_penalty_makes_the_response_with_an_end_better(configured: Make) -> None:
    options: dict[str, Any] = {"train__steps": 1, "sampling__max_new_tokens": 3, "online_dpo__samples": 4}
    _, [plain] = run_of("online-dpo", configured("online-dpo", out="plain", **options))
    _, [fined] = run_of(
        "online-dpo", configured("online-dpo", out="fined", online_dpo__missing_end_penalty=2.0, **options)
    )
    assert plain["cut_off"] == fined["cut_off"] > 0
    assert fined["reward_mean"] == pytest.approx(plain["reward_mean"] - 2.0 * plain["cut_off"])
    assert fined["reward/vowels"] == plain["reward/vowels"]


@pytest.mark.parametrize(
    ("name", "changed", "match"),
    [
        ("online-dpo", {"sampling__temperature": 0}, "nothing to compare"),
        ("online-dpo", {"online_dpo__samples": 2, "online_dpo__pairing": "all"}, "one pair a prompt"),
        ("online-dpo", {"online_dpo__samples": 2, "online_dpo__opponents": "both"}, "raise samples"),
        ("online-dpo", {"online_dpo__overlap": True, "online_dpo__opponents": "reference"}, "set overlap"),
        ("online-dpo", {"online_dpo__beta_shape": "cosine"}, "without beta_end"),
        (
            "online-dpo",
            {"online_dpo__label_smoothing": 0.1, "online_dpo__loss": "ipo"},
            "no effect with loss",
        ),
        ("online-dpo", {"online_dpo__loss": "robust"}, "needs a label_smoothing"),
        ("online-dpo", {"online_dpo__reference_average": 0.5}, "without refresh_reference_every"),
        ("online-dpo", {"online_dpo__samples": 1}, "greater than or equal to 2"),
        ("spin", {"spin__beta_by_iteration": [0.1]}, "1 values for 4 iterations"),
        ("spin", {"spin__beta": 0.2, "spin__beta_by_iteration": [0.1] * 4}, "beta has no effect"),
        ("spin", {"spin__lr_by_iteration": [0.1, 0.1, 0.1, 0.0]}, "above 0"),
        ("spin", {"spin__lr_by_iteration": [0.1] * 4}, "train.lr has no effect"),
        ("spin", {"spin__steps_per_iteration": 2}, "train.steps has no effect"),
        ("spin", {"spin__steps_per_iteration": 2, "train__steps": 0, "train__epochs": 2.0}, "train.epochs"),
        ("spin", {"train__steps": 3}, "fewer than spin.iterations"),
        ("spin", {"spin__iterations": 1, "spin__restart": False}, "no effect with iterations = 1"),
    ],
)
def test_contradictions_are_refused(name: str, changed: dict[str, Any], match: str, configured: Make) -> None:
    with pytest.raises(InputError, match=match):
        configured(name, **changed)


def test_rows_without_a_demonstration_are_named(configured: Make, tiny_data: Path) -> None:
    config = configured("spin", data__sources=[{"path": str(tiny_data / "prompts.jsonl")}])
    with pytest.raises(InputError, match="none of its rows gives a demonstration"):
        spin.train(config)


def test_demonstrations_longer_than_any_sample_are_said(configured: Make) -> None:
    out, _ = run_of("spin", configured("spin", sampling__max_new_tokens=2, train__steps=4))
    lines = " ".join(json.loads((out / "lineage.json").read_text())["lines"])
    assert "8 of 8 demonstrations are longer than sampling.max_new_tokens = 2" in lines


def test_challengers_give_half_of_the_samples() -> None:
    made = online_dpo.OnlineDPOConfig(samples=5, opponents="reference")
    assert made.challengers == 2
    assert made.meets == [(i, j) for i in range(3) for j in (3, 4)]
    assert len(online_dpo.OnlineDPOConfig(samples=5, opponents="both").meets) == 10
