"""Prompts and responses as token ids, on one small tokenizer a family."""

from __future__ import annotations

import pytest

from trimtab.data.chat import end_tokens, render_prompt, render_response
from trimtab.errors import InputError

ASK = [{"role": "user", "content": "What is 2+2?"}]
TURNS = [
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Hello there"},
    {"role": "tool", "content": "how are you"},
    {"role": "assistant", "content": "of course"},
]
PLAIN = ("llama2", "gpt2", "qwen", "gemma", "llama3")
CHAT = {"qwen": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}


def said(tokenizer, ids, mask):
    return tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])


@pytest.mark.parametrize("family", PLAIN)
def test_plain_text_has_one_bos_where_the_tokenizer_adds_one_and_one_eos(families, family):
    tokenizer = families[family]
    prompt = render_prompt(tokenizer, "The capital of France is")
    ids, mask = render_response(tokenizer, "The capital of France is", " Paris.")
    bos = [tokenizer.bos_token_id] if family in ("llama2", "gemma", "llama3") else []
    assert prompt[: len(bos)] == bos
    assert prompt.count(tokenizer.bos_token_id) == len(bos)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert mask == [True] * len(ids)
    # One text when put together: no space lost or added at the boundary.
    assert tokenizer.decode(prompt[len(bos) :] + ids[:-1]) == "The capital of France is Paris."


def test_special_tokens_already_in_the_text_are_not_doubled(families):
    tokenizer = families["llama2"]
    assert render_prompt(tokenizer, "<s>Hello").count(tokenizer.bos_token_id) == 1
    ids, _ = render_response(tokenizer, "Hello", "there</s>")
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_response_gets_no_space_that_its_text_has_not(families):
    tokenizer = families["llama2"]
    four = tokenizer.convert_tokens_to_ids("4")
    # Tokenised as a text of its own it would be ["▁", "4"], a space after "2+2=".
    assert tokenizer.convert_ids_to_tokens(tokenizer("4", add_special_tokens=False)["input_ids"]) == [
        "▁",
        "4",
    ]
    assert render_response(tokenizer, "2+2=", "4")[0] == [four, tokenizer.eos_token_id]
    prompt = render_prompt(tokenizer, "2+2=")
    assert tokenizer.decode([*prompt[1:], four]) == "2+2=4"


def test_an_empty_prompt_still_has_a_token(families, build):
    assert render_prompt(families["llama2"], "") == [families["llama2"].bos_token_id]
    assert render_prompt(families["gpt2"], "") == [families["gpt2"].bos_token_id]
    assert render_prompt(families["qwen"], "") == [families["qwen"].eos_token_id]  # it has no BOS
    bare = build["gpt2"]()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(InputError, match="BOS or EOS"):
        render_prompt(bare, "")
    with pytest.raises(InputError, match="no EOS"):
        render_response(bare, "Hello", "there")
    with pytest.raises(InputError, match="eos_token"):
        end_tokens(bare)


@pytest.mark.parametrize(("family", "end"), CHAT.items())
def test_chat_prompt_is_a_list_of_ids_with_the_templates_own_bos_only(families, family, end):
    tokenizer = families[family]
    prompt = render_prompt(tokenizer, ASK)
    assert type(prompt) is list
    assert all(type(i) is int for i in prompt)
    text = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == text
    if tokenizer.bos_token_id is not None:
        assert prompt.count(tokenizer.bos_token_id) == 1
        # The trap: the rendered text tokenised with special tokens has two.
        assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize(("family", "end"), CHAT.items())
def test_chat_response_ends_with_the_end_of_turn(families, family, end):
    tokenizer = families[family]
    for response in ("It is 4.", [{"role": "assistant", "content": "It is 4."}]):
        ids, mask = render_response(tokenizer, ASK, response)
        assert tokenizer.decode(ids) == f"It is 4.{end}"  # neither EOS nor the template's last newline
        assert mask == [True] * len(ids)
    full = tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "It is 4."}], tokenize=True, return_dict=False
    )
    joined = render_prompt(tokenizer, ASK) + ids
    assert joined == full[: len(joined)]


