"""Laying groups out: the one shift, both layouts, and micro-batches within their budget."""

from __future__ import annotations

import itertools
import random

import families
import pytest
import torch

from trimtab.batch import PADDING, Layout, Span, TreeBatch
from trimtab.data.collate import collate, group_tokens, microbatches
from trimtab.errors import InputError
from trimtab.groups import Group, Response

LAYOUTS: list[Layout] = ["packed", "tree", "plain"]
X, A, B, C, D = 11, 12, 13, 14, 15


def example() -> Group:
    """Two responses, "b c" and "d", to the prompt "x a": the example in batch.py."""
    return Group(id="a", prompt_tokens=[X, A], responses=[Response(tokens=[B, C]), Response(tokens=[D])])


def test_the_tree_of_the_legend() -> None:
    batch = collate([example()])
    assert batch.input_ids_BL.tolist() == [[X, A, B, C, D]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.segments_BL.tolist() == [[0, 0, 1, 1, 2]]
    # The last prompt token (place 1) predicts both first tokens. Taken from the place before, as in a plain
    # sequence, "d" would be predicted from "c", a sibling's end.
    assert batch.sources_NT[0].tolist() == [1, 2]
    assert batch.sources_NT[1, 0].item() == 1
    assert batch.targets_NT.tolist() == [[B, C], [D, 0]]
    assert batch.mask_NT.tolist() == [[True, True], [True, False]]
    assert batch.branching


def test_the_plain_layout_of_the_same() -> None:
    batch = collate([example()], layout="plain", pad_id=99)
    assert batch.input_ids_BL.tolist() == [[X, A, B, C], [X, A, D, 99]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.segments_BL.tolist() == [[0, 0, 1, 1], [0, 0, 1, PADDING]]
    # Flat over both rows: row 1 begins at 4.
    assert batch.sources_NT[0].tolist() == [1, 2]
    assert batch.sources_NT[1, 0].item() == 5
    assert batch.targets_NT.tolist() == [[B, C], [D, 0]]
    assert not batch.branching


def test_the_packed_row_of_the_same_and_another() -> None:
    """One row without padding. A group with one response is one span, which nothing continues."""
    alone = Group(id="b", prompt_tokens=[X, A, B], responses=[Response(tokens=[C, D])], weight=2.0)
    batch = collate([example(), alone, example()], layout="packed", pad_id=99)
    assert batch.input_ids_BL.tolist() == [[X, A, B, C, D, X, A, B, C, D, X, A, B, C, D]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 2]]
    assert batch.segments_BL.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0, 3, 3, 0, 0, 4, 4, 5]]
    # Places in the one row. In "d", the second response, the first token is predicted from the prompt's end.
    assert batch.sources_NT.tolist() == [[1, 2], [1, 0], [7, 8], [11, 12], [11, 0]]
    assert batch.lasts_N.tolist() == [3, 4, 9, 13, 14]
    assert batch.weights_N.tolist() == [1, 1, 2, 1, 1]
    assert batch.spans == (
        *(Span(0, 2, 5), Span(2, 4, 4), Span(4, 5, 5)),
        Span(5, 10, 10),
        *(Span(10, 12, 15), Span(12, 14, 14), Span(14, 15, 15)),
    )
    assert batch.branching
    assert batch.tokens == 15
    assert not collate([alone], layout="packed").branching
    assert collate([example()]).spans == collate([example()], layout="plain").spans == ()


def test_packed_groups_with_empty_responses_and_without_any() -> None:
    groups = [example(), Group(id="b", prompt_tokens=[X], responses=[Response(tokens=[])])]
    groups[0].responses.insert(0, Response(tokens=[]))
    groups.append(Group(id="c", prompt_tokens=[X, A], responses=[]))
    batch = collate(groups, layout="packed")
    assert batch.lasts_N.tolist() == [1, 3, 4, 5]
    assert batch.mask_NT.sum(-1).tolist() == [0, 2, 1, 0]
    # Every place is in exactly one span, and a span ends where the next begins.
    assert [(s.start, s.stop) for s in batch.spans] == [(0, 2), (2, 2), (2, 4), (4, 5), (5, 6), (6, 8)]
    assert batch.tokens == 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_predicted_from_what_stands_before_it(layout: Layout) -> None:
    groups = families.groups()
    batch = collate(groups, layout=layout)
    ids, positions = batch.input_ids_BL.flatten(), batch.position_ids_BL.flatten()
    responses = [(g.prompt_tokens or [], r.tokens or []) for g in groups for r in g.responses]
    assert batch.mask_NT.shape == (6, 11)
    for n, (prompt, own) in enumerate(responses):
        assert batch.mask_NT[n].tolist() == [t < len(own) for t in range(11)]
        for t, token in enumerate(own):
            source = batch.sources_NT[n, t]
            assert batch.targets_NT[n, t] == token
            assert ids[source] == (prompt + own)[len(prompt) + t - 1]
            assert positions[source] == len(prompt) + t - 1


