"""The distribution that is drawn from, and the noise that it is drawn with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trimtab.groups import Group
from trimtab.rollouts.sampling import (
    SamplingConfig,
    draw,
    exponential_noise,
    row_keys,
    sampler_logprobs,
    token_hashes,
)

PROBABILITIES = [0.5, 0.25, 0.15, 0.07, 0.03]
LOGITS = torch.log(torch.tensor([PROBABILITIES]))


def kept(forbidden: list[int] | None = None, **options: Any) -> list[float]:
    """The distribution over the five tokens, as probabilities."""
    logps = sampler_logprobs(LOGITS, SamplingConfig(**options), forbidden=forbidden)
    return [round(p, 4) for p in logps.exp()[0].tolist()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        # Over 0.75: 0.5/0.75 and 0.25/0.75.
        ({"top_k": 2}, [0.6667, 0.3333, 0, 0, 0]),
        ({"top_k": 9}, PROBABILITIES),
        # The first two hold 0.75 < 0.8, so the third is needed, and then 0.9 is enough.
        ({"top_p": 0.8}, [0.5556, 0.2778, 0.1667, 0, 0]),
        # Exactly reached: nothing more is needed.
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        # The likeliest stays even where it alone is more than top_p.
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        # At least 0.2·0.5 = 0.1.
        ({"min_p": 0.2}, [0.5556, 0.2778, 0.1667, 0, 0]),
        # Squares, since 1/0.5 = 2: 0.25, 0.0625, 0.0225, 0.0049, 0.0009 over 0.3408.
        ({"temperature": 0.5}, [0.7336, 0.1834, 0.0660, 0.0144, 0.0026]),
        # The nucleus is that of the distribution at the temperature: 0.7336 < 0.8 takes two tokens.
        # Taken before the temperature it would hold three.
        ({"temperature": 0.5, "top_p": 0.8}, [0.8, 0.2, 0, 0, 0]),
        # Of the top three, over 0.9, the first two hold 0.8333 ≥ 0.82. Of all five they hold 0.75: three.
        ({"top_k": 3, "top_p": 0.82}, [0.6667, 0.3333, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
    ],
)
def test_filters_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert kept(**options) == pytest.approx(expected, abs=1e-4)


def test_forbidden_tokens_are_taken_out_first() -> None:
    assert kept([0]) == pytest.approx([0, 0.5, 0.3, 0.14, 0.06])
    # Top-1 of what is left; taken out afterwards nothing would be left.
    assert kept([0], top_k=1) == [0, 1, 0, 0, 0]
    assert kept([0], temperature=0) == [0, 1, 0, 0, 0]


def test_the_callers_logits_are_not_changed() -> None:
    logits = LOGITS.clone()
    sampler_logprobs(logits, SamplingConfig(temperature=0.5, top_p=0.5), forbidden=[1])
    assert torch.equal(logits, LOGITS)


def test_bf16_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logps = sampler_logprobs(logits, SamplingConfig())
    assert logps.dtype == torch.float32
    assert (logps.exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_k": 5},
        {"temperature": 0, "top_p": 0.9},
        {"temperature": 0, "min_p": 0.1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"temperature": -1.0},
        {"top_p": 0.0},
    ],
)
def test_options_without_effect_or_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig(**options)


def test_what_counts_as_truncated() -> None:
    assert not SamplingConfig(temperature=0.5).truncated
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_new_tokens": 1}):
        assert SamplingConfig(**options).truncated


# The noise. It is a fixed function, so these statistics are fixed numbers: the bounds leave chance 1e-6.


def keys(count: int) -> np.ndarray:
    """The keys of the samples of one prompt, as a run makes them."""
    return row_keys([Group(id="pairs.jsonl:7")], count, seed=0, step=0)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the statistic lies above what chance gives."""
    expected = counts.sum() * probabilities
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_draws_follow_the_distribution() -> None:
    rows = 100_000
    noise = exponential_noise(keys(rows), 0, token_hashes(5, "cpu"))
    tokens, logps = draw(LOGITS.expand(rows, 5), noise)
    counts = torch.bincount(tokens, minlength=5).numpy()
    assert chi_square(counts, np.array(PROBABILITIES)) < 5
    assert torch.equal(logps, LOGITS[0][tokens])


