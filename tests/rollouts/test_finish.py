"""When a response ends: end tokens, stop strings, lengths; what its record then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM

from trimtab.groups import Group
from trimtab.models.load import wrap
from trimtab.models.scratch import train_tokenizer
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.finish import Transcript, sampled_group
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import Sampler, SamplingConfig


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level: without merges a token is one byte, so that strings and characters span tokens."""
    return train_tokenizer(["x"], 260)


def feed(tokenizer: Any, text: str, ends: set[int] | None = None, **options: Any) -> Transcript:
    """A transcript given the text's tokens one by one until it is finished."""
    config = SamplingConfig(**{"max_new_tokens": 64, **options})
    made = Transcript(config.max_new_tokens)
    for i, token in enumerate(tokenizer(text, add_special_tokens=False)["input_ids"]):
        if made.append(token, -0.5 * i, config, ends or set(), tokenizer):
            break
    return made


def test_a_stop_string_across_tokens_cuts_the_text_and_keeps_the_ids(tokenizer: Any) -> None:
    ids = tokenizer("Yes.\n\nHuman: more", add_special_tokens=False)["input_ids"]
    made = feed(tokenizer, "Yes.\n\nHuman: more", stop=["\n\nHuman:"])
    response = made.response(tokenizer)
    assert made.finish == "stop"
    assert response.text == "Yes."
    # As drawn, the string's own tokens included: they are what the policy chose.
    assert response.tokens == ids[: len("Yes.\n\nHuman:")]
    assert response.sampler_logps == [-0.5 * i for i in range(len(made.tokens))]


def test_a_stop_string_inside_a_token(tokenizer: Any) -> None:
    merged = train_tokenizer(["abENDcd abENDcd abENDcd"] * 50, 300)
    ids = merged("abENDcd", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    response = feed(merged, "abENDcd", stop=["END"]).response(merged)
    assert (response.text, response.tokens, response.finish) == ("ab", ids, "stop")


def test_the_earliest_of_several_stop_strings_cuts(tokenizer: Any) -> None:
    assert feed(tokenizer, "one two three", stop=["three", "two"]).response(tokenizer).text == "one "
    # Both complete with the same token: the text ends before the longer one, which begins earlier.
    assert feed(tokenizer, "say [END] now", stop=["]", "[END]"]).response(tokenizer).text == "say "


def test_a_stop_string_of_several_bytes_a_character(tokenizer: Any) -> None:
    response = feed(tokenizer, "gut 終わり weiter", stop=["終わり"]).response(tokenizer)
    assert response.text == "gut "
    assert len(response.tokens or []) == len("gut 終わり".encode())


def test_half_a_stop_string_is_none(tokenizer: Any) -> None:
    made = feed(tokenizer, "\n\nHum", stop=["\n\nHuman:"])
    assert made.finish is None
    assert made.response(tokenizer).text == "\n\nHum"


def test_length_end_token_and_what_comes_first(tokenizer: Any) -> None:
    end = tokenizer("!", add_special_tokens=False)["input_ids"][0]
    assert feed(tokenizer, "abcdef", max_new_tokens=4).finish == "length"
    assert feed(tokenizer, "abc!def", {end}).finish == "stop"
    # An end at the last place allowed is an end, not a cut.
    at_limit = feed(tokenizer, "abc!def", {end}, max_new_tokens=4)
    assert (at_limit.finish, len(at_limit.tokens)) == ("stop", 4)


def test_special_tokens_are_in_the_ids_and_not_in_the_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    made = Transcript(64)
    for token in [*tokenizer("ok", add_special_tokens=False)["input_ids"], end]:
        made.append(token, 0.0, SamplingConfig(), {end}, tokenizer)
    response = made.response(tokenizer)
    assert response.text == "ok"
    assert response.tokens is not None
    assert response.tokens[-1] == end


def test_a_sampled_group_keeps_everything_but_the_responses() -> None:
    prompt = Group(id="a", prompt="p", prompt_tokens=[1], columns={"answer": 4}, weight=2.0, source="s")
    made = Transcript(1)
    made.append(7, -1.0, SamplingConfig(max_new_tokens=1), set(), None)
    group = sampled_group(prompt, [made], None)
    assert (group.columns, group.weight, group.source) == ({"answer": 4}, 2.0, "s")
    assert group.responses[0].tokens == [7]
    assert group.responses[0].finish == "length"
    assert prompt.responses == []


@pytest.mark.parametrize("sampler", [TreeSampler(), PlainSampler()])
def test_a_stop_string_in_the_engine(sampler: Sampler, tiny_model: Path) -> None:
    """The noise does not change, so a response that meets the string is a beginning of the free one."""
    lm = wrap(AutoModelForCausalLM.from_pretrained(tiny_model), tiny.tokenizer())
    prompts = [Group(id=f"p{i}", prompt_tokens=[6 + i, 7]) for i in range(3)]

    def run(stop: list[str]) -> list[Any]:
        config = SamplingConfig(max_new_tokens=16, stop=stop)
        made = sampler.sample(lm, prompts, 3, config, seed=0, end_tokens=[2])
        return [r for g in made for r in g.responses]

    free = run([])
    words = str(next(r for r in free if len(r.tokens) > 8).text).split()
    stop = f"{words[4]} {words[5]}"
    met = 0
    for before, after in zip(free, run([stop]), strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert after.sampler_logps == pytest.approx(before.sampler_logps[: len(after.tokens)], abs=1e-5)
        if stop in before.text:
            met += 1
            assert after.finish == "stop"
            assert after.text == before.text[: before.text.index(stop)]
            assert len(after.tokens) < len(before.tokens)
        else:
            assert (after.text, after.tokens) == (before.text, before.tokens)
    assert met > 0
