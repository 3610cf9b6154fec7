"""TreeBatch: the mask against its definition, and the two ways between tensors and lists."""

from __future__ import annotations

import dataclasses
import random

import families
import pytest
import torch

from trimtab.batch import PADDING, PROMPT, TreeBatch
from trimtab.data.collate import collate
from trimtab.groups import Group, Response


def may_see(batch: TreeBatch, row: int, query: int, key: int, window: int | None) -> bool:
    """The rule, written out: a token sees its prompt and its own past, padding only itself."""
    segments, positions = batch.segments_BL[row].tolist(), batch.position_ids_BL[row].tolist()
    if PADDING in (segments[query], segments[key]):
        return query == key and segments[query] == PADDING
    return (
        key <= query
        and segments[key] in (PROMPT, segments[query])
        and (window is None or positions[query] - positions[key] < window)
    )


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("layout", ["tree", "plain"])
def test_mask_is_the_rule(layout: str, window: int | None) -> None:
    batch = collate(families.groups(), layout=layout)  # type: ignore[arg-type]
    mask = batch.attention_mask_BLL(window)
    rows, length = batch.segments_BL.shape
    assert mask.dtype == torch.bool
    assert mask.shape == (rows, 1, length, length)
    for row in range(rows):
        for query in range(length):
            expected = [may_see(batch, row, query, key, window) for key in range(length)]
            assert mask[row, 0, query].tolist() == expected


def test_a_window_counts_positions_and_not_places() -> None:
    # Prompt at 0 1, first response at 2 3 4 (places 2 3 4), second at 2 (place 5). With a window of 2 the
    # second response sees position 1, three places back behind its sibling. Counted in places it would not.
    group = Group(id="a", prompt_tokens=[1, 2], responses=[Response(tokens=[3, 4, 5]), Response(tokens=[6])])
    mask = collate([group]).attention_mask_BLL(2)[0, 0]
    assert mask[5].tolist() == [False, True, False, False, False, True]


def test_no_query_is_without_a_key() -> None:
    """A softmax over nothing is NaN in some kernels, padding included."""
    for window in (None, 1, 4):
        assert collate(families.groups()).attention_mask_BLL(window).any(-1).all()


def test_ragged_and_padded_are_inverse() -> None:
    groups = families.groups()
    groups[0].responses[2].mask = [True, False] * 5 + [True]
    batch = collate(groups)
    values = torch.randn(batch.mask_NT.shape, dtype=torch.float64)
    rows = batch.ragged(values)
    assert [len(row) for row in rows] == [7, 4, 6, 1, 5, 8]
    assert rows[2] == values[2, 0:11:2].tolist()
    back = batch.padded(rows)
    assert torch.equal(back, values.masked_fill(~batch.mask_NT, 0.0))
    assert batch.ragged(back) == rows


def test_ragged_keeps_an_fp32_value_exactly() -> None:
    batch = collate(families.groups())
    values = torch.randn(batch.mask_NT.shape)
    assert torch.equal(batch.padded(batch.ragged(values)).float()[batch.mask_NT], values[batch.mask_NT])


def test_padded_refuses_values_of_another_response() -> None:
    batch = collate(families.groups())
    rows = batch.ragged(torch.zeros(batch.mask_NT.shape))
    with pytest.raises(ValueError, match=r"response 1 has 4 counted tokens but 3 values"):
        batch.padded([rows[0], rows[1][:3], *rows[2:]])
    with pytest.raises(ValueError, match="zip"):
        batch.padded(rows[:-1])


def test_ragged_carries_no_gradient() -> None:
    batch = collate(families.groups())
    values = torch.zeros(batch.mask_NT.shape, requires_grad=True)
    assert all(isinstance(v, float) for row in batch.ragged(values * 2) for v in row)


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = collate(families.groups())
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta"
            assert after.shape == before.shape
        else:
            assert after == before


def test_tokens_counts_padding() -> None:
    # Rows of 9+22, 3+6 and 14+8 tokens, padded to 31 each.
    assert collate(families.groups()).tokens == 93
    # Plain: rows of 16, 13, 20, 4, 8, 22, padded to 22 each.
    assert collate(families.groups(), layout="plain").tokens == 6 * 22


def test_mask_of_random_groups() -> None:
    draw = random.Random(0)
    for _ in range(20):
        groups = [
            Group(
                id=str(i),
                prompt_tokens=families.tokens(draw.randint(1, 4), draw),
                responses=[
                    Response(tokens=families.tokens(draw.randint(0, 4), draw))
                    for _ in range(draw.randint(1, 3))
                ],
            )
            for i in range(draw.randint(1, 3))
        ]
        batch, window = collate(groups), draw.choice([None, 1, 2, 3])
        mask = batch.attention_mask_BLL(window)[:, 0].tolist()
        assert mask == [
            [[may_see(batch, b, q, k, window) for k in range(len(row))] for q in range(len(row))]
            for b, row in enumerate(mask)
        ]
