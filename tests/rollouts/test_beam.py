"""Beam search against every sequence there is, and against transformers' own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import families
import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.online import stored
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import wrap
from trimtab.rollouts.beam import BeamSampler, CandidateSampling
from trimtab.rollouts.engine import choose_sampler

V, LONGEST, END = 5, 4, 4
PROMPTS = [[0, 1], [3, 2, 1, 0], [2]]


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    """Five words. Wide weights, so that sequences differ in likelihood."""
    torch.manual_seed(3)
    sizes = {**families._GQA, "vocab_size": V, "initializer_range": 0.4, "pad_token_id": 0}
    return wrap(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes | {"eos_token_id": END})), None)


def prompts(rows: list[list[int]] | None = None) -> list[Group]:
    return [Group(id=f"p{i}", prompt_tokens=row) for i, row in enumerate(rows or PROMPTS)]


def search(
    lm: LanguageModel, n: int, given: list[Group] | None = None, *, limits: Any = None, **options: Any
) -> list[Group]:
    config = CandidateSampling(**{"strategy": "beam", "max_new_tokens": LONGEST, **options})
    return BeamSampler().sample(lm, given or prompts(), n, config, seed=0, end_tokens=[END], limits=limits)


@torch.no_grad()
def score(lm: LanguageModel, prompt: list[int], tokens: list[int], power: float) -> float:
    """By one plain call."""
    logps = lm.model(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    total = sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(tokens))
    return total / len(tokens) ** power


def everything(
    lm: LanguageModel, prompt: list[int], power: float, shortest: int = 0
) -> list[tuple[float, list[int]]]:
    """Every response, best first: those that end, and those of full length that do not."""
    made = []
    for length in range(1, LONGEST + 1):
        for head in itertools.product(range(V - 1), repeat=length - 1):
            last = range(V) if length == LONGEST else [END]
            made += [[*head, token] for token in last if token != END or length > shortest]
    return sorted(((score(lm, prompt, tokens, power), tokens) for tokens in made), key=lambda x: -x[0])


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shortest", [0, 2])
def test_wide_enough_it_is_the_best_of_all(power: float, shortest: int, small: LanguageModel) -> None:
    """64 beams hold all 4³ beginnings, so the 40 best of 4 + 16 + 64 + 256 … are found, in order."""
    found = search(small, 40, beams=64, length_power=power, min_new_tokens=shortest)
    for prompt, group in zip(PROMPTS, found, strict=True):
        best = everything(small, prompt, power, shortest)[:40]
        ours = [r.tokens or [] for r in group.responses]
        assert len({tuple(tokens) for tokens in ours}) == 40
        assert [score(small, prompt, t, power) for t in ours] == pytest.approx([s for s, _ in best], abs=1e-5)
        assert ours[0] == best[0][1]
        assert {(r.finish, (r.tokens or [])[-1] == END) for r in group.responses} <= {
            ("stop", True),
            ("length", False),
        }


def test_a_power_of_0_prefers_short_ones(small: LanguageModel) -> None:
    """What the option is for: the sum falls with every token, the mean does not."""
    lengths = {
        p: [len(r.tokens or []) for g in search(small, 8, beams=64, length_power=p) for r in g.responses]
        for p in (0.0, 1.0)
    }
    assert sum(lengths[0.0]) < sum(lengths[1.0])


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
def test_never_worse_than_that_of_transformers(family: str) -> None:
    """The beams are the same and ours forgets no ending: as good place by place, and mostly equal."""
    lm, given = families.tiny(family), families.prompts()
    config = CandidateSampling(strategy="beam", max_new_tokens=8, beams=4)
    found = BeamSampler().sample(lm, given, 3, config, seed=0, end_tokens=[4])
    equal = 0
    for group, ours in zip(given, found, strict=True):
        prompt = group.prompt_tokens or []
        model: Any = lm.model
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=8,
            do_sample=False,
            early_stopping="never",
            length_penalty=1.0,
            eos_token_id=4,
            pad_token_id=0,
            use_cache=True,
        )[:, len(prompt) :].tolist()
        rows = [row[: row.index(4) + 1] if 4 in row else row for row in theirs]
        mine = [score(lm, prompt, r.tokens or [], 1.0) for r in ours.responses]
        other = sorted((score(lm, prompt, row, 1.0) for row in rows), reverse=True)
        assert all(a > b - 1e-5 for a, b in zip(mine, other, strict=True))
        equal += [r.tokens for r in ours.responses] == rows
    assert equal >= 2


def test_batching_and_room_change_nothing(small: LanguageModel) -> None:
    together = search(small, 4)
    for i, row in enumerate(PROMPTS):
        [alone] = search(small, 4, prompts([row]))
        assert [r.tokens for r in alone.responses] == [r.tokens for r in together[i].responses]
    assert [g.responses for g in search(small, 4, max_rows=4)] == [g.responses for g in together]
    short = search(small, 4, limits=[1, 2, 4])
    assert [max(len(r.tokens or []) for r in g.responses) for g in short] == [1, 2, 4]
    assert [r.tokens for r in short[2].responses] == [r.tokens for r in together[2].responses]


def test_groups_of_beams_differ(small: LanguageModel) -> None:
    """With a loss that outweighs everything the second group begins with another token than the first."""
    plain = search(small, 4, beams=4)
    apart = search(small, 4, beams=4, beam_groups=2, diversity=50.0)
    for one, other in zip(plain, apart, strict=True):
        tokens = [tuple(r.tokens or []) for r in other.responses]
        assert len(set(tokens)) == 4
        assert len({t[0] for t in tokens}) >= len({(r.tokens or [0])[0] for r in one.responses})
        scores = [score(small, other.prompt_tokens or [], list(t), 1.0) for t in tokens]
        assert scores == sorted(scores, reverse=True)
    # Alone, a group is a search of its width.
    alone = search(small, 2, beams=2)
    for one, other in zip(alone, apart, strict=True):
        assert {tuple(r.tokens or []) for r in one.responses} <= {
            tuple(r.tokens or []) for r in other.responses
        }
    assert any(a.responses != b.responses for a, b in zip(plain, apart, strict=True))


def test_a_stop_string_ends_a_beam() -> None:
    import tiny

    torch.manual_seed(0)
    lm = wrap(hf.LlamaForCausalLM(tiny.llama_config(0.3)), tiny.tokenizer())
    given = [Group(id="a", prompt_tokens=[6, 7, 8])]
    config = {"max_new_tokens": 5, "beams": 8}
    free = BeamSampler().sample(
        lm, given, 4, CandidateSampling(strategy="beam", **config), seed=0, end_tokens=[2]
    )[0]
    word = str(free.responses[0].text).split()[1]
    [cut] = BeamSampler().sample(
        lm, given, 4, CandidateSampling(strategy="beam", stop=[word], **config), seed=0, end_tokens=[2]
    )
    stopped = [r for r in cut.responses if r.finish == "stop"]
    assert stopped
    assert not any(word in str(r.text).split() for r in cut.responses)
    assert any(word in lm.tokenizer.decode(r.tokens) for r in stopped)


def test_beams_have_no_probability_of_having_been_drawn(small: LanguageModel) -> None:
    lm = families.tiny("llama")
    config = CandidateSampling(strategy="beam", max_new_tokens=4)
    sampler, line = choose_sampler(lm, config, probe_groups(lm.vocab_size))
    assert isinstance(sampler, BeamSampler)
    assert line is None
    groups = sampler.sample(lm, families.prompts(), 2, config, seed=0, end_tokens=[4])
    assert all(r.sampler_logps is None for g in groups for r in g.responses)
    with pytest.raises(ValueError, match="a response has no sampler_logps"):
        stored(collate(groups), groups, "sampler_logps", torch.zeros(()))


def test_a_vocabulary_that_has_not_so_many_gives_what_there_is(small: LanguageModel) -> None:
    [group, *_] = search(small, 40, max_new_tokens=1)
    assert len(group.responses) == V
    assert math.fsum(math.exp(score(small, PROMPTS[0], r.tokens or [], 0)) for r in group.responses) == (
        pytest.approx(1, abs=1e-6)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 4}, 'beams has no effect without strategy = "beam"'),
        ({"diversity": 1.0, "beam_groups": 2}, "beam_groups has no effect without"),
        ({"strategy": "beam", "temperature": 0.5}, "temperature has no effect with strategy"),
        ({"strategy": "beam", "top_p": 0.5}, "top_p has no effect with strategy"),
        ({"strategy": "beam", "mix": [{"temperature": 0.5}]}, "mix has no effect with strategy"),
        ({"strategy": "beam", "engine": "tree"}, "engine has no effect with strategy"),
        ({"strategy": "beam", "beam_groups": 2}, "only together"),
        ({"strategy": "beam", "diversity": 2.0}, "only together"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CandidateSampling(**options)


def test_numbers_that_do_not_fit() -> None:
    assert CandidateSampling(strategy="beam").width(5) == 5
    with pytest.raises(ValueError, match="3 beams cannot give 4 responses"):
        CandidateSampling(strategy="beam", beams=3).width(4)
    with pytest.raises(ValueError, match="8 beams and 3 responses do not split evenly into 2"):
        CandidateSampling(strategy="beam", beams=8, beam_groups=2, diversity=1.0).width(3)


def test_a_model_without_a_cache_is_refused() -> None:
    lm = families.tiny("mamba")
    with pytest.raises(InputError, match="gives no key and value cache"):
        search(lm, 2, families.prompts((3,)))
