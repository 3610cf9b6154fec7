"""Formats and system prompts: what is put where, what is drawn when, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from trimtab.data.render import TokenReport, tokenise
from trimtab.data.sources import Stream
from trimtab.data.wording import tokenised, wordings
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.methods.shared.setup import DataConfig

ASK = "q {prompt} a"
CHAT = [
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def prompts(group: Group, *words: Any) -> list[Any]:
    return [made.prompt for made in wordings(group, *words)]


def test_every_format_with_every_system_prompt() -> None:
    text = Group(id="a:0", prompt="b c", responses=[Response(text="d")])
    assert prompts(text, ["{prompt}", ASK], []) == ["b c", "q b c a"]
    assert prompts(text, [], []) == ["b c"]
    assert [made.responses for made in wordings(text, ["{prompt}", ASK], [])] == [text.responses] * 2
    chat = Group(id="a:1", prompt=CHAT)
    worded = prompts(chat, ["{prompt}", ASK], ["s", ""])
    system, asked = {"role": "system", "content": "s"}, {"role": "user", "content": "q d a"}
    assert worded == [[system, *CHAT], CHAT, [system, *CHAT[:2], asked], [*CHAT[:2], asked]]
    assert chat.prompt == CHAT
    assert CHAT[2]["content"] == "d"


def test_braces_are_doubled_in_formats_and_left_alone_in_prompts() -> None:
    group = Group(id="a:0", prompt="{x} {{y}} {prompt}")
    assert prompts(group, ['{{"ask": "{prompt}"}}'], []) == ['{"ask": "{x} {{y}} {prompt}"}']
    assert prompts(group, ["{prompt} / {prompt}"], []) == ["{x} {{y}} {prompt} / {x} {{y}} {prompt}"]


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["{prompt}", "Answer:"], r"entry 2 of formats, 'Answer:', has no \{prompt\}"),
        (["{question} {prompt}"], r"has the unknown placeholder \{question\}"),
        (["{} {prompt}"], r"has the unknown placeholder \{\}"),
        (["{prompt!r}"], r"unknown placeholder \{prompt\}: only"),
        (["{prompt:>9}"], "unknown placeholder"),
        (["{prompt.__class__}"], r"unknown placeholder \{prompt.__class__\}"),
        (["{prompt} }"], r"cannot be read .*write a brace as \{\{ or \}\}"),
        (["{{prompt}}"], r"has no \{prompt\}"),
        ([ASK, ASK], "formats has an entry twice"),
    ],
)
def test_formats_that_are_refused(formats: list[str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(formats=formats)


def test_system_prompts_that_are_refused() -> None:
    with pytest.raises(ValidationError, match="system_prompts has an entry twice"):
        DataConfig(system_prompts=["s", "s"])


@pytest.mark.parametrize(
    ("prompt", "words", "message"),
    [
        ("b", ([], ["s"]), "a:7: data.system_prompts needs conversations, and this prompt is text"),
        ([{"role": "system", "content": "t"}, *CHAT], ([], ["s"]), "begins with a system prompt of its own"),
        ("", ([ASK], []), "has no prompt that data.formats could word"),
        ([{"role": "user", "content": [{"text": "b"}]}], ([ASK], []), "no message of plain text by the user"),
        ([{"role": "tool", "content": "b"}], ([ASK], []), "no message of plain text by the user"),
    ],
)
def test_rows_that_cannot_be_worded(prompt: Any, words: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wordings(Group(id="a:7", prompt=prompt), *words)


def texts(groups: list[Group]) -> list[tuple[str, Any]]:
    return [(group.id, group.prompt) for group in groups]


def stream(count: int, seed: int = 3) -> Stream:
    groups = [Group(id=f"a:{i}", prompt="b") for i in range(count)]
    words = {g.id: wordings(g, ["{prompt}", ASK, "{prompt} c"], []) for g in groups}
    return Stream([[words[g.id][0] for g in groups]], [1.0], seed, words)


def test_the_wording_is_a_function_of_seed_pass_and_group() -> None:
    one = stream(50)
    drawn = texts(one.batch(0, 200))
    # From any position, in pieces, in another object: the same.
    assert texts(stream(50).batch(70, 130)) == drawn[70:]
    assert [pair for k in range(0, 200, 8) for pair in texts(one.batch(k, 8))] == drawn
    assert texts(stream(50, seed=4).batch(0, 200)) != drawn
    # The order is that of a stream without wordings.
    plain = Stream([[Group(id=f"a:{i}") for i in range(50)]], [1.0], 3)
    assert [g.id for g in plain.batch(0, 200)] == [name for name, _ in drawn]
    # Another wording in another pass: of 150 changes a third is none.
    by_pass = [dict(drawn[k : k + 50]) for k in range(0, 200, 50)]
    changed = sum(a[name] != b[name] for a, b in pairwise(by_pass) for name in a)
    assert 80 < changed < 120


def test_wordings_come_equally_often() -> None:
    counts = Counter(prompt for _, prompt in texts(stream(1000).batch(0, 3000)))
    assert set(counts) == {"b", "q b a", "b c"}
    # 1000 each; five standard deviations are 129.
    assert all(abs(count - 1000) < 129 for count in counts.values())


def test_batches_are_copies_of_what_was_computed_ahead() -> None:
    made = stream(4)
    ahead = made.worded([Group(id="a:2")])
    assert [group.prompt for group in ahead] == ["b", "q b a", "b c"]
    for group in ahead:
        group.weight = 5.0
    weights = {group.id: group.weight for group in made.batch(0, 4)}
    assert weights == {"a:0": 1.0, "a:1": 1.0, "a:2": 5.0, "a:3": 1.0}
    other = Group(id="else")
    assert made.worded([other]) == [other]


def test_a_group_is_kept_if_all_its_wordings_fit() -> None:
    """``q b b b a`` has five tokens: the second row fits as it stands and not in the format."""
    groups = [Group(id=f"a:{i}", prompt=" ".join("b" * n)) for i, n in enumerate((2, 3))]

    def fit(column: list[Group]) -> tuple[list[Group], TokenReport]:
        return tokenise(column, tiny.tokenizer(), max_prompt_tokens=4, on_long="skip")

    kept, words, report = tokenised(groups, ["{prompt}", ASK], [], fit)
    assert [group.id for group in kept] == ["a:0"]
    assert [[len(g.prompt_tokens or []) for g in made] for made in words.values()] == [[2, 4]]
    assert report.startswith("1 groups fit in all of 2 wordings; of one wording 1 of 2 groups kept")
    kept, words, report = tokenised(groups, ["{prompt}"], [], fit)
    assert (len(kept), words, report) == (2, {}, "")
