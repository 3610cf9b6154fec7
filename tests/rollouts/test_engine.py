"""The tree engine against the plain sampler, token for token, over families and batchings."""

from __future__ import annotations

import dataclasses
from typing import Any

import families
import pytest
import torch

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.rollouts.attention import NAME
from trimtab.rollouts.engine import TreeSampler, choose_sampler
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import Sampler, SamplingConfig

ENDS = [4, 5, 6, 7]
"""Four ends among 97 tokens: about half of the responses end before the limit of 24."""
SAMPLES = 4


def sample(
    lm: LanguageModel,
    prompts: list[Group],
    sampler: Sampler | None = None,
    *,
    n: int = SAMPLES,
    seed: int = 1,
    step: int = 0,
    ends: list[int] | None = None,
    **options: Any,
) -> list[Group]:
    config = SamplingConfig(**{"max_new_tokens": 24, **options})
    ends = ENDS if ends is None else ends
    return (sampler or TreeSampler()).sample(lm, prompts, n, config, seed=seed, step=step, end_tokens=ends)


def drawn(groups: list[Group]) -> list[list[int]]:
    return [r.tokens or [] for group in groups for r in group.responses]


def assert_same(ours: list[Group], theirs: list[Group]) -> None:
    """The same tokens, ends and, to 1e-5, log-probabilities."""
    assert [g.id for g in ours] == [g.id for g in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.responses, other.responses, strict=True):
            assert a.tokens == b.tokens
            assert a.finish == b.finish
            assert a.sampler_logps == pytest.approx(b.sampler_logps, abs=1e-5)


@pytest.mark.parametrize("family", families.TREE)
def test_tree_is_plain_token_for_token(family: str) -> None:
    """Grouped queries, sliding windows of 6, soft-capping, experts, learned and rotary positions."""
    lm, prompts = families.tiny(family), families.prompts()
    ours = sample(lm, prompts, temperature=0.9, top_p=0.95)
    assert_same(ours, sample(lm, prompts, PlainSampler(), temperature=0.9, top_p=0.95))
    assert {r.finish for g in ours for r in g.responses} == {"stop", "length"}
    chosen, line = choose_sampler(lm, SamplingConfig(), probe_groups(lm.vocab_size))
    assert isinstance(chosen, TreeSampler)
    assert line is None


@pytest.mark.parametrize("family", families.TREE)
def test_sampler_logps_are_those_of_the_training_forward(family: str) -> None:
    """At temperature 0.7 and without truncation, over the very ids that were drawn."""
    lm = families.tiny(family)
    groups = sample(lm, families.prompts(), temperature=0.7)
    with torch.no_grad():
        batch = collate(groups)
        policy = batch.ragged(lm.token_logprobs(batch, temperature=0.7)[0])
        at_one = batch.ragged(lm.token_logprobs(batch)[0])
    sampler = [r.sampler_logps for g in groups for r in g.responses]
    for ours, theirs in zip(policy, sampler, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    # Scored at temperature 1 they would be other numbers.
    gaps = [abs(a - b) for x, y in zip(at_one, sampler, strict=True) for a, b in zip(x, y or [], strict=True)]
    assert max(gaps) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    ],
)
def test_sampler_logps_under_truncation(options: dict[str, Any]) -> None:
    """Against a literal recomputation from the model's own logits, one response at a time."""
    lm = families.tiny("llama")
    moved = 0.0
    for group in sample(lm, families.prompts(), **options):
        for response in group.responses:
            prompt, tokens = group.prompt_tokens or [], response.tokens or []
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([prompt + tokens])).logits[0].double()
            for t, (token, logp) in enumerate(zip(tokens, response.sampler_logps or [], strict=True)):
                row = logits[len(prompt) - 1 + t] / options.get("temperature", 1.0)
                probability = truncated(row.softmax(-1).tolist(), options)[token]
                assert logp == pytest.approx(torch.tensor(probability).log().item(), abs=1e-5)
                moved = max(moved, abs(logp - row.log_softmax(-1)[token].item()))
    assert moved > 0.1