def test_all_layouts_have_the_same_targets_masks_and_weights() -> None:
    groups = families.groups()
    groups[1].weight = 2.5
    *others, plain = (collate(groups, layout=layout) for layout in LAYOUTS)
    assert plain.weights_N.tolist() == [1, 1, 1, 2.5, 2.5, 1]
    for other in others:
        assert torch.equal(other.targets_NT, plain.targets_NT)
        assert torch.equal(other.mask_NT, plain.mask_NT)
        assert torch.equal(other.weights_N, plain.weights_N)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_responses_are_aligned_with_their_own_tokens(layout: Layout) -> None:
    group = example()
    group.responses[0].mask = [False, True]
    assert collate([group], layout=layout).mask_NT.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_response_has_a_row_without_tokens(layout: Layout) -> None:
    group = example()
    group.responses.insert(1, Response(tokens=[]))
    batch = collate([group], layout=layout)
    assert batch.mask_NT.tolist() == [[True, True], [False, False], [True, False]]
    assert batch.targets_NT[2, 0] == D


def test_a_mask_of_another_length_is_refused() -> None:
    group = example()
    group.responses[0].mask = [True]
    with pytest.raises(ValueError, match="1 entries for 2 tokens"):
        collate([group])


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt tokens"):
        collate([Group(id="g", prompt_tokens=[], responses=[Response(tokens=[1])])])
    with pytest.raises(ValueError, match="not been tokenised"):
        collate([Group(id="g", prompt_tokens=[1], responses=[Response(text="b")])])


def sizes(groups: list[Group], layout: Layout) -> int:
    return collate(groups, layout=layout).tokens


def many(seed: int, responses: tuple[int, int] = (1, 4)) -> list[Group]:
    draw = random.Random(seed)
    return [
        Group(
            id=str(i),
            prompt_tokens=families.tokens(draw.randint(1, 20), draw),
            responses=[
                Response(tokens=families.tokens(draw.randint(1, 30), draw))
                for _ in range(draw.randint(*responses))
            ],
        )
        for i in range(draw.randint(1, 30))
    ]


@pytest.mark.parametrize("divisible", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_keep_the_budget_padding_counted_and_lose_nothing(
    layout: Layout, divisible: bool
) -> None:
    for seed in range(15):
        groups = many(seed)
        budget = max(group_tokens(g, layout) for g in groups) + 10 * seed
        parts = microbatches(groups, budget, layout=layout, divisible=divisible)
        assert max(sizes(part, layout) for part in parts) <= budget
        given = sorted(id(r) for g in groups for r in g.responses)
        assert sorted(id(r) for part in parts for g in part for r in g.responses) == given
        if not divisible:
            assert sorted(id(g) for part in parts for g in part) == sorted(map(id, groups))
        # The longest come first, so that the largest micro-batch is met at once.
        lengths = [group_tokens(g, layout) for part in parts for g in part]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_are_filled(layout: Layout) -> None:
    """No two neighbours would have fitted together."""
    for seed in range(15):
        groups = many(seed)
        budget = 3 * max(group_tokens(g, layout) for g in groups)
        parts = microbatches(groups, budget, layout=layout)
        for part, following in itertools.pairwise(parts):
            assert sizes([*part, following[0]], layout) > budget


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_over_the_budget_are_cut_where_they_may_be(layout: Layout) -> None:
    draw = random.Random(0)
    # One tree of 10 + 8·5 = 50 tokens; in plain rows 8·15 = 120.
    responses = [Response(tokens=families.tokens(5, draw)) for _ in range(8)]
    group = Group(id="big", prompt_tokens=families.tokens(10, draw), responses=responses, weight=3.0)
    parts = microbatches([group], 31, layout=layout, divisible=True)
    kept = [part for parts_of in parts for part in parts_of]
    # A tree of 31 tokens holds the prompt and 4 responses; 31 plain tokens are two rows of 15.
    assert [len(part.responses) for part in kept] == ([2, 2, 2, 2] if layout == "plain" else [4, 4])
    assert all(part.weight == 3.0 and part.prompt_tokens == group.prompt_tokens for part in kept)
    assert [r for part in kept for r in part.responses] == responses
    assert len(group.responses) == 8


@pytest.mark.parametrize(("divisible", "needed"), [(False, 50), (True, 15)])
def test_what_cannot_fit_says_how_large_the_budget_must_be(divisible: bool, needed: int) -> None:
    draw = random.Random(0)
    responses = [Response(tokens=families.tokens(5, draw)) for _ in range(8)]
    group = Group(id="file:9", prompt_tokens=families.tokens(10, draw), responses=responses)
    with pytest.raises(InputError, match=rf"file:9: one group needs {needed} tokens .* at least {needed}"):
        microbatches([group], 14, divisible=divisible)
    assert microbatches([group], needed, divisible=divisible)


def test_group_tokens_is_what_the_group_alone_costs() -> None:
    for group in many(3):
        for layout in LAYOUTS:
            assert group_tokens(group, layout) == collate([group], layout=layout).tokens


def test_nothing_in_nothing_out() -> None:
    assert microbatches([], 10) == []
    empty = collate([])
    assert isinstance(empty, TreeBatch)
    assert empty.mask_NT.shape[0] == 0
