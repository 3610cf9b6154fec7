"""Source options, the split by prompt, the endless order."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.data.sources import SourceConfig, Stream, split_by_prompt
from trimtab.errors import InputError
from trimtab.groups import Group, Response


def source(name: str, n: int) -> list[Group]:
    return [Group(id=f"{name}:{i}", prompt=f"{name} {i}", source=name) for i in range(n)]


def ids(groups):
    return [group.id for group in groups]


def test_config_is_strict_and_reads(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a"}\n{"q": "b"}\n{}\n')
    config = SourceConfig(path=str(file), columns={"q": "prompt"}, on_bad_row="skip", name="mine")
    groups, report = config.read()
    assert ids(groups) == ["mine:0", "mine:1"]
    assert report.skipped == {"missing column": 1}
    assert len(config.model_copy(update={"limit": 1}).read()[0]) == 1
    for wrong in (
        {"pth": "x"},
        {"weight": 0},
        {"weight": float("inf")},
        {"limit": 0},
        {"on_bad_row": "ignore"},
    ):
        with pytest.raises(ValidationError):
            SourceConfig(path="x", **wrong)


def test_split_has_no_prompt_on_both_sides_and_forgets_the_order_of_rows():
    groups = [Group(id=f"a:{i}", prompt=f"prompt {i % 200}") for i in range(600)]
    train, held = split_by_prompt(groups, 0.2, seed=1)
    assert not {g.prompt for g in train} & {g.prompt for g in held}
    assert len(train) + len(held) == 600
    assert 60 < len(held) < 180  # 120 expected, standard deviation 17
    shuffled = random.Random(0).sample(groups, len(groups))
    assert set(ids(split_by_prompt(shuffled, 0.2, seed=1)[1])) == set(ids(held))
    assert set(ids(split_by_prompt(groups, 0.2, seed=2)[1])) != set(ids(held))
    # More rows move no prompt across.
    more = split_by_prompt(groups + source("b", 300), 0.2, seed=1)[1]
    assert {g.id for g in more if g.id.startswith("a:")} == set(ids(held))


def test_split_of_conversations_and_of_plain_text():
    chat = [Group(id=f"c:{i}", prompt=[{"role": "user", "content": f"{i // 2}"}]) for i in range(100)]
    train, held = split_by_prompt(chat, 0.3, seed=0)
    assert held
    assert not {g.prompt[0]["content"] for g in train} & {g.prompt[0]["content"] for g in held}
    texts = [Group(id=f"t:{i}", prompt="", responses=[Response(text=f"text {i}")]) for i in range(100)]
    train, held = split_by_prompt(texts, 0.3, seed=0)  # one prompt, "", would go to one side whole
    assert 10 < len(held) < 50


def test_split_never_leaves_a_side_empty():
    for seed in range(20):
        for fraction in (0.001, 0.999):
            train, held = split_by_prompt(source("a", 2), fraction, seed)
            assert len(train) == len(held) == 1
    assert split_by_prompt(source("a", 2), 0, 0)[1] == []
    with pytest.raises(InputError, match="one prompt"):
        split_by_prompt([Group(id="a:0", prompt="x"), Group(id="a:1", prompt="x")], 0.5, 0)
    with pytest.raises(InputError, match="fraction"):
        split_by_prompt(source("a", 2), 1.0, 0)


def test_every_row_exactly_once_per_epoch_in_a_new_order():
    stream = Stream([source("a", 10)], [1.0], seed=3)
    epochs = [ids(stream.batch(10 * e, 10)) for e in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [stream.epoch(p) for p in (0, 9, 10, 39)] == [0, 0, 1, 3]
    assert stream.epoch_length == 10
    assert ids(Stream([source("a", 10)], [1.0], seed=4).batch(0, 10)) != epochs[0]


def test_order_in_an_epoch_belongs_to_the_ids_and_not_to_the_rows_order():
    rows = source("a", 30)
    reverse = Stream([rows[::-1]], [1.0], seed=3)
    assert ids(reverse.batch(0, 60)) == ids(Stream([rows], [1.0], seed=3).batch(0, 60))


def test_two_sources_by_hand():
    # Times (k+½)/w: a (w 3) at 1/6, 1/2, 5/6, 7/6, …; b (w 1) at 1/2, 3/2, …; ties go to a.
    stream = Stream([source("a", 100), source("b", 5)], [3, 1], seed=0)
    assert "".join(g.source for g in stream.batch(0, 8)) == "aabaaaba"
    assert (
        stream.epoch_length == 133
    )  # a's hundredth is at 99.5/3 = 33.17, after 33 of b's (the last at 32.5)


weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(weights, st.integers(0, 3000), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_resuming_continues_and_proportions_hold(ws, position, m, n, seed):
    sources = [source("abcde"[i], 3 + i) for i in range(len(ws))]
    stream = Stream(sources, ws, seed)
    fresh = Stream(sources, ws, seed)
    assert ids(stream.batch(position, m + n)) == ids(fresh.batch(position, m)) + ids(
        fresh.batch(position + m, n)
    )
    drawn = Counter(group.source for group in stream.batch(0, position))
    for name, weight in zip("abcde", ws, strict=False):
        assert abs(drawn[name] - position * weight / sum(ws)) <= (len(ws) + 1) / 2 + 1e-6


@settings(max_examples=60, deadline=None)
@given(weights)
def test_epoch_length_is_when_the_last_group_has_come_up(ws):
    sources = [source("abcde"[i], 4 - i % 3) for i in range(len(ws))]
    stream = Stream(sources, ws, 0)
    total = sum(map(len, sources))
    length = stream.epoch_length
    assert len(set(ids(stream.batch(0, length)))) == total
    assert len(set(ids(stream.batch(0, length - 1)))) == total - 1


def test_each_source_is_walked_without_replacement_whatever_the_others_do():
    stream = Stream([source("a", 7), source("b", 3)], [1, 2], seed=5)
    groups = stream.batch(0, 210)
    for name, size in (("a", 7), ("b", 3)):
        own = [group.id for group in groups if group.source == name]
        for start in range(0, len(own) - size, size):
            assert len(set(own[start : start + size])) == size
    seen: Counter[str] = Counter()
    for position, group in enumerate(groups):
        assert stream.epoch(position) == seen[group.id]
        seen[group.id] += 1


def test_a_group_filled_in_is_fresh_in_the_next_epoch():
    rows = [Group(id="a:0", responses=[Response(text="x", ratings={"overall": 1})], columns={"k": 1})]
    stream = Stream([rows], [1], seed=0)
    [first] = stream.batch(0, 1)
    first.prompt_tokens = [1]
    first.responses[0].tokens = [2]
    first.responses[0].reward_terms["length"] = 3.0
    first.responses[0].ratings["overall"] = 9
    first.responses.append(Response())
    first.columns["k"] = 2
    [second] = stream.batch(1, 1)
    assert second == Group(id="a:0", responses=[Response(text="x", ratings={"overall": 1})], columns={"k": 1})


def test_bad_streams():
    with pytest.raises(InputError, match="0 sources"):
        Stream([], [], 0)
    with pytest.raises(InputError, match="2 weights"):
        Stream([source("a", 1)], [1, 2], 0)
    with pytest.raises(InputError, match="no groups"):
        Stream([source("a", 1), []], [1, 2], 0)
    with pytest.raises(InputError, match="weight of source 1"):
        Stream([source("a", 1), source("b", 1)], [1, float("nan")], 0)
    with pytest.raises(InputError, match="id a:0"):
        Stream([source("a", 1), source("a", 2)], [1, 1], 0)