def test_draws_follow_the_distribution_along_one_response() -> None:
    hashes, places = token_hashes(5, "cpu"), np.arange(100_000)
    noise = exponential_noise(np.repeat(keys(1), len(places)), places, hashes)
    assert torch.equal(noise[7:8], exponential_noise(keys(1), 7, hashes))
    tokens, _ = draw(LOGITS.expand(len(noise), 5), noise)
    assert chi_square(torch.bincount(tokens, minlength=5).numpy(), np.array(PROBABILITIES)) < 5


@pytest.mark.parametrize("neighbour", ["position", "sample"])
def test_draws_of_neighbours_are_independent(neighbour: str) -> None:
    """All 25 combinations of a token here and one at the next position, or in the next sample."""
    rows, hashes = 100_000, token_hashes(5, "cpu")
    first = draw(LOGITS.expand(rows, 5), exponential_noise(keys(rows), 3, hashes))[0]
    if neighbour == "position":
        second = draw(LOGITS.expand(rows, 5), exponential_noise(keys(rows), 4, hashes))[0]
    else:
        first, second = first[0::2], first[1::2]
    counts = torch.bincount(first * 5 + second, minlength=25).numpy()
    assert chi_square(counts, np.outer(PROBABILITIES, PROBABILITIES).ravel()) < 5


def test_noise_is_standard_exponential() -> None:
    """Mean and variance 1, and the whole distribution (Kolmogorov–Smirnov)."""
    noise = exponential_noise(keys(200), 0, token_hashes(5_000, "cpu")).double().flatten()
    assert abs(noise.mean().item() - 1) < 5e-3
    assert abs(noise.var().item() - 1) < 0.02
    ordered = (-torch.expm1(-noise)).sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert (ordered - steps).abs().max() < 2.7 / math.sqrt(len(ordered))


def test_noise_is_independent_across_tokens_rows_and_positions() -> None:
    hashes = token_hashes(400, "cpu")
    here, later = (exponential_noise(keys(400), p, hashes).double() for p in (0, 1))
    for shifted in (later, here.roll(1, 0), here.roll(1, 1), here.roll((1, 1), (0, 1))):
        correlation = float(((here - 1) * (shifted - 1)).mean())
        assert abs(correlation) < 5 / math.sqrt(here.numel())
    # Every pair of 400 tokens over 400 rows: the largest of 80,000 correlations of that size.
    between = torch.corrcoef(here.T) - torch.eye(400)
    assert between.abs().max() < 6.5 / math.sqrt(400)
    assert between.square().mean().sqrt() < 1.1 / math.sqrt(400)


def test_noise_is_never_zero_nor_infinite() -> None:
    """An infinite one would let a greedy draw, or one of a single token, miss the only token there is."""
    hashes, many = token_hashes(97, "cpu"), np.arange(20_000, dtype=np.uint64)
    largest, smallest = 0.0, 1.0
    for position in range(40):
        noise = exponential_noise(many, position, hashes)
        largest, smallest = max(largest, float(noise.max())), min(smallest, float(noise.min()))
    # −ln 2^−24 = 16.64, the largest there can be, has come up: without its guard it would be infinite.
    assert 16.6 < largest < 16.7
    assert 0 < smallest < 1e-6


@pytest.mark.parametrize("position", range(3))
def test_noise_does_not_depend_on_its_batch(position: int) -> None:
    hashes = token_hashes(50, "cpu")
    whole = exponential_noise(keys(8), position, hashes)
    assert torch.equal(whole[3:4], exponential_noise(keys(8)[3:4], position, hashes))
    # A vocabulary padded with further rows leaves the noise of the words as it was.
    assert torch.equal(whole, exponential_noise(keys(8), position, token_hashes(64, "cpu"))[:, :50])


def test_keys_differ_by_seed_prompt_sample_and_step() -> None:
    prompts = [Group(id="a"), Group(id="b")]
    made = [row_keys(prompts, 3, seed=seed, step=step) for seed in (0, 1) for step in (0, 1)]
    assert len(np.unique(np.concatenate(made))) == 2 * 3 * 4
    assert np.array_equal(made[0], row_keys(prompts, 3, seed=0, step=0))
    # A prompt's keys do not depend on which others are asked with it, nor on how many samples there are.
    assert np.array_equal(made[0][3:5], row_keys(prompts[1:], 2, seed=0, step=0))


def test_a_draw_never_takes_a_token_that_is_excluded() -> None:
    rows = 20_000
    logps = sampler_logprobs(LOGITS.expand(rows, 5), SamplingConfig(top_k=2), forbidden=[0])
    tokens, _ = draw(logps, exponential_noise(keys(rows), 0, token_hashes(5, "cpu")))
    assert set(tokens.tolist()) == {1, 2}
