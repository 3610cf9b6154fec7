"""Groups of text to groups of ids: lengths, truncation, what is counted."""

from __future__ import annotations

import copy

import pytest

from trimtab.data.render import tokenise
from trimtab.errors import InputError
from trimtab.groups import Group, Response


def pair(prompt="What is 2+2?", chosen=" It is 4.", rejected=" Hello there", id="pairs.jsonl:7"):
    responses = [Response(text=chosen, preferred=True), Response(text=rejected, preferred=False)]
    return Group(id=id, prompt=prompt, responses=responses)


def test_fills_tokens_and_masks_and_leaves_the_groups_given_alone(families):
    tokenizer = families["llama3"]
    group = pair()
    before = copy.deepcopy(group)
    [made], report = tokenise([group], tokenizer)
    assert group == before
    assert tokenizer.decode(made.prompt_tokens) == "<|begin_of_text|>What is 2+2?"
    assert tokenizer.decode(made.chosen.tokens) == " It is 4.<|end_of_text|>"
    assert made.rejected.mask == [True] * len(made.rejected.tokens)
    lengths = [len(r.tokens) for r in made.responses]
    assert report.prompt_tokens == len(made.prompt_tokens)
    assert report.response_tokens == sum(lengths)
    assert report.longest == len(made.prompt_tokens) + max(lengths)
    assert (report.groups, report.kept, report.skipped) == (1, 1, {})


def test_tokens_that_were_sampled_are_kept_as_drawn(families):
    group = Group(
        id="a:0", prompt="What", responses=[Response(text="It is 4.", tokens=[9, 8], finish="stop")]
    )
    group.prompt_tokens = [5]
    [made], _ = tokenise([group], families["gpt2"])
    assert made.prompt_tokens == [5]
    assert made.responses[0].tokens == [9, 8]
    assert made.responses[0].mask is None


def test_prompts_without_responses(families):
    [made], report = tokenise([Group(id="a:0", prompt="What is")], families["gpt2"])
    assert made.prompt_tokens
    assert made.responses == []
    assert report.longest == len(made.prompt_tokens)


@pytest.mark.parametrize(
    "limits", [{"max_prompt_tokens": 3}, {"max_response_tokens": 3}, {"max_tokens": 11}, {"max_tokens": 4}]
)
def test_too_long_is_an_error_that_names_the_row_or_a_counted_skip(families, limits):
    short = pair("a", "b", "c", id="pairs.jsonl:8")
    with pytest.raises(InputError, match=r"pairs\.jsonl:7"):
        tokenise([pair(), short], families["gpt2"], **limits)
    kept, report = tokenise([pair(), short], families["gpt2"], on_long="skip", **limits)
    assert [group.id for group in kept] == ["pairs.jsonl:8"]
    assert sum(report.skipped.values()) == 1
    assert "1 skipped" in str(report)
    with pytest.raises(InputError, match="no group is left"):
        tokenise([pair()], families["gpt2"], on_long="skip", **limits)


def test_truncation_keeps_bos_the_prompts_end_and_the_responses_beginning(families):
    tokenizer = families["llama3"]
    [whole], _ = tokenise([pair()], tokenizer)
    [cut], report = tokenise(
        [pair()], tokenizer, on_long="truncate", max_prompt_tokens=4, max_response_tokens=3, max_tokens=6
    )
    assert cut.prompt_tokens == [tokenizer.bos_token_id, *whole.prompt_tokens[-3:]]
    for short, long in zip(cut.responses, whole.responses, strict=True):
        assert short.tokens == long.tokens[:2]  # 6 − 4, less than max_response_tokens
        assert short.mask == [True] * 2
        assert short.finish == "length"
    assert (report.prompts_truncated, report.responses_truncated) == (1, 2)
    assert "1 prompts and 2 responses truncated" in str(report)
    [cut], _ = tokenise([pair()], families["gpt2"], on_long="truncate", max_prompt_tokens=3)
    [whole], _ = tokenise([pair()], families["gpt2"])
    assert cut.prompt_tokens == whole.prompt_tokens[-3:]


def test_a_prompt_beyond_the_context_is_never_cut_in_silence(families):
    with pytest.raises(InputError, match=r"no room in max_tokens 4, pairs\.jsonl:7"):
        tokenise([pair()], families["gpt2"], on_long="truncate", max_tokens=4)


def test_groups_that_cutting_makes_useless_are_left_out(families):
    same = pair(chosen=" It is 4. Hello", rejected=" It is 4. more", id="a:1")
    kept, report = tokenise([same, pair()], families["gpt2"], on_long="truncate", max_response_tokens=2)
    assert [group.id for group in kept] == ["pairs.jsonl:7"]
    assert report.skipped == {"identical after truncation": 1}
    assert report.responses_truncated == 2  # of the pair kept


def test_loss_on_the_prompt_too(families):
    tokenizer = families["gpt2"]
    group = Group(id="a:0", prompt="What is 2+2?", responses=[Response(text=" It is 4.")])
    [usual], _ = tokenise([group], tokenizer)
    [made], report = tokenise([group], tokenizer, completion_only=False)
    assert made.prompt_tokens == usual.prompt_tokens[:1]
    assert made.responses[0].tokens == usual.prompt_tokens[1:] + usual.responses[0].tokens
    assert made.responses[0].mask == [True] * len(made.responses[0].tokens)
    assert report.prompt_tokens == len(usual.prompt_tokens)
    with pytest.raises(InputError, match="completion_only"):
        tokenise([pair()], tokenizer, completion_only=False)


def test_plain_language_modelling_trains_every_token_of_the_text(families):
    group = Group(id="a:0", prompt="", responses=[Response(text="The capital")])
    [made], _ = tokenise([group], families["gpt2"])
    assert made.prompt_tokens == [families["gpt2"].bos_token_id]
    assert families["gpt2"].decode(made.responses[0].tokens) == "The capital<|endoftext|>"


def test_bounds_that_contradict_and_unknown_options(families):
    with pytest.raises(InputError, match="leaves no room"):
        tokenise([pair()], families["gpt2"], max_prompt_tokens=8, max_tokens=8)
    with pytest.raises(InputError, match="limit of response tokens is 0"):
        tokenise([pair()], families["gpt2"], max_response_tokens=0)
    with pytest.raises(InputError, match="on_long"):
        tokenise([pair()], families["gpt2"], on_long="cut")


def test_a_row_that_cannot_be_rendered_is_named(families):
    group = Group(id="chat.jsonl:3", prompt=[{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match=r"chat\.jsonl:3.*template file"):
        tokenise([group], families["gpt2"])
