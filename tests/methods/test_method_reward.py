"""Reward models: what they learn from pairs and rankings, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import train
from transformers import AutoModelForSequenceClassification

from trimtab.errors import InputError
from trimtab.methods.reward import pair_metrics
from trimtab.models.load import load_scalar_model

Make = Callable[..., Any]


def test_reward_learns_its_pairs(configured: Make) -> None:
    _, metrics = train(configured("reward", train__steps=30, train__batch_groups=8), "reward")
    first, last = metrics[0], metrics[-1]
    assert first["loss"] > 0.4
    assert last["loss"] < 0.2
    assert last["accuracy"] == 1.0
    assert last["chosen_reward"] > last["rejected_reward"]
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    middle = (last["chosen_reward"] + last["rejected_reward"]) / 2
    assert last["reward_mean"] == pytest.approx(middle, abs=1e-6)
    assert first["response_tokens"] == pytest.approx((8 * 2 + 4 * 2 + 4 * 3) / 16)  # each with its end


def test_a_new_head_follows_the_seed(configured: Make) -> None:
    losses = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = configured("reward", out=out, train__steps=1, train__batch_groups=8, train__seed=seed)
        losses.append(train(config, "reward")[1][0]["loss"])
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-3


def scores(model: Any, prompt: str, responses: list[str]) -> list[float]:
    """By transformers' own forward pass, one sequence at a time."""
    tokenizer = tiny.tokenizer()
    ids = [[*tokenizer(f"{prompt} {text}")["input_ids"], tokenizer.eos_token_id] for text in responses]
    with torch.no_grad():
        return [float(model(torch.tensor([row])).logits) for row in ids]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("loss", ["pairs", "listwise"])
@pytest.mark.parametrize("centre", [0.0, 0.1])
def test_the_loss_is_that_of_the_formulas(
    loss: str, centre: float, configured: Make, tiny_data: Path
) -> None:
    """Rankings of 2, 3 and 4: each group weighs the same, and each pair within its group."""
    options = {"reward_model__loss": loss, "reward_model__centre": centre, "train__micro_batch_tokens": 40}
    sources = [{"path": str(tiny_data / "rankings.jsonl"), "weight": 1.0}]
    config = configured("reward", train__steps=1, train__batch_groups=8, data__sources=sources, **options)
    _, metrics = train(config, "reward")
    model = load_scalar_model(config.model, new_head="normal").model
    losses, right, pairs_of_ranking = [], [], []
    for row in tiny.rankings():
        found = [
            s
            for _, s in sorted(zip(row["ranks"], scores(model, row["prompt"], row["responses"]), strict=True))
        ]
        K = len(found)
        gaps = [found[i] - found[j] for i in range(K) for j in range(i + 1, K)]
        if loss == "pairs":
            value = sum(softplus(-gap) for gap in gaps) / len(gaps)
        else:
            value = sum(math.log(sum(math.exp(s) for s in found[k:])) - found[k] for k in range(K))
        losses.append(value + centre * (2 * sum(found) / K) ** 2)
        right.append(sum(gap > 0 for gap in gaps) / len(gaps))
        pairs_of_ranking.append(len(gaps))
    assert set(pairs_of_ranking) == {1, 3, 6}
    assert metrics[0]["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert metrics[0]["accuracy"] == pytest.approx(sum(right) / 8)
    # What a sum over all pairs, or their common mean, would give.
    weighted = sum(v * n for v, n in zip(losses, pairs_of_ranking, strict=True)) / sum(pairs_of_ranking)
    assert abs(metrics[0]["loss"] - weighted) > 1e-3


def test_of_pairs_listwise_is_the_same_loss(configured: Make) -> None:
    found = [
        train(configured("reward", out=loss, train__steps=3, reward_model__loss=loss), "reward")[1]
        for loss in ("pairs", "listwise")
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_centring_holds_the_scores_around_zero(configured: Make, tmp_path: Path) -> None:
    start = tiny.save_reward_model(tmp_path / "start")
    ends = {}
    for centre in (0.0, 0.5):
        config = configured(
            "reward",
            out=str(centre),
            train__steps=20,
            train__batch_groups=8,
            model__path=str(start),
            reward_model__centre=centre,
        )
        ends[centre] = abs(train(config, "reward")[1][-1]["reward_mean"])
    assert ends[0.5] < 0.5 * ends[0.0]


def test_equal_scores_are_half_right() -> None:
    scores_PK = torch.tensor([[1.0, 1.0, 0.0], [2.0, 3.0, 9.0]])
    ranks_PK = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 0.0]])
    mask_PK = torch.tensor([[True, True, True], [True, True, False]])
    shown = pair_metrics(scores_PK.masked_fill(~mask_PK, 0), ranks_PK, mask_PK)
    # First group: 1 = 1 counts ½, 1 > 0 counts 1; the tie of ranks is no pair. Second: 2 < 3, one pair.
    assert shown["accuracy"].tolist() == [0.75, 0.0]
    assert shown["reward_margin"].tolist() == [0.5, -1.0]
    assert shown["reward_mean"].tolist() == pytest.approx([2 / 3, 2.5])


def test_a_run_from_a_reward_model_keeps_its_head(configured: Make, tmp_path: Path) -> None:
    start = tiny.save_reward_model(tmp_path / "start")
    config = configured("reward", train__steps=1, train__lr=0.0, model__path=str(start))
    result, _ = train(config, "reward")
    ids = torch.tensor([[6, 7, 8, 2]])
    models = [AutoModelForSequenceClassification.from_pretrained(p) for p in (start, result.out / "model")]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_row_weights_multiply_the_loss(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.methods import reward

    base = train(configured("reward", out="base", train__steps=1), "reward")[1]
    monkeypatch.setattr(reward, "group_weights", lambda groups: torch.full((len(groups),), 3.0))
    heavy = train(configured("reward", out="heavy", train__steps=1), "reward")[1]
    assert heavy[0]["loss"] == pytest.approx(3 * base[0]["loss"], rel=1e-5)


# ---------------------------------------------------------------- bad input


def test_a_model_of_several_outputs_is_refused(configured: Make, tmp_path: Path) -> None:
    several = tiny.save_reward_model(tmp_path / "several", num_labels=3)
    with pytest.raises(InputError, match=r"^model\.path: .*several gives 3 scores; .* trained on one"):
        train(configured("reward", model__path=str(several)), "reward")


@pytest.mark.parametrize("ranks", [[1, 1, 2], [2, 1, 2]])
def test_ties_are_refused_where_that_is_asked_for(ranks: list[int], configured: Make, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "ranks": ranks}]
    tiny.write_rows(tmp_path / "ties.jsonl", rows)
    options = {"train__steps": 1, "data__sources": [{"path": str(tmp_path / "ties.jsonl")}]}
    for loss in ("listwise", "pairs"):
        made = configured("reward", out=loss, reward_model__loss=loss, reward_model__ties="refuse", **options)
        with pytest.raises(InputError, match=r'^ties\.jsonl:0: two responses have one rank.*use "exact"'):
            train(made, "reward")
        _, metrics = train(configured("reward", out=f"{loss}2", reward_model__loss=loss, **options), "reward")
        assert math.isfinite(metrics[0]["loss"])


def test_rows_that_order_nothing_are_named(configured: Make, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "flat.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}])
    sources = [{"path": str(tmp_path / "flat.jsonl")}]
    with pytest.raises(InputError, match=r"flat\.jsonl: none of its rows gives a pair, a ranking or ratings"):
        train(configured("reward", data__sources=sources), "reward")
