"""Groups drawn in several ways: who draws how, that each row is drawn as if alone, and its probabilities."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_engine import ENDS, assert_same

from trimtab.data.collate import collate, in_each_layout
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.rollouts.strategies import MixedSampling, mix_of, slots

WAYS: list[dict[str, Any]] = [
    {"share": 0.5, "temperature": 0.7},
    {"share": 0.25, "temperature": 1.4, "top_p": 0.8},
    {"share": 0.25, "temperature": 1.1, "top_k": 20, "min_p": 0.02},
]
SLOTS = [0, 1, 2, 0]
"""By hand: first turns at 0.5/0.5 = 1, 0.5/0.25 = 2 and 2; the first strategy's second at 1.5/0.5 = 3."""
PLAIN: list[dict[str, Any]] = [{"temperature": 0.5}, {"temperature": 2.0}]


def sample(
    lm: LanguageModel,
    prompts: list[Group],
    sampler: Sampler | None = None,
    *,
    n: int = 4,
    mix: list[dict[str, Any]] | None = None,
    **options: Any,
) -> list[Group]:
    values = {"max_new_tokens": 24, **options}
    config = MixedSampling(**values, mix=mix) if mix else SamplingConfig(**values)
    return (sampler or TreeSampler()).sample(lm, prompts, n, config, seed=1, end_tokens=ENDS)


# Who draws how.


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1], [0, 0, 0, 0, 0]),
        ([1, 1], [0, 1, 0, 1, 0]),
        # Turns at 1/6, 1/2, 5/6, 7/6, … and at 1/2, 3/2: ties to the earlier strategy.
        ([3, 1], [0, 0, 1, 0, 0, 0, 1, 0]),
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1, 2, 0]),
        # At 5; at 1, 3, 5, 7, 9; at 1.25, 3.75, 6.25, 8.75.
        ([0.1, 0.5, 0.4], [1, 2, 1, 2, 0, 1, 2, 1, 2, 1]),
    ],
)
def test_slots_by_hand(shares: list[float], expected: list[int]) -> None:
    assert slots(shares, len(expected)) == expected
    for n in range(len(expected)):
        assert slots(shares, n) == expected[:n]


def test_counts_are_the_shares_to_within_one() -> None:
    shares = [0.37, 0.11, 0.52]
    for n in (10, 33, 100):
        counts = np.bincount(slots(shares, n), minlength=3)
        assert np.abs(counts - n * np.array(shares)).max() < 1
    assert np.bincount(slots(shares, 100)).tolist() == [37, 11, 52]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": WAYS, "temperature": 0.5}, "temperature has no effect with mix"),
        ({"mix": WAYS, "top_p": 0.5}, "top_p has no effect with mix"),
        ({"mix": [{"temperature": 0.5}, {"temperature": 0.5, "share": 2}]}, "draw alike"),
        ({"mix": [{"temperature": 0}]}, "greater than 0"),
        ({"mix": [{"share": 0}]}, "greater than 0"),
        ({"mix": [{"max_new_tokens": 3}]}, "Extra inputs"),
    ],
)
def test_what_a_mix_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MixedSampling(**options)


def test_a_strategy_that_no_sample_falls_to_is_refused() -> None:
    config = MixedSampling(mix=[{"share": 9, "temperature": 0.5}, {"share": 1}])
    with pytest.raises(InputError, match=r"of 4 samples a prompt none falls to entry 2 with its share of 1"):
        mix_of(config, 4)
    assert mix_of(config, 10).slots.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]  # type: ignore[union-attr]
    assert mix_of(SamplingConfig(), 1) is None


def test_truncated_where_any_strategy_is() -> None:
    assert MixedSampling(mix=WAYS).truncated
    assert not MixedSampling(mix=PLAIN).truncated
    assert MixedSampling(mix=PLAIN, min_new_tokens=1).truncated


# What is drawn.


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_the_engine_is_the_plain_sampler(family: str) -> None:
    lm, prompts = families.tiny(family), families.prompts()
    ours = sample(lm, prompts, mix=WAYS, min_new_tokens=2)
    assert_same(ours, sample(lm, prompts, PlainSampler(), mix=WAYS, min_new_tokens=2))
    for group in ours:
        assert [r.temperature for r in group.responses] == [0.7, 1.4, 1.1, 0.7]
    # Few rows at a time: a group's samples are spread over many steps.
    assert_same(sample(lm, prompts, mix=WAYS, min_new_tokens=2, max_rows=3), ours)


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_each_row_is_that_of_an_unmixed_run(sampler: Sampler) -> None:
    """By its own strategy; by another's it would be other tokens."""
    lm, prompts = families.tiny("llama"), families.prompts()
    mixed = sample(lm, prompts, sampler, mix=WAYS)
    differ = 0
    for slot, way in enumerate(WAYS):
        alone = sample(lm, prompts, sampler, **{k: v for k, v in way.items() if k != "share"})
        for group, other in zip(mixed, alone, strict=True):
            for i, (a, b) in enumerate(zip(group.responses, other.responses, strict=True)):
                assert b.temperature is None
                if SLOTS[i] == slot:
                    assert (a.tokens, a.finish) == (b.tokens, b.finish)
                    assert a.sampler_logps == pytest.approx(b.sampler_logps, abs=1e-5)
                else:
                    differ += a.tokens != b.tokens
    assert differ > 10


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_each_strategy_draws_from_its_distribution(sampler: Sampler) -> None:
    """First tokens of 8,000 samples of one prompt. The noise is a fixed function: so are these statistics."""
    lm, [prompt] = families.tiny("llama"), families.prompts((5,))
    rows = 2000 if isinstance(sampler, PlainSampler) else 8000
    [group] = sample(lm, [prompt], sampler, n=rows, mix=[*PLAIN, WAYS[1]], max_new_tokens=1)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt.prompt_tokens])).logits[0, -1].double()
    expected = {0.5: (logits / 0.5).softmax(-1), 2.0: (logits / 2.0).softmax(-1)}
    # The nucleus of 1.4, written out.
    p = (logits / 1.4).softmax(-1)
    order = p.argsort(descending=True)
    keep = order[p[order].cumsum(-1) - p[order] < 0.8]
    expected[1.4] = torch.zeros_like(p).index_fill(0, keep, 1.0) * p / p[keep].sum()
    for temperature, probability in expected.items():
        own = [r for r in group.responses if r.temperature == temperature]
        counts = torch.bincount(torch.tensor([(r.tokens or [])[0] for r in own]), minlength=97).double()
        assert not counts[probability == 0].any()
        means = len(own) * probability
        # Rare tokens together, so that every cell is large enough for the statistic.
        rare = means < 5
        cells = [(counts[~rare], means[~rare]), (counts[rare].sum()[None], means[rare].sum()[None])]
        pairs = [torch.cat(x) for x in zip(*cells, strict=True)]
        hit = pairs[1] > 0
        statistic = float(((pairs[0] - pairs[1])[hit] ** 2 / pairs[1][hit]).sum())
        freedom = int(hit.sum()) - 1
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
        logps = [(r.tokens, r.sampler_logps) for r in own[:50]]
        for tokens, found in logps:
            assert found == pytest.approx([float(probability.log()[(tokens or [0])[0]])], abs=1e-5)


