"""The compiled decode step against its plain form: attention over blocks, storing, drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trimtab.kernels.build import library
from trimtab.kernels.decode import ALIGN, BLOCK, Heads, Plan, Stretch, attend, attend_plain, draw, store
from trimtab.rollouts.sampling import SamplingConfig, exponential_noise, sampler_logprobs, token_hashes
from trimtab.rollouts.sampling import draw as draw_plain

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


def scene(
    lengths: list[int], shared: list[Stretch], blocks: int, *, capacity: int = 600, ends: bool = True
) -> tuple[Plan, int]:
    """A plan of rows with ``lengths`` own tokens each, behind their stretches; and the blocks in all."""
    rows, per_row = len(lengths), -(-capacity // BLOCK)
    own = np.arange(blocks, blocks + rows * per_row, dtype=np.int32).reshape(rows, per_row)[::-1].copy()
    before = [max((s.start + s.length for s in shared if r in s.rows), default=0) for r in range(rows)]
    length = np.array(lengths, dtype=np.int32)
    return Plan(shared, own, length, length + np.array(before, dtype=np.int32)), blocks + rows * per_row


TREE = [
    Stretch([3, 0], 0, 40, [0, 1, 2, 3, 4]),
    Stretch([5], 40, 17, [0, 1, 2]),
    Stretch(list(range(6, 6 + 10)), 40, 300, [4]),
    Stretch([1], 0, 1, [5]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "e"), [(4, 4, 8, 8), (8, 2, 64, 64), (9, 1, 80, 48), (6, 2, 31, 33)]
)
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (1.5, None), (None, 6), (0.7, 45)])
def test_attention_is_the_plain_form(
    dtype: torch.dtype, heads: int, kv_heads: int, d: int, e: int, softcap: float | None, window: int | None
) -> None:
    """Ancestors, several parts, empty own caches, full blocks, garbage beyond a block's tokens."""
    plan, blocks = scene([0, 31, 32, 300, 511, 5, 64], TREE, 16)
    torch.manual_seed(0)
    width = -(-e // ALIGN) * ALIGN
    caches = [torch.randn(blocks, kv_heads, d, BLOCK), torch.randn(blocks, kv_heads, BLOCK, width)]
    caches = [x.to(dtype) for x in caches]
    # The last place of a stretch's last block is no key of anybody's.
    caches[0][5, :, :, 17:], caches[1][5, :, 17:] = torch.nan, torch.nan
    rows = plan.rows
    q, k, v = (
        torch.randn(1, rows, n, w).to(dtype).transpose(1, 2)
        for n, w in ((heads, d), (kv_heads, d), (kv_heads, e))
    )
    ours, plain = [x.clone() for x in caches], [x.clone() for x in caches]
    new = Heads(q, k, v, 0.3, softcap, window)
    out = attend(plan, new, *ours)
    expected = attend_plain(plan, new, *plain)
    assert out.shape == (1, rows, heads, e)
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    assert (out.float() - expected.float()).abs().max() < tolerance
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if window is None:
        narrow = attend(plan, new._replace(window=3), *ours)
        assert (narrow.float() - out.float()).abs().max() > 0.05


def test_attention_is_the_ordinary_one() -> None:
    """The plain form itself, against SDPA over keys laid out by hand."""
    plan, blocks = scene([2, 40], [Stretch([1], 0, 5, [0, 1])], 2)
    torch.manual_seed(0)
    keys, values = torch.randn(blocks, 2, 8, BLOCK), torch.randn(blocks, 2, BLOCK, 16)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 16)
    out = attend_plain(plan, Heads(q, k, v, 0.5), keys, values)
    for row, own in enumerate((2, 40)):
        table = plan.own_blocks[row]
        by_key = [(1, i) for i in range(5)] + [(int(table[i // BLOCK]), i % BLOCK) for i in range(own + 1)]
        ks = torch.stack([keys[b, :, :, i] for b, i in by_key], dim=1).repeat_interleave(2, dim=0)
        vs = torch.stack([values[b, :, i] for b, i in by_key], dim=1).repeat_interleave(2, dim=0)
        assert torch.equal(ks[:, -1], k[0, :, row].repeat_interleave(2, dim=0))
        one = torch.nn.functional.scaled_dot_product_attention(q[0, :, row, None], ks, vs, scale=0.5)
        assert (out[0, row] - one[:, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storing_is_the_plain_form(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(1, 50, 3, w).to(dtype).transpose(1, 2) for w in (24, 20))
    blocks, places = (
        torch.tensor(x, dtype=torch.int32) for x in ([4] * 30 + [2] * 20, [*range(30), *range(20)])
    )
    ours = torch.zeros(5, 3, 24, BLOCK, dtype=dtype), torch.zeros(5, 3, BLOCK, 32, dtype=dtype)
    store(k, v, *ours, blocks, places)
    for s in (0, 29, 30, 49):
        assert torch.equal(ours[0][blocks[s], :, :, places[s]], k[0, :, s])
        assert torch.equal(ours[1][blocks[s], :, places[s], :20], v[0, :, s])
    assert torch.count_nonzero(ours[0]) == torch.count_nonzero(k)
    double = [x.double() for x in ours]
    plain = [torch.zeros_like(x) for x in double]
    store(k.double(), v.double(), plain[0], plain[1], blocks, places)
    assert all(torch.equal(a, b) for a, b in zip(plain, double, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 97, 8192])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drawing_is_the_plain_form(dtype: torch.dtype, vocab: int, temperature: float) -> None:
    rows = 400
    torch.manual_seed(0)
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    logits[7, 1:] = -torch.inf
    keys = np.random.default_rng(0).integers(0, 2**64, rows, dtype=np.uint64)
    positions, held = np.arange(rows, dtype=np.int32) % 50, np.arange(rows) % 3 == 1
    hashes, forbidden = token_hashes(vocab, "cpu"), np.array([1, 3])
    noise = exponential_noise(keys, positions, hashes)
    masked = logits.clone()
    banned = torch.isin(torch.arange(vocab), torch.from_numpy(forbidden))
    masked[torch.from_numpy(held)[:, None] & banned] = -torch.inf
    logps = sampler_logprobs(masked, SamplingConfig(temperature=temperature))
    expected, expected_logps = draw_plain(logps, noise)
    made = draw(logits, temperature, hashes, keys, positions, held, forbidden)
    assert made is not None
    tokens, chosen = made
    # Equal but where the two best lie within 1e-5 of each other.
    scores = logps - noise.log()
    gap = scores.max(-1).values - scores.gather(-1, torch.from_numpy(tokens)[:, None])[:, 0]
    assert gap.max() < 1e-5
    assert (torch.from_numpy(tokens) == expected).float().mean() > 0.995
    same = torch.from_numpy(tokens) == expected
    assert (torch.from_numpy(chosen) - expected_logps)[same].abs().max() < 1e-5
    assert not np.isin(tokens[held], forbidden).any()
    if vocab < 100:
        assert np.isin(tokens[~held], forbidden).any()
