"""Steps of a response: how a text is split, what its tokens are, and where each step ends."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.data.render import tokenise
from trimtab.data.steps import as_steps, bare, divided, ends_in, split_steps, step_tokens
from trimtab.errors import InputError
from trimtab.groups import Group, Response


def merging() -> PreTrainedTokenizerFast:
    """Bytes, and merges across what ends a step: ".\\n" is one token, and so is "\\n\\n"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    n = "Ċ"  # how byte level writes a line feed
    merges = [(".", n), (n, n), ("a", "b"), ("b", n)]
    words = [*letters, *("".join(pair) for pair in merges), "<eos>"]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one", ["one"]),
        ("one\ntwo", ["one\n", "two"]),
        ("one\n\ntwo\n", ["one\n\n", "two\n"]),
        ("one\n  \ntwo", ["one\n  \n", "two"]),
        ("\n\none\ntwo", ["\n\none\n", "two"]),
        ("", [""]),
        ("\n\n", ["\n\n"]),
    ],
)
def test_a_text_is_split_and_whole_again(text: str, steps: list[str]) -> None:
    assert split_steps(text, "\n") == steps
    assert "".join(steps) == text


def test_a_separator_of_several_characters() -> None:
    assert split_steps("a ки b ки", " ки") == ["a ки", " b ки"]
    assert bare(" b ки", " ки") == "b"
    with pytest.raises(ValueError, match="not empty"):
        split_steps("a", "")


def test_a_separator_that_ends_in_white_space() -> None:
    """Its white space goes with the step's; a step may be written with it, or with a part of it."""
    tokenizer = merging()
    once = step_tokens(tokenizer, ["ab", "cd"], ". ")
    assert tokenizer.decode(once[0]) == "ab. cd. "
    for steps in (["ab. ", "cd"], ["ab. ", "cd."], ["ab.", " cd. "], split_steps("ab. cd.", ". ")):
        assert step_tokens(tokenizer, steps, ". ") == once
    assert split_steps("##\na ##\nb", "##\n") == ["##\na ##\n", "b"], "what says nothing is no step"
    assert [bare(step, " ##\n") for step in ("a ##\n", "a ## ##\n\n", "##\n", " ##\n ##\n", "")] == (
        ["a", "a", "", "", ""]
    )


def test_steps_with_the_separator_inside_are_counted() -> None:
    groups = as_steps([labelled([1, 0, 1])], tiny.tokenizer(), "e")
    assert divided(groups, "e") == (1, 3), "d e f"
    assert divided(groups, "f") == (0, 3), "at a step's end it is none of it"


def test_a_boundary_is_never_inside_a_token() -> None:
    tokenizer = merging()
    tokens, ends = step_tokens(tokenizer, ["ab.", "cb", "\nd\n"], "\n")
    written = tokenizer.convert_ids_to_tokens(tokens)
    # Of the text as one string the tokenizer makes ".Ċ" and "bĊ" of the first two boundaries.
    assert written == ["ab", ".", "Ċ", "c", "b", "Ċ", "d", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab.\ncb\nd\n")["input_ids"]) == [
        "ab",
        ".Ċ",
        "c",
        "bĊ",
        "d",
        "Ċ",
    ]
    assert ends == [2, 5, 7]
    assert [written[end] for end in ends] == ["Ċ", "Ċ", "Ċ"]


def test_without_a_separator_steps_stand_as_they_are() -> None:
    tokenizer = merging()
    tokens, ends = step_tokens(tokenizer, ["ab.\n", " c"], "")
    assert tokenizer.decode(tokens) == "ab.\n c"
    assert ends == [1, 3]


def test_a_step_of_no_token_is_refused() -> None:
    with pytest.raises(InputError, match="is no token of this tokenizer"):
        step_tokens(tiny.tokenizer(), ["a", " "], "")


@pytest.mark.parametrize("text", ["ab.\ncb\nd", "ab.\n\ncb\n\nd\n", "\nab\n", "é\nü€\nx", "", "a\n\n\n\nb"])
def test_steps_end_in_the_tokens_that_complete_them(text: str) -> None:
    tokenizer = merging()
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    steps = split_steps(text, "\n")
    ends = ends_in(tokenizer, tokens, steps)
    assert len(ends) == len(steps)
    assert ends == sorted(ends)
    assert ends[-1] == len(tokens) - 1, "the last step ends with the response's end token"
    written = 0
    for step, end in zip(steps[:-1], ends, strict=False):
        written += len(step)
        assert len(tokenizer.decode(tokens[: end + 1])) >= written
        assert len(str(tokenizer.decode(tokens[:end])).rstrip("\ufffd")) < written, (
            "an earlier token completed it"
        )


def test_a_token_over_a_boundary_belongs_to_the_step_that_it_completes() -> None:
    tokenizer = merging()
    tokens = tokenizer("ab\ncb\nd")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["ab", "Ċ", "c", "bĊ", "d"]
    assert ends_in(tokenizer, tokens, ["ab\n", "cb\n", "d"]) == [1, 3, 4]
    assert ends_in(tokenizer, [], ["a"]) == []


# ---------------------------------------------------------------- from rows


def labelled(labels: list[float]) -> Group:
    texts = ["a b", "c", "d e f"][: len(labels)]
    return Group(id="s:0", prompt="x y", responses=[Response(text="", step_texts=texts, step_labels=labels)])


def test_rows_get_tokens_and_ends() -> None:
    [group] = as_steps([labelled([1, 0.5, 0])], tiny.tokenizer(), " z")
    [response] = group.responses
    assert tiny.tokenizer().decode(response.tokens or []) == "a b z c z d e f z"
    assert response.step_ends == [2, 4, 8]
    assert response.step_labels == [1, 0.5, 0]
    [last] = as_steps([labelled([1, 0.5, 0])], tiny.tokenizer(), " z", last_only=True)
    assert (last.responses[0].step_ends, last.responses[0].step_labels) == ([8], [0])
    assert last.responses[0].tokens == response.tokens


def test_other_rows_are_left_out() -> None:
    assert as_steps([Group(id="p", prompt="x", responses=[Response(text="y")])], tiny.tokenizer(), "\n") == []


@pytest.mark.parametrize("label", [-1.0, 2.0, 1.0001])
def test_a_label_that_is_no_probability_names_its_row(label: float) -> None:
    with pytest.raises(InputError, match=r"^s:0: a step's label is .* from 0 to 1"):
        as_steps([labelled([1.0, label])], tiny.tokenizer(), "\n")


def test_a_cut_response_keeps_its_whole_steps() -> None:
    groups = as_steps([labelled([1, 0.5, 0])], tiny.tokenizer(), " z")
    [cut], report = tokenise(groups, tiny.tokenizer(), max_response_tokens=6, on_long="truncate")
    [response] = cut.responses
    assert (response.step_ends, response.step_labels, response.step_texts) == ([2, 4], [1, 0.5], ["a b", "c"])
    assert response.tokens is not None
    assert len(response.tokens) == 6
    assert report.responses_truncated == 1
    both = [
        dataclasses.replace(groups[0], id="s:1"),
        Group(id="s:2", prompt="x", responses=[Response(text="a")]),
    ]
    kept, report = tokenise(both, tiny.tokenizer(), max_response_tokens=2, on_long="truncate")
    assert [group.id for group in kept] == ["s:2"]
    assert report.skipped == {"no whole step left": 1}
