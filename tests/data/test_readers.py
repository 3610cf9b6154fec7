"""Every format and every kind of file, well-formed and malformed."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.data.readers import read_groups
from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


def jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def one(folder: Path, row: object) -> Group:
    [group], report = read_groups(jsonl(folder, row))
    assert (report.read, report.kept) == (1, 1)
    return group


# ---------------------------------------------------------------- formats


def test_prompt_and_completion_with_extra_columns_and_renaming(tmp_path):
    path = jsonl(tmp_path, {"question": "2+2?", "answer": "4", "level": 3}, {"question": "a", "answer": "b"})
    groups, report = read_groups(path, name="sums", columns={"question": "prompt", "answer": "completion"})
    assert groups[0].prompt == "2+2?"
    assert groups[0].responses[0].text == "4"
    assert groups[0].columns == {"level": 3}
    assert [g.id for g in groups] == ["sums:0", "sums:1"]
    assert groups[0].source == "sums"
    assert str(report) == "sums: 2 rows read, 2 kept"


def test_pair_with_explicit_prompt(tmp_path):
    group = one(tmp_path, {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 2})
    assert (group.prompt, group.chosen.text, group.rejected.text) == ("2+2?", "4", "5")
    assert group.columns == {"margin": 2}
    assert group.id == "rows.jsonl:0"


def test_implicit_prompt_of_hh_ends_at_the_last_common_turn(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"
    # The answers share their first words, and one goes on for a further turn.
    chosen = start + " It is 4.\n\nHuman: thanks\n\nAssistant: Welcome."
    group = one(tmp_path, {"chosen": chosen, "rejected": start + " It is 5."})
    assert group.prompt == start
    assert group.chosen.text == " It is 4.\n\nHuman: thanks\n\nAssistant: Welcome."
    assert group.rejected.text == " It is 5."


def test_implicit_prompt_where_one_answer_begins_with_the_other(tmp_path):
    start = "\n\nHuman: 2+2?\n\nAssistant:"
    group = one(tmp_path, {"chosen": start + " Four", "rejected": start + " Four, I think"})
    assert (group.prompt, group.chosen.text) == (start, " Four")
    with pytest.raises(InputError, match="is empty"):
        one(tmp_path, {"chosen": start, "rejected": start + " Four"})


def test_implicit_prompt_of_other_text_ends_at_the_last_common_whitespace(tmp_path):
    group = one(tmp_path, {"chosen": "The sky is blue", "rejected": "The sky is black"})
    assert (group.prompt, group.chosen.text, group.rejected.text) == ("The sky is", " blue", " black")
    group = one(tmp_path, {"chosen": "Yes", "rejected": "No"})
    assert (group.prompt, group.chosen.text) == ("", "Yes")


def test_implicit_prompt_of_conversations(tmp_path):
    group = one(tmp_path, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]})
    assert (group.prompt, group.chosen.text, group.rejected.text) == ([USER], [FOUR], [FIVE])
    # One is the beginning of the other: the shared reply belongs to both responses.
    group = one(tmp_path, {"chosen": [USER, FOUR, USER, FIVE], "rejected": [USER, FOUR]})
    assert (group.prompt, group.rejected.text) == ([USER], [FOUR])


def test_prompt_given_twice_is_not_trained_as_a_response(tmp_path):
    whole = {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}
    for prompt in ("2+2?", [USER]):
        group = one(tmp_path, {"prompt": prompt, **whole})
        assert (group.prompt, group.chosen.text) == ([USER], [FOUR])
    group = one(tmp_path, {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]})
    assert (group.prompt, group.chosen.text) == ([USER], [FOUR])
    group = one(tmp_path, {"prompt": "2+2?", "completion": [USER, FOUR]})
    assert (group.prompt, group.responses[0].text) == ([USER], [FOUR])
    with pytest.raises(InputError, match="does not occur"):
        one(tmp_path, {"prompt": "3+3?", **whole})


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (True, True),
        (0, False),
        (1.0, True),
        ("allow", True),
        ("Deny", False),
        ("safe", True),
        ("unsafe", False),
    ],
)
def test_labels(tmp_path, label, value):
    group = one(tmp_path, {"prompt": "2+2?", "completion": "4", "label": label})
    assert group.responses[0].label is value


def test_messages(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "4"}], "name": None}
    group = one(tmp_path, {"messages": [system, USER, parts, USER, FIVE], "id": 7})
    assert group.prompt == [system, USER]
    assert [r.text for r in group.responses] == [[FOUR, USER, FIVE]]
    assert group.columns == {"id": 7}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sum"}}]}
    group = one(tmp_path, {"messages": [USER, call]})
    assert group.responses[0].text == [{**call, "content": ""}]


def test_steps(tmp_path):
    row = {"prompt": "2+2+2?", "completions": ["2+2=4. ", "4+2=7."], "labels": [True, False]}
    [response] = one(tmp_path, row).responses
    assert response.text == "2+2=4. 4+2=7."
    assert response.step_texts == ["2+2=4. ", "4+2=7."]
    assert response.step_labels == [1.0, 0.0]
    assert one(tmp_path, {**row, "labels": [0.5, -1]}).responses[0].step_labels == [0.5, -1.0]


def test_responses_with_every_kind_of_feedback(tmp_path):
    row = {"prompt": "2+2?", "responses": ["4", "5", "four"]}
    group = one(tmp_path, {**row, "rewards": [1, 0, 0.5], "ranks": [1, 3, 1], "labels": ["allow", "deny", 1]})
    assert [r.reward for r in group.responses] == [1.0, 0.0, 0.5]
    assert [r.rank for r in group.responses] == [1, 3, 1]
    assert [r.label for r in group.responses] == [True, False, True]
    numbers = one(tmp_path, {**row, "ratings": [5, 1, 3]})
    assert [r.ratings for r in numbers.responses] == [{"overall": 5}, {"overall": 1}, {"overall": 3}]
    mappings = one(tmp_path, {**row, "ratings": [{"right": 1, "kind": None}, {"right": 0}, {"right": 1}]})
    assert [r.ratings for r in mappings.responses] == [{"right": 1}, {"right": 0}, {"right": 1}]
    turned = one(tmp_path, {**row, "ratings": {"right": [1, 0, 1], "kind": [2, 3, 4]}})
    assert turned.responses[1].ratings == {"right": 0, "kind": 3}
    chat = one(tmp_path, {"prompt": "2+2?", "responses": [[FOUR], [FIVE]]})
    assert (chat.prompt, chat.responses[0].text) == ([USER], [FOUR])


def test_prompt_alone_and_text_alone(tmp_path):
    group = one(tmp_path, {"prompt": [USER], "answer": "4", "label": "safe"})
    assert (group.prompt, group.responses) == ([USER], [])
    assert group.columns == {"answer": "4", "label": "safe"}
    group = one(tmp_path, {"text": "To be or not to be"})
    assert (group.prompt, group.responses[0].text) == ("", "To be or not to be")


# ---------------------------------------------------------------- malformed rows

GOOD = {"prompt": "2+2?", "completion": "4"}
PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
GROUP = {"prompt": "2+2?", "responses": ["4", "5"]}
STEPS = {"prompt": "2+2?", "completions": ["4", "5"], "labels": [1, 0]}
HH = "\n\nHuman: {}\n\nAssistant: {}"
BAD = [
    ([1, 2], "not an object", "not an object"),
    ("text", "not an object", "not an object"),
    ({}, "missing column", "no format has these columns"),
    ({"question": "a"}, "missing column", "question"),
    ({"completion": "4"}, "missing column", "`prompt` is missing"),
    ({"prompt": "a", "chosen": "b"}, "missing column", "`rejected` is missing"),
    ({"responses": ["b"]}, "missing column", "`prompt` is missing"),
    ({"prompt": "a", "completions": ["b"]}, "missing column", "`labels` is missing"),
    (GOOD | {"completion": 4}, "wrong type", "`completion` holds int"),
    (GOOD | {"completion": None}, "wrong type", "`completion` holds null"),
    (GOOD | {"prompt": {"a": 1}}, "wrong type", "`prompt` holds dict"),
    (GOOD | {"prompt": [1]}, "wrong type", "`prompt` holds int"),
    (GOOD | {"prompt": math.nan}, "wrong type", "`prompt` holds float"),
    (GOOD | {"prompt": "\ud800"}, "invalid text", "surrogate"),
    (GOOD | {"completion": " \n"}, "empty response", "is empty"),
    (GOOD | {"completion": []}, "empty list", "empty list"),
    (GOOD | {"prompt": []}, "empty list", "empty list"),
    (GOOD | {"label": "perhaps"}, "unknown label", "'perhaps'"),
    (GOOD | {"label": 2}, "unknown label", "use true/false"),
    (GOOD | {"label": math.nan}, "unknown label", "nan"),
    (PAIR | {"chosen": ""}, "empty response", "`chosen` is empty"),
    (PAIR | {"chosen": "5"}, "identical chosen and rejected", "identical"),
    (PAIR | {"chosen": [FOUR]}, "wrong type", "the reverse"),
    ({"chosen": HH.format("a", "b"), "rejected": HH.format("c", "d")}, "no common prompt", "same request"),
    ({"chosen": [USER, FOUR], "rejected": [FOUR, USER]}, "no common prompt", "same request"),
    ({"chosen": [USER, USER], "rejected": [USER, FOUR]}, "no common prompt", "same request"),
    (STEPS | {"labels": [1]}, "lists of unequal length", "2 entries and `labels` 1"),
    (STEPS | {"completions": ["4", " "]}, "empty response", "`completions` is empty"),
    (STEPS | {"completions": []}, "empty list", "`completions` is an empty list"),
    (STEPS | {"labels": [1, None]}, "wrong type", "`labels` holds null"),
    (GROUP | {"responses": []}, "empty list", "`responses` is an empty list"),
    (GROUP | {"responses": "4"}, "wrong type", "`responses` holds str"),
    (GROUP | {"responses": "[4"}, "wrong type", "not a valid JSON list"),
    (GROUP | {"responses": ["4", [FOUR]]}, "wrong type", "mixes text and messages"),
    (GROUP | {"responses": ["4", ""]}, "empty response", "`responses[1]` is empty"),
    (GROUP | {"rewards": [1]}, "lists of unequal length", "`rewards` 1"),
    (GROUP | {"rewards": [1, math.nan]}, "not a finite number", "`rewards` holds nan"),
    (GROUP | {"rewards": [1, 10**400]}, "not a finite number", "`rewards` holds inf"),
    (GROUP | {"rewards": [1, True]}, "wrong type", "`rewards` holds bool"),
    (GROUP | {"ranks": [1, "2"]}, "wrong type", "`ranks` holds str"),
    (GROUP | {"ratings": [{"a": math.inf}, 1]}, "not a finite number", "`ratings.a` holds inf"),
    (GROUP | {"ratings": [{}, {}]}, "empty list", "without any attribute"),
    (GROUP | {"ratings": {"a": [1]}}, "lists of unequal length", "`ratings.a` 1"),
    ({"messages": []}, "empty list", "`messages` is an empty list"),
    ({"messages": [USER]}, "empty response", "no assistant message"),
    ({"messages": [FOUR, USER]}, "wrong role", "begins with an assistant"),
    ({"messages": [USER, FOUR | {"content": ""}]}, "empty response", "is empty"),
    ({"messages": [USER, {"role": "robot", "content": "4"}]}, "unknown role", "'robot'"),
    ({"messages": [USER, {"role": ["user"], "content": "4"}]}, "unknown role", "use assistant"),
    ({"messages": [USER, {"role": "assistant"}]}, "wrong type", "`messages.content` holds null"),
    ({"messages": [{"from": "human", "value": "2+2?"}]}, "unknown role", "None"),
    ({"messages": [USER, FOUR | {"content": [{"type": "image"}]}]}, "wrong type", "other media"),
    ({"prompt": [USER, FOUR], "completion": "5"}, "wrong role", "`prompt` ends with an assistant"),
    ({"prompt": [USER], "completion": [USER, USER]}, "wrong role", "the assistant should reply"),
    ({"prompt": " "}, "empty prompt", "`prompt` is empty"),
    ({"text": ""}, "empty response", "`text` is empty"),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD)
def test_malformed_rows_name_file_and_line_or_are_counted(tmp_path, row, kind, message):
    path = jsonl(tmp_path, GOOD, row, GOOD)
    with pytest.raises(InputError) as caught:
        read_groups(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    groups, report = read_groups(path, on_bad_row="skip")
    assert [g.id for g in groups] == ["rows.jsonl:0", "rows.jsonl:2"]
    assert report.skipped == {kind: 1}
    assert str(report) == f"rows.jsonl: 3 rows read, 2 kept, 1 skipped ({kind} 1)"


def test_one_source_keeps_to_one_format(tmp_path):
    path = jsonl(tmp_path, PAIR, {"prompt": "3+3?"})  # would be a prompt for sampling
    with pytest.raises(InputError, match=r"rows\.jsonl:2") as caught:
        read_groups(path)
    assert "prompt + chosen + rejected" in str(caught.value)


def test_lines_that_are_not_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    deep = b'{"prompt": ' + b"[" * 100_000
    file.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, b"", b'{"prompt": ', b'{"a": "\xff"}', deep, b"9" * 9_999, good])
    )
    with pytest.raises(InputError, match=r"not JSON .*rows\.jsonl:3: mend"):
        read_groups(str(file))
    groups, report = read_groups(str(file), on_bad_row="skip")
    assert [g.id for g in groups] == ["rows.jsonl:0", "rows.jsonl:6"]
    assert report.skipped == {"not JSON": 3, "not UTF-8": 1}
    assert report.read == 6  # the blank line is no row


def test_empty_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    (tmp_path / "b.csv").write_text("")
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.json", "a.csv", "b.csv", "a.parquet"):
        with pytest.raises(InputError, match="empty"):
            read_groups(str(tmp_path / name))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no data files"):
        read_groups(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"no row .* could be kept .*missing column 1"):
        read_groups(jsonl(tmp_path, {}), on_bad_row="skip")


def test_options_that_contradict(tmp_path):
    path = jsonl(tmp_path, GOOD, GOOD, GOOD)
    assert len(read_groups(path, limit=2)[0]) == 2
    with pytest.raises(InputError, match="limit is 0"):
        read_groups(path, limit=0)
    with pytest.raises(InputError, match="on_bad_row"):
        read_groups(path, on_bad_row="ignore")
    with pytest.raises(InputError, match="one name to two columns"):
        read_groups(path, columns={"prompt": "text", "completion": "text"})
    with pytest.raises(InputError, match=r"'question' is missing, .*:1"):
        read_groups(path, columns={"question": "prompt"})
    with pytest.raises(InputError, match=r"two columns would be named 'prompt'"):
        read_groups(path, columns={"completion": "prompt"})
    with pytest.raises(InputError, match="split 'test' has no meaning"):
        read_groups(path, split="test")


# ---------------------------------------------------------------- kinds of file


def test_json_array_one_object_and_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD, GOOD | {"completion": ""}, GOOD], indent=1))
    with pytest.raises(InputError, match=r"rows\.json:6: "):  # four lines a row, after the bracket's
        read_groups(str(file))
    assert [g.id for g in read_groups(str(file), on_bad_row="skip")[0]] == ["rows.json:0", "rows.json:2"]
    file.write_text(json.dumps(GOOD, indent=1))
    assert len(read_groups(str(file))[0]) == 1
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    assert len(read_groups(str(file))[0]) == 2
    for broken in (
        "[\n{},\n{]",
        "[{} {}]",
        "[",
        '[{}] "more"',
        "[1,]",
        "[" * 99_999,
        "[" + "9" * 9_999 + "]",
    ):
        file.write_text(broken)
        with pytest.raises(InputError, match=r"rows\.json:\d"):
            read_groups(str(file))
    file.write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(InputError, match="UTF-8"):
        read_groups(str(file))


def test_csv(tmp_path):
    file = tmp_path / "rows.csv"
    rows = [["prompt", "responses", "ranks"], ["a\nb", '["c", "d"]', "[1, 2]"], ["e", "oops", "[1, 2]"]]
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(rows)
    with pytest.raises(
        InputError, match=r"`responses` holds str.*rows\.csv:4: "
    ):  # the first row has two lines
        read_groups(str(file))
    [group], _ = read_groups(str(file), on_bad_row="skip")
    assert (group.prompt, [r.rank for r in group.responses]) == ("a\nb", [1, 2])
    file.write_text(f"prompt,completion,label\na,{'b' * 200_000},TRUE\nc,d\ne,f,g,h\n")
    with pytest.raises(InputError, match=r"has not 3 cells.*rows\.csv:3: "):
        read_groups(str(file))
    [group], report = read_groups(str(file), on_bad_row="skip")
    assert group.responses[0].label is True
    assert report.skipped == {"wrong number of cells": 2}
    for broken in ("prompt,prompt\na,b\n", 'prompt,completion\n"a"b,c\n'):
        file.write_text(broken)
        with pytest.raises(InputError, match=r"rows\.csv:[12]"):
            read_groups(str(file))
    file.write_bytes(b"prompt,completion\n\xff,b\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_groups(str(file))
    assert csv.field_size_limit() == 131_072  # as it was


def test_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    when = datetime.date(2024, 1, 2)
    chat = [[USER | {"name": None}, FOUR | {"name": "x"}], [USER | {"name": None}, FIVE | {"name": None}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chat, "when": [when, None]}), file)
    groups, _ = read_groups(str(file))
    assert groups[0].prompt == [USER]  # without the null keys that the table adds
    assert groups[0].responses[0].text == [FOUR | {"name": "x"}]
    assert groups[0].columns == {"when": "2024-01-02"}
    assert Group.from_dict(json.loads(json.dumps(groups[0].to_dict()))) == groups[0]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), file)
    with pytest.raises(InputError, match=r"holds null.*rows\.parquet, row 1: "):
        read_groups(str(file))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "image": [b"\0"]}), file)
    with pytest.raises(InputError, match="a column holds bytes"):
        read_groups(str(file))
    file.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="as Parquet"):
        read_groups(str(file))


def test_folders_and_their_splits(tmp_path):
    jsonl(tmp_path, GOOD, GOOD, name="b.jsonl")
    jsonl(tmp_path, GOOD, name="a.jsonl")
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / ".cache", GOOD, name="hidden.jsonl")
    groups, report = read_groups(str(tmp_path), name="mine")
    assert [g.id for g in groups] == ["mine/a.jsonl:0", "mine/b.jsonl:0", "mine/b.jsonl:1"]
    assert {g.source for g in groups} == {"mine"}
    assert report.files == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(InputError, match="not named after splits"):
        read_groups(str(tmp_path), split="test")
    (tmp_path / "test").mkdir()
    jsonl(tmp_path / "test", GOOD, name="x.jsonl")
    with pytest.raises(InputError, match="there are test"):
        read_groups(str(tmp_path))
    jsonl(tmp_path, GOOD, name="train-00000-of-00001.jsonl")
    assert [g.id for g in read_groups(str(tmp_path), name="m")[0]] == ["m/train-00000-of-00001.jsonl:0"]
    assert [g.id for g in read_groups(str(tmp_path), name="m", split="test")[0]] == ["m/test/x.jsonl:0"]


def test_no_such_path_and_unknown_kinds(tmp_path):
    for path in (str(tmp_path / "no"), "./no", "no.jsonl"):
        with pytest.raises(InputError, match="no such file"):
            read_groups(path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="unknown kind"):
        read_groups(str(tmp_path / "a.txt"))


def test_hugging_face_data_sets(monkeypatch):
    calls = []

    def load_dataset(name, configuration, **options):
        calls.append((name, configuration, options))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\nand more")
        return [GOOD, GOOD]

    package = types.SimpleNamespace(load_dataset=load_dataset, __version__="4.1.0")
    monkeypatch.setitem(sys.modules, "datasets", package)
    groups, report = read_groups("owner/sums:main", split="test")
    assert [g.id for g in groups] == ["owner/sums:main:0", "owner/sums:main:1"]
    assert calls == [("owner/sums", "main", {"split": "test"})]  # nothing that lets remote code run
    assert report.files == ["owner/sums:main [test]"]
    with pytest.raises(InputError, match=r"no file or folder no/such.*doesn't exist\)"):
        read_groups("no/such")
    package.__version__ = "2.19.0"
    with pytest.raises(InputError, match="too old"):
        read_groups("owner/sums")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets.*trimtab\[hub\]"):
        read_groups("owner/sums")


# ---------------------------------------------------------------- any row at all

NAMES = ["prompt", "completion", "chosen", "rejected", "label", "messages", "responses", "text", "x"]
NAMES += ["completions", "labels", "rewards", "ratings", "ranks"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
SCALARS |= st.sampled_from(["allow", "[1]", "[", "\n\nAssistant: a", "\ud800"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 3, None]), "content": SCALARS},
        optional={"tool_calls": SCALARS},
    ),
    max_size=4,
)
VALUES = MESSAGES | st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner)
    ),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | VALUES


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=4), skip=st.booleans())
def test_nothing_but_input_error_escapes(tmp_path, rows, skip):
    path = jsonl(tmp_path, *rows)
    try:
        groups, report = read_groups(path, on_bad_row="skip" if skip else "error")
    except InputError:
        return
    assert report.kept == len(groups) == report.read - sum(report.skipped.values())
    for group in groups:
        json.dumps(group.to_dict())
        for text in (group.prompt, *(response.text for response in group.responses)):
            prompt_text(text).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60) | st.text(alphabet='[]{},":\n0a', max_size=40).map(str.encode))
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_any_bytes_at_all(tmp_path, suffix, data):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(data)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(InputError):
            read_groups(str(file), on_bad_row=on_bad_row)


# ---------------------------------------------------------------- real files

DATA = os.environ.get("TRIMTAB_DATA", "")


@pytest.mark.skipif(not DATA, reason="TRIMTAB_DATA is not set")
def test_real_files():
    groups, report = read_groups(f"{DATA}/hh-rlhf/harmless-base.jsonl", on_bad_row="skip")
    assert report.read == 1_866
    assert set(report.skipped) <= {"empty response"}
    assert report.kept > 1_850
    assert all(group.prompt.endswith("\n\nAssistant:") for group in groups)
    assert all(group.chosen.text != group.rejected.text for group in groups)
    groups, report = read_groups(
        f"{DATA}/gsm8k/train.jsonl", columns={"question": "prompt", "answer": "completion"}
    )
    assert report.kept == report.read == 7_473
    assert all("####" in group.responses[0].text for group in groups)


def test_group_weight(tmp_path):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "weight": 7}
    assert one(tmp_path, row).weight == 1.0
    weighted = one(tmp_path, row | {"group_weight": 0.25})
    assert weighted.weight == 0.25
    assert weighted.columns == {"weight": 7}
    assert one(tmp_path, {"prompt": "2+2?", "group_weight": 0}).weight == 0.0


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, "`group_weight` is -1.0, .*rows.jsonl:1: give a number that is not negative"),
        (math.nan, "`group_weight` holds nan, .*rows.jsonl:1"),
        ("2", "`group_weight` holds str, not a number"),
        (None, "`group_weight` holds null, not a number"),
    ],
)
def test_bad_group_weights(tmp_path, weight, message):
    with pytest.raises(InputError, match=message):
        read_groups(jsonl(tmp_path, {"prompt": "2+2?", "group_weight": weight}))


def test_group_weight_in_some_rows_only(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "group_weight": 2}, {"prompt": "b"})
    with pytest.raises(InputError, match=r"rows.jsonl:2: give every row"):
        read_groups(path)