def truncated(probabilities: list[float], options: dict[str, float]) -> list[float]:
    """Top-k, then top-p, then min-p, written out."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    keep = order[: int(options.get("top_k", len(order)))]
    total = sum(probabilities[token] for token in keep)
    nucleus, mass = [], 0.0
    for token in keep:
        if mass >= options.get("top_p", 1.0):
            break
        nucleus.append(token)
        mass += probabilities[token] / total
    floor = options.get("min_p", 0.0) * probabilities[order[0]]
    nucleus = [token for token in nucleus if probabilities[token] >= floor]
    total = sum(probabilities[token] for token in nucleus)
    return [p / total if token in nucleus else 0.0 for token, p in enumerate(probabilities)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_batching_changes_nothing(family: str) -> None:
    """Alone, in another order, with fewer samples: the same responses."""
    lm, prompts = families.tiny(family), families.prompts()
    together = sample(lm, prompts)
    for prompt, group in zip(prompts, together, strict=True):
        assert_same(sample(lm, [prompt]), [group])
    assert_same(sample(lm, prompts[::-1]), together[::-1])
    fewer = [dataclasses.replace(group, responses=group.responses[:2]) for group in together]
    assert_same(sample(lm, prompts, n=2), fewer)


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_noise_is_decided_by_seed_prompt_sample_and_step(sampler: Sampler) -> None:
    lm, prompts = families.tiny("llama"), families.prompts((5, 5))
    prompts[1].prompt_tokens = prompts[0].prompt_tokens
    once = drawn(sample(lm, prompts, sampler))
    assert once == drawn(sample(lm, prompts, sampler))
    # Two prompts with the same tokens and other names, and every sample of one: all answers differ.
    assert len({tuple(row) for row in once}) == len(once)
    for other in ({"seed": 2}, {"step": 1}):
        again = drawn(sample(lm, prompts, sampler, **other))  # type: ignore[arg-type]
        assert all(a != b for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_temperature_zero_is_greedy(sampler: Sampler) -> None:
    lm = families.tiny("qwen3")
    (group,) = sample(lm, families.prompts((9,)), sampler, ends=[], temperature=0.0)
    ids = list(group.prompt_tokens or [])
    for _ in range(24):
        with torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    for response in group.responses:
        assert response.tokens == ids[9:]
        assert response.sampler_logps == [0.0] * 24


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_ends_lengths_and_minimum_lengths(sampler: Sampler) -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    free = sample(lm, prompts, sampler, n=8)
    for response in (r for g in free for r in g.responses):
        tokens = response.tokens or []
        assert not set(tokens[:-1]) & set(ENDS)
        assert response.finish == ("stop" if tokens[-1] in ENDS else "length")
        assert len(tokens) == 24 or response.finish == "stop"
        assert len(response.sampler_logps or []) == len(tokens)
    assert min(map(len, drawn(free))) < 10
    held = sample(lm, prompts, sampler, n=8, min_new_tokens=10)
    # Ten tokens that are no end, then perhaps one: the shortest response has eleven.
    assert min(map(len, drawn(held))) == 11
    assert any(r.finish == "stop" for g in held for r in g.responses)
    # ``stop_tokens`` adds to the ends.
    more = sample(lm, prompts, sampler, ends=[4, 5], stop_tokens=[6, 7])
    assert_same(more, sample(lm, prompts, sampler))


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_a_prompt_over_the_context_is_refused(sampler: Sampler) -> None:
    lm = families.tiny("gpt2")
    sample(lm, families.prompts((232,)), sampler, n=1)
    with pytest.raises(InputError, match=r"p0: the prompt leaves 23 of the model's 256 tokens"):
        sample(lm, families.prompts((233,)), sampler, n=1)


def test_two_prompts_under_one_name_keep_their_own_answers() -> None:
    lm, prompts = families.tiny("llama"), families.prompts((4, 9))
    prompts[1].id = prompts[0].id
    assert_same(sample(lm, prompts), sample(lm, prompts, PlainSampler()))


def test_the_prompts_own_records_are_left_alone() -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    sampled = sample(lm, prompts)
    assert all(not group.responses for group in prompts)
    assert [g.prompt_tokens for g in sampled] == [g.prompt_tokens for g in prompts]


def test_no_gradient_is_kept_and_the_model_stays_as_it_was() -> None:
    lm = families.tiny("llama")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    sample(lm, families.prompts())
    assert lm.config._attn_implementation == "sdpa"
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("family", ["gptj", "falcon", "bloom"])
def test_what_does_not_take_the_tree_engine_falls_back_with_a_line(family: str) -> None:
    lm, probes = families.tiny(family), probe_groups(families.VOCAB)
    chosen, line = choose_sampler(lm, SamplingConfig(), probes)
    assert isinstance(chosen, PlainSampler)
    assert line is not None
    assert "does not take the tree engine" in line
    assert "\n" not in line
    with pytest.raises(InputError, match=r"sampling\.engine"):
        choose_sampler(lm, SamplingConfig(engine="tree"), probes)
    # What it falls back to samples from the model's own distribution.
    groups = sample(lm, families.prompts(), chosen, temperature=0.8)
    truth = families.direct_logprobs(lm, groups, temperature=0.8)
    for row, response in zip(truth, (r for g in groups for r in g.responses), strict=True):
        assert response.sampler_logps == pytest.approx(row[: len(response.tokens or [])].tolist(), abs=1e-5)


def test_a_model_without_a_cache_is_refused() -> None:
    lm = families.tiny("mamba")
    chosen, _ = choose_sampler(lm, SamplingConfig(), probe_groups(families.VOCAB))
    with pytest.raises(InputError, match="MambaForCausalLM gives no key and value cache"):
        sample(lm, families.prompts(), chosen)


def test_engine_plain_is_taken_without_a_check() -> None:
    chosen, line = choose_sampler(families.tiny("llama"), SamplingConfig(engine="plain"), [])
    assert isinstance(chosen, PlainSampler)
    assert line is None


class Interruption(Exception):
    """Something that breaks off in the middle."""


def test_the_engine_is_usable_after_an_exception() -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    expected, calls = sample(lm, prompts), 0

    def interrupt(module: Any, given: Any, out: Any) -> None:
        nonlocal calls
        calls += 1
        assert lm.config._attn_implementation == NAME
        if calls == 5:
            raise Interruption

    handle = lm.head.trunk.register_forward_hook(interrupt)
    with pytest.raises(Interruption):
        sample(lm, prompts)
    handle.remove()
    assert lm.config._attn_implementation == "sdpa"
    groups = families.groups()
    with torch.no_grad():
        logps, _ = lm.token_logprobs(collate(groups))
    assert (logps - families.direct_logprobs(lm, groups)).abs().max() < 1e-5
    assert_same(sample(lm, prompts), expected)


def test_a_cache_does_not_outlive_its_weights() -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    calls = 0

    def update(module: Any, given: Any, out: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            lm.version += 1

    handle = lm.head.trunk.register_forward_hook(update)
    with pytest.raises(RuntimeError, match="weights changed"):
        sample(lm, prompts)
    handle.remove()
    assert_same(sample(lm, prompts), sample(lm, prompts, PlainSampler()))


def test_new_weights_are_sampled_from_at_once() -> None:
    lm, prompts = families.tiny("llama"), families.prompts()
    before = drawn(sample(lm, prompts))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    lm.version += 1
    assert drawn(sample(lm, prompts)) != before
    assert_same(sample(lm, prompts), sample(lm, prompts, PlainSampler()))


def test_bf16_promises_the_log_probabilities_of_what_was_drawn() -> None:
    lm = families.tiny("llama")
    lm.cast(torch.bfloat16)
    groups = sample(lm, families.prompts())
    with torch.no_grad():
        batch = collate(groups)
        policy = batch.ragged(lm.token_logprobs(batch)[0])
    sampler = [r.sampler_logps or [] for g in groups for r in g.responses]
    gaps = [abs(a - b) for x, y in zip(policy, sampler, strict=True) for a, b in zip(x, y, strict=True)]
    assert 0 < max(gaps) < 0.2