# Its probabilities.


@pytest.mark.parametrize("layout", ["packed", "tree", "plain"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_sampler_logps_are_those_of_the_training_forward(family: str, layout: Any) -> None:
    lm = families.tiny(family)
    groups = sample(lm, families.prompts(), mix=PLAIN)
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)), layout)
    batch = collate(groups, layout=lm.layout)
    with torch.no_grad():
        policy = batch.ragged(lm.token_logprobs(batch, temperature=batch.temperature(1.0))[0])
        at_mean = batch.ragged(lm.token_logprobs(batch, temperature=1.25)[0])
    sampler = [r.sampler_logps or [] for g in groups for r in g.responses]
    for ours, theirs in zip(policy, sampler, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    gaps = [abs(a - b) for x, y in zip(at_mean, sampler, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(gaps) > 1


def test_a_batch_knows_what_its_responses_were_drawn_at() -> None:
    def batch(*temperatures: float | None) -> Any:
        responses = [Response(tokens=[5, 6], temperature=t) for t in temperatures]
        return collate([Group(id="a", prompt_tokens=[3], responses=responses)])

    assert batch(None, None).temperature(0.7) == 0.7
    assert batch(0.5, 0.5).temperature(0.7) == 0.5
    assert batch(0.5, None, 1.5).temperature(0.7).tolist() == [0.5, 0.7, 1.5]
    assert batch(0.7, None).to("cpu").temperature(0.7) == 0.7


@pytest.mark.parametrize("entropy", [False, True])
def test_a_row_is_that_of_a_batch_at_its_temperature(entropy: bool) -> None:
    """Values and gradients of the weights, in fp64; then in fp32 bit for bit."""
    lm = families.tiny("gpt2", dtype=torch.float64)
    batch = collate(families.groups())
    temperature_N = torch.tensor([0.5, 2.0, 0.5, 1.0, 2.0, 0.5])
    weights = list(lm.model.parameters())

    def gradient(temperature: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logps, found = lm.token_logprobs(batch, temperature=temperature, entropy=entropy)
        loss = ((logps + 0.3 * found) * rows[:, None]).sum()
        return logps, *torch.autograd.grad(loss, weights)

    mixed = gradient(temperature_N, torch.ones(6))
    parts = [gradient(t, temperature_N == t) for t in (0.5, 1.0, 2.0)]
    for row, t in enumerate(temperature_N.tolist()):
        alone = parts[[0.5, 1.0, 2.0].index(t)][0]
        assert (mixed[0][row] - alone[row]).abs().max() < 1e-12
    for whole, *each in zip(mixed[1:], *(p[1:] for p in parts), strict=True):
        assert (whole - sum(each)).abs().max() < 1e-9 * max(1.0, float(whole.abs().max()))
    single = families.tiny("llama")
    with torch.no_grad():
        logps = single.token_logprobs(batch, temperature=temperature_N)[0]
        assert torch.equal(logps[1], single.token_logprobs(batch, temperature=2.0)[0][1])


def test_in_bf16_sampler_logps_are_those_of_what_was_drawn() -> None:
    """With the compiled stack of layers where this machine has it; within bf16's 5e-2 of the trainer's."""
    lm = families.tiny("llama", dtype=torch.bfloat16)
    groups = sample(lm, families.prompts(), mix=PLAIN)
    batch = collate(groups)
    with torch.no_grad():
        policy = batch.ragged(lm.token_logprobs(batch, temperature=batch.temperature(1.0))[0])
        at_one = batch.ragged(lm.token_logprobs(batch)[0])
    sampler = [r.sampler_logps or [] for g in groups for r in g.responses]
    gap, wrong = (
        np.mean([abs(a - b) for x, y in zip(rows, sampler, strict=True) for a, b in zip(x, y, strict=True)])
        for rows in (policy, at_one)
    )
    assert gap < 0.05 < 0.3 < wrong