@pytest.mark.parametrize(("family", "end"), [*CHAT.items(), ("stripping", "<|im_end|>")])
def test_masks_of_several_turns_cover_the_assistants_words_alone(families, family, end):
    tokenizer = families[family]
    ids, mask = render_response(tokenizer, ASK, TURNS)
    assert said(tokenizer, ids, mask) == f"It is 4.{end}of course{end}"
    between = said(tokenizer, ids, [not counts for counts in mask])
    assert "Hello there" in between
    assert "how are you" in between
    full = tokenizer.apply_chat_template(ASK + TURNS, tokenize=False)
    assert full.startswith(tokenizer.decode(render_prompt(tokenizer, ASK) + ids))


def test_what_follows_the_last_reply_is_left_out(families):
    tokenizer = families["qwen"]
    assert render_response(tokenizer, ASK, TURNS[:2]) == render_response(tokenizer, ASK, TURNS[:1])


def test_thinking_that_the_template_strips_from_earlier_turns_is_trained_as_written(families):
    tokenizer = families["stripping"]
    first = "<think>\nmore\n</think>\n\nIt is 4."
    turns = [{"role": "assistant", "content": first}, *TURNS[1:]]
    assert "more" not in tokenizer.apply_chat_template(ASK + turns, tokenize=False)  # so no prefix of it
    ids, mask = render_response(tokenizer, ASK, turns)
    assert said(tokenizer, ids, mask) == f"{first}<|im_end|>of course<|im_end|>"
    whole = tokenizer.decode(render_prompt(tokenizer, ASK) + ids)
    plain = families["qwen"].apply_chat_template(ASK + turns, tokenize=False)
    assert whole == plain.removesuffix("\n")


def test_a_turn_that_the_template_opens_with_a_thought_does_not_open_it_twice(families):
    tokenizer = families["opening"]
    ids, mask = render_response(tokenizer, ASK, "<think>\nmore\n</think>It is 4.")
    whole = tokenizer.decode(render_prompt(tokenizer, ASK) + ids)
    assert whole.endswith("<think>\nmore\n</think>It is 4.<|endoftext|>")
    assert whole.count("<think>") == 1
    assert all(mask)
    assert "more" not in tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "<think>\nmore\n</think>It is 4."}], tokenize=False
    )


def test_content_that_merges_with_the_turns_opening_keeps_the_prompts_ids(build):
    tokenizer = build["qwen"]()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n\nAssista")
    # "\n\nAssistant" is one run for the tokenizer: the full rendering's ids do not begin with the prompt's.
    prompt = render_prompt(tokenizer, ASK)
    ids, _ = render_response(tokenizer, ASK, "nt more")
    assert tokenizer.decode(prompt + ids).endswith("Assistant more<|im_end|>")


def test_eos_ends_the_last_turn_where_the_template_ends_none(build):
    tokenizer = build["qwen"]()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, mask = render_response(tokenizer, ASK, "It is 4.")
    assert ids[-1] == tokenizer.eos_token_id
    assert mask[-1]
    assert end_tokens(tokenizer) == [tokenizer.eos_token_id]


def test_end_tokens(families):
    qwen = families["qwen"]
    eos, turn = qwen.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert end_tokens(qwen) == [eos, turn]
    assert end_tokens(qwen, [turn, 7]) == [eos, turn, 7]
    assert end_tokens(qwen, 9) == [eos, turn, 9]
    assert end_tokens(families["gpt2"]) == [families["gpt2"].eos_token_id]
    llama3 = families["llama3"]
    assert end_tokens(llama3) == llama3.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])


def test_what_cannot_be_rendered_says_what_to_do(families):
    with pytest.raises(InputError, match="template file"):
        render_prompt(families["gpt2"], ASK)
    with pytest.raises(InputError, match="System role not supported"):
        render_prompt(families["gemma"], [{"role": "system", "content": "x"}, *ASK])
    with pytest.raises(InputError, match="without messages"):
        render_prompt(families["qwen"], [])
    with pytest.raises(InputError, match="prompt of text"):
        render_response(families["qwen"], "What?", TURNS)
    with pytest.raises(InputError, match="begin with an assistant"):
        render_response(families["qwen"], ASK, TURNS[1:])
