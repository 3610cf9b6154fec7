"""How a plan cuts a step into micro-batches, held against the collation that really does it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate, microbatches
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.planning.batch import batch_of, check_fits
from trimtab.planning.cutting import Lengths, batch_from, batch_over, cut, forward_times
from trimtab.planning.job import Batch, Layout
from trimtab.planning.trace import Table, evaluate

LAYOUTS: tuple[Layout, ...] = ("packed", "tree", "plain")


def groups_of(lengths: Lengths) -> list[Group]:
    return [
        Group(id=str(i), prompt_tokens=[1] * prompt, responses=[Response(tokens=[2] * n) for n in parts])
        for i, (prompt, parts) in enumerate(lengths)
    ]


def seen(batch: TreeBatch, part: list[Group], layout: Layout) -> float:
    """Pairs that attention computes; in the packed layout by the mask of each tree, entry by entry."""
    if layout == "packed":
        masks = (collate([tree], layout="tree").attention_mask_BLL() for tree in part)
        return float(sum(int(mask.sum()) for mask in masks))
    rows, width = batch.input_ids_BL.shape
    padded = bool((batch.segments_BL < 0).any())
    # The model hands over a mask where there is one, and attention then computes all of the square.
    return rows * width * width if batch.branching or padded else rows * width * (width + 1) / 2


def truth(
    lengths: Lengths, budget: int, layout: Layout, divisible: bool
) -> list[tuple[int, int, int, float]]:
    """Each micro-batch as the tensors say."""
    parts = microbatches(groups_of(lengths), budget, layout=layout, divisible=divisible)
    batches = [collate(part, layout=layout) for part in parts]
    return [
        (b.tokens, int(b.mask_NT.sum()), b.input_ids_BL.shape[0], seen(b, part, layout))
        for b, part in zip(batches, parts, strict=True)
    ]


def found(batch: Batch) -> tuple[Any, ...]:
    return (
        *(batch.tokens, batch.targets, batch.scores, batch.micro_batches),
        *(batch.widest, batch.widest_targets, batch.rows, batch.longest),
    )


def expected(lengths: Lengths, budget: int, layout: Layout, divisible: bool) -> tuple[Any, ...]:
    micros = truth(lengths, budget, layout, divisible)
    fullest = max(micros, key=lambda micro: micro[0])
    tokens, targets, _, scores = (sum(column) for column in zip(*micros, strict=True))
    longest = max(prompt + max(parts) for prompt, parts in lengths)
    return tokens, targets, scores, len(micros), *fullest[:3], longest


def test_a_step_by_hand() -> None:
    """4 prompts of 10 with 3 responses of 5, 30 tokens at once.

    Spread, a tree holds (30 − 10)/5 = 4 ≥ 3 responses: 10 + 15 = 25 tokens, one a micro-batch. That a prompt
    was counted for each response would give 45 tokens a group; that the budget were of responses, 2 trees.
    """
    batch = batch_of(
        10, 5, groups=4, responses=3, micro_batch_tokens=30, layout="packed", divisible=True, layers=8
    )
    assert (batch.tokens, batch.targets, batch.micro_batches) == (100, 60, 4)
    assert (batch.widest, batch.widest_targets, batch.rows, batch.longest) == (25, 15, 1, 15)
    # 10·11/2 = 55 in the prompt, 3·(5·6/2 + 5·10) = 195 in the responses.
    assert batch.scores == 4 * (55 + 195)
    # 4 of 8 layers' worth of micro-batches at once; nothing was asked to pass without gradient.
    assert (batch.forward_times, batch.forward_widest) == (4, 0)


def test_a_group_is_spread_over_trees() -> None:
    """Five responses, of which 20 tokens hold two: trees of 2, 2 and 1, so 20 + 20 + 15 for each prompt.

    3 prompts: six trees of 20 alone, then three of 15 of which 20 tokens hold one. Unspread it is refused.
    """
    how: dict[str, Any] = {"responses": 5, "micro_batch_tokens": 20, "layout": "packed"}
    batch = batch_of(10, 5, groups=3, divisible=True, layers=2, **how)
    assert (batch.tokens, batch.micro_batches, batch.widest) == (3 * 55, 9, 20)
    check_fits(10, 5, divisible=True, **how)
    with pytest.raises(InputError, match="one group needs 35 tokens but micro_batch_tokens is 20"):
        check_fits(10, 5, divisible=False, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisible", [True, False])
def test_the_formula_is_what_the_collation_does(layout: Layout, divisible: bool) -> None:
    draw = random.Random(f"{layout}{divisible}")
    spread = 0
    for _ in range(100):
        prompt, response = draw.randint(1, 20), draw.randint(1, 12)
        groups, responses = draw.randint(1, 6), draw.randint(1, 7)
        whole = (prompt + response) * responses if layout == "plain" else prompt + response * responses
        least = prompt + response if divisible else whole
        budget = draw.randint(least, draw.choice([least + 10, 2 * whole, 5 * whole]) + 1)
        spread += budget < whole
        lengths = [(prompt, [response] * responses)] * groups
        how: dict[str, Any] = {"layout": layout, "divisible": divisible}
        batch = batch_of(
            prompt,
            response,
            groups=groups,
            responses=responses,
            micro_batch_tokens=budget,
            layers=4,
            forward_groups=groups + 1,
            **how,
        )
        about = f"{prompt=} {response=} {groups=} {responses=} {budget=}"
        assert found(batch) == expected(lengths, budget, **how), about
        assert (batch.groups, batch.responses) == (groups, groups * responses)
        passes = truth([*lengths, lengths[0]], 2 * budget, **how)
        most = max(passes, key=lambda micro: micro[0])
        assert (batch.forward_widest, batch.forward_targets, batch.forward_rows) == most[:3], about
    assert spread > 10 if divisible else spread == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisible", [True, False])
def test_lengths_are_cut_as_the_collation_does(layout: Layout, divisible: bool) -> None:
    draw = random.Random(f"{layout}{divisible}")
    for _ in range(50):
        lengths = [
            (draw.randint(1, 15), [draw.randint(1, 9) for _ in range(draw.randint(1, 4))])
            for _ in range(draw.randint(1, 8))
        ]
        how: dict[str, Any] = {"layout": layout, "divisible": divisible}
        budget = draw.randint(24 * 4, 200) if not divisible or layout == "plain" else draw.randint(24, 90)
        micros = [(m.tokens, m.targets, m.rows, m.scores) for m in cut(lengths, budget, **how)]
        assert micros == truth(lengths, budget, **how)
        batch = batch_from(lengths, micro_batch_tokens=budget, layers=2, **how)
        assert found(batch) == expected(lengths, budget, **how)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisible", [True, False])
def test_the_formula_can_be_written_down(layout: Layout, divisible: bool) -> None:
    """Traced once with names for its numbers, and evaluated, it gives what it gives for the numbers."""
    names = ("prompt", "response", "groups", "responses", "micro_batch_tokens", "layers", "forward_groups")
    how: dict[str, Any] = {"layout": layout, "divisible": divisible}
    table = Table()
    inputs: dict[str, Any] = {name: table.name(name) for name in names}
    traced = batch_of(**inputs, **how)
    fields = [field.name for field in dataclasses.fields(Batch)]
    written, places = table.written([getattr(traced, field) for field in fields], names)
    draw = random.Random(0)
    for _ in range(20):
        values: dict[str, Any] = {name: draw.randint(1, 9) for name in names}
        values["micro_batch_tokens"] += values["prompt"] + values["response"]
        computed, plain = evaluate(written, values), batch_of(**values, **how)
        for field, at in zip(fields, places, strict=True):
            assert computed[at] == pytest.approx(getattr(plain, field)), field


def test_the_run_is_a_mean_and_its_fullest_micro_batch() -> None:
    """Steps of 2 of four groups, two of 4 tokens and two of 10: 28 tokens a pass, 14 a step whoever meets.

    The fullest is 20 where the two long ones meet, as they do in some pass.
    """
    lengths = [(2, [2]), (2, [2]), (5, [5]), (5, [5])]
    how: dict[str, Any] = {"layout": "packed", "divisible": False, "layers": 2, "micro_batch_tokens": 64}
    batch = batch_from(lengths, groups=2, **how)
    assert (batch.groups, batch.tokens, batch.widest, batch.widest_targets) == (2, 14, 20, 10)
    assert batch == batch_from(lengths, groups=2, **how)
    whole = batch_from(lengths, groups=2, forward=True, **how)
    assert (whole.forward_widest, whole.forward_targets) == (28, 14)


def test_parts_of_a_step_are_cut_apart() -> None:
    """Two kinds of feedback of one step, each a micro-batch; together they would have been one of 14."""
    how: dict[str, Any] = {"layout": "packed", "divisible": False, "layers": 2, "micro_batch_tokens": 64}
    batch = batch_over([[[(2, [2])], [(5, [5])], []]], **how)
    assert (batch.micro_batches, batch.widest, batch.tokens) == (2, 10, 14)


@pytest.mark.parametrize(
    ("layers", "recompute", "times"), [(1, "none", 1), (7, "none", 3), (40, "none", 8), (40, "some", 1)]
)
def test_passes_without_gradient_take_more(layers: int, recompute: Any, times: int) -> None:
    assert forward_times(layers, recompute) == times


def test_what_cannot_be_planned_is_refused() -> None:
    how: dict[str, Any] = {"layout": "packed", "divisible": False, "layers": 2, "micro_batch_tokens": 8}
    with pytest.raises(InputError, match="one group needs 9 tokens but"):
        batch_from([(4, [5])], **how)
    with pytest.raises(InputError, match="at least one group"):
        batch_from([], **how)
    with pytest.raises(InputError, match="must not be negative"):
        batch_from([(1, [1])], groups=-1, **how)
