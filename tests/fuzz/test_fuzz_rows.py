"""Rows of every kind and files of every format: groups or one line that says why not, never a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import assume, example, given
from hypothesis import strategies as st
from plan import fuzzed, one_line

from trimtab.data.collate import collate
from trimtab.data.convert import as_comparisons, as_demonstrations, as_pairs, as_prompts
from trimtab.data.readers import SUFFIXES, ReadReport, read_groups
from trimtab.data.render import tokenise
from trimtab.data.sources import Stream, split_by_prompt
from trimtab.data.tables import hub_rows
from trimtab.errors import InputError
from trimtab.groups import Group

WORDS = st.one_of(
    st.sampled_from(
        ["a", "b c", "", " ", "\n\nAssistant: a", "a\n\nHuman: b\n\nAssistant: c", "allow", "[1, 2]"]
    ),
    st.sampled_from(["\ud800", "\0", "\ufeff", "é" * 50, "٣", "\u2028", "[" * 200, '["\\ud800"]', "{{ a }}"]),
    st.text(max_size=12),
)
NUMBERS = st.one_of(
    st.integers(-3, 5), st.floats(), st.integers(-(10**400), 10**400), st.booleans(), st.just(1e308)
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "nobody", "", None, 3, ["user"]])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES},
        optional={
            "content": st.one_of(
                WORDS, st.none(), st.lists(st.fixed_dictionaries({"type": WORDS, "text": WORDS}))
            ),
            "tool_calls": st.lists(WORDS, max_size=2),
            "name": WORDS,
        },
    ),
    max_size=4,
)
TALKS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": WORDS}),
    min_size=1,
    max_size=4,
)
ANYTHING = st.recursive(
    st.one_of(st.none(), NUMBERS, WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.one_of(WORDS, WORDS, TALKS, MESSAGES, ANYTHING)
LISTS = st.one_of(
    st.lists(NUMBERS, max_size=4),
    st.lists(TEXTS, max_size=4),
    st.dictionaries(WORDS, st.lists(NUMBERS, max_size=3), max_size=2),
    ANYTHING,
)
COLUMNS = {
    "prompt": TEXTS,
    "chosen": TEXTS,
    "rejected": TEXTS,
    "completion": TEXTS,
    "completions": LISTS,
    "messages": st.one_of(TALKS, MESSAGES, ANYTHING),
    "responses": st.lists(TEXTS, max_size=4) | ANYTHING,
    "rewards": LISTS,
    "ratings": LISTS,
    "ranks": LISTS,
    "labels": LISTS,
    "label": st.one_of(NUMBERS, WORDS),
    "text": TEXTS,
    "group_weight": NUMBERS,
    "answer": ANYTHING,
}
FORMATS = [
    ("prompt", "responses", "ranks"),
    ("prompt", "responses", "labels", "group_weight"),
    ("prompt", "responses", "ratings"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completions", "labels"),
    ("prompt", "completion", "label"),
    ("messages",),
    ("prompt", "answer"),
    ("text", "group_weight"),
]


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Mostly rows of one format, with columns missing, of other types, or no rows at all."""
    names = draw(st.sampled_from(FORMATS))
    shape = st.fixed_dictionaries(
        {name: COLUMNS[name] for name in names},
        optional={"id": WORDS, "rewards": COLUMNS["rewards"], "\ud800": WORDS},
    )
    return draw(st.lists(st.one_of(shape, shape, shape, ANYTHING), min_size=1, max_size=4))


def holds(groups: list[Group], report: ReadReport) -> None:
    """What is promised of everything that is read: it can be kept, written, converted, ordered."""
    assert report.kept == len(groups)
    assert report.read >= report.kept + sum(report.skipped.values())
    assert len({group.id for group in groups}) == len(groups)
    for group in groups:
        text = json.dumps(group.to_dict(), ensure_ascii=False)
        text.encode()
        assert json.dumps(Group.from_dict(json.loads(text)).to_dict(), ensure_ascii=False) == text
    for convert in (as_pairs, as_demonstrations, as_comparisons, as_prompts):
        converted = convert(groups)
        assert all(group.weight >= 0 for group in converted)
    assert all(group.chosen is not group.rejected for group in as_pairs(groups))
    Stream([groups], [1.0], seed=0).batch(0, 3)
    try:
        split_by_prompt(groups, 0.5, seed=0)
    except InputError:
        assert len({json.dumps(group.prompt) for group in groups}) >= 1


def read(file: Path, **options: Any) -> list[Group]:
    """Both ways to take bad rows; what is kept by either."""
    try:
        strict, _ = read_groups(str(file), **options)
    except InputError as error:
        one_line(error)
        strict = []
    try:
        kept, report = read_groups(str(file), on_bad_row="skip", **options)
    except InputError as error:
        one_line(error)
        assert not strict
        return []
    holds(kept, report)
    assert len(strict) in (0, len(kept))
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


@fuzzed(3)
@given(rows=rows(), indent=st.booleans(), where=st.sampled_from([".jsonl", ".json"]))
@example([{"prompt": "a", "answer": {"\ud800": 1}}], False, ".jsonl")
@example(
    [{"messages": '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]'}],
    False,
    ".jsonl",
)
def test_rows_in_json(folder: Path, tokenizer: Any, rows: list[Any], indent: bool, where: str) -> None:
    file = folder / f"rows{where}"
    if where == ".json":
        file.write_text(json.dumps(rows, indent=1 if indent else None), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    groups = read(file)
    for options in (
        {},
        {"on_long": "truncate", "max_prompt_tokens": 3, "max_tokens": 5},
        {"on_long": "skip", "max_tokens": 4},
    ):
        try:
            filled, report = tokenise(groups, tokenizer, **options)  # type: ignore[arg-type]
        except InputError as error:
            one_line(error)
            continue
        assert report.kept == len(filled)
        assert all(g.prompt_tokens for g in filled)
        assert all(r.mask is None or len(r.mask) == len(r.tokens or ()) for g in filled for r in g.responses)
        if filled and filled[0].responses:
            collate(filled[:1], layout="plain")


@fuzzed(3)
@given(data=st.binary(max_size=200), suffix=st.sampled_from(SUFFIXES))
@example(b"\xff\xfe{\x00}\x00", ".jsonl")
@example(b"[" * 100_000, ".json")
@example(b"[" * 100_000, ".jsonl")
@example(b'{"prompt": "a", "answer": ' + b"[" * 900 + b"]" * 900 + b"}", ".jsonl")
@example(b'{"prompt": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}", ".jsonl")
@example(b"\x0b[1]", ".json")
@example(b"9" * 5000, ".json")
@example(b'{"prompt": ' + b"9" * 5000 + b"}", ".jsonl")
@example(b'{"prompt": "\xed\xa0\x80"}', ".jsonl")
@example(b'"\n', ".csv")
@example(b"\xef\xbb\xbf", ".csv")
def test_any_bytes_under_any_name(folder: Path, data: bytes, suffix: str) -> None:
    file = folder / f"bytes{suffix}"
    file.write_bytes(data)
    read(file)


JSON_PIECES = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        '"prompt"',
        '"chosen"',
        '"a"',
        "1e999",
        "NaN",
        "-",
        "null",
        "\n",
        "\r\n",
        "\\ud800",
        "\\",
        " ",
        "\ufeff",
    ]
)


@fuzzed(2)
@given(pieces=st.lists(JSON_PIECES, max_size=30), suffix=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_text_that_is_nearly_a_file(folder: Path, pieces: list[str], suffix: str) -> None:
    file = folder / f"pieces{suffix}"
    file.write_text("".join(pieces), encoding="utf-8")
    read(file)


CELLS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ['["a", "b"]', "[", "1", "", "a\r\nb", '"']
)


@fuzzed(2)
@given(
    header=st.lists(
        st.sampled_from(["prompt", "chosen", "rejected", "responses", "ranks", "", "label"]), max_size=4
    ),
    cells=st.lists(st.lists(CELLS, max_size=5), max_size=4),
    cut=st.integers(0, 200),
    renamed=st.dictionaries(
        st.sampled_from(["prompt", "label", "x"]), st.sampled_from(["prompt", "answer"]), max_size=1
    ),
)
def test_rows_in_csv(
    folder: Path, header: list[str], cells: list[list[str]], cut: int, renamed: dict[str, str]
) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([header, *cells])
    file = folder / "rows.csv"
    file.write_text(text.getvalue()[: cut or None], encoding="utf-8", newline="")
    read(file, columns=renamed)


# ---------------------------------------------------------------- columnar files

TYPES = st.sampled_from(
    [
        pa.string(), pa.binary(), pa.int64(), pa.float32(), pa.bool_(), pa.timestamp("ns"), pa.timestamp("s"),
        pa.date64(), pa.time64("ns"), pa.duration("ns"), pa.decimal128(38, 10),
        pa.list_(pa.string()), pa.null(),
        pa.struct([("role", pa.string()), ("content", pa.string())]), pa.map_(pa.string(), pa.int64()),
        pa.dictionary(pa.int32(), pa.string()),
    ]
)  # fmt: skip


@st.composite
def columns(draw: st.DrawFn) -> pa.Array:
    """Eight rows of random bytes as a column of some type, valid or not."""
    kind = draw(TYPES)
    raw = draw(st.binary(min_size=128, max_size=128))
    if pa.types.is_primitive(kind):
        return pa.Array.from_buffers(kind, 8, [None, pa.py_buffer(raw)])
    if kind == pa.string():
        offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in range(0, 36, 4)))
        return pa.Array.from_buffers(kind, 8, [None, offsets, pa.py_buffer(raw)])
    return pa.nulls(8, kind)


@fuzzed(2)
@given(
    made=st.lists(columns(), min_size=1, max_size=3), names=st.permutations(["prompt", "completion", "text"])
)
def test_columns_of_every_type(folder: Path, made: list[pa.Array], names: list[str]) -> None:
    file = folder / "columns.parquet"
    try:
        pq.write_table(pa.table(dict(zip(names, made, strict=False))), file)
    except (pa.ArrowException, ValueError):
        return  # no such file can be written, so none is met
    read(file)


def test_one_broken_cell_is_one_bad_row(folder: Path) -> None:
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2, 3)))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"text": broken}), folder / "broken.parquet")
    groups, report = read_groups(str(folder / "broken.parquet"), on_bad_row="skip")
    assert [group.responses[0].text for group in groups] == ["a", "c"]
    assert report.skipped == {"unsupported value": 1}
    with pytest.raises(InputError, match=r"broken\.parquet, row 1"):
        read_groups(str(folder / "broken.parquet"))


@fuzzed(2)
@given(
    places=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10_000),
)
def test_a_damaged_columnar_file(folder: Path, places: list[tuple[int, int]], cut: int) -> None:
    whole = folder / "whole.parquet"
    if not whole.exists():
        pq.write_table(pa.table({"prompt": ["a", "b"] * 8, "completion": ["c", "d"] * 8}), whole)
    data = bytearray(whole.read_bytes())
    for place, byte in places:
        data[place % len(data)] = byte
    file = folder / "damaged.parquet"
    file.write_bytes(data[: cut % len(data) or None] if not places else data)
    read(file)


# ---------------------------------------------------------------- folders and hubs


@fuzzed()
@given(
    names=st.lists(
        st.sampled_from(["train", "test", "a", ".x", "train-0", "TRAIN", "sub/train", "sub/deep/b"]),
        max_size=4,
    ),
    split=st.sampled_from(["train", "test", "", "../x", "\0", "validation"]),
    limit=st.sampled_from([None, 1, 2]),
)
def test_folders(names: list[str], split: str, limit: int | None) -> None:
    with tempfile.TemporaryDirectory() as made:
        for name in names:
            file = Path(made) / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            tiny.write_rows(file, tiny.pairs(2))
        try:
            groups, report = read_groups(made, split=split, limit=limit)
        except InputError as error:
            one_line(error)
        else:
            holds(groups, report)
            assert all(Path(file).is_relative_to(made) for file in report.files)


@fuzzed()
@given(
    path=st.one_of(
        st.text(max_size=20),
        st.lists(st.sampled_from(["a", "..", "/", ":", "~", "\0", ".jsonl", "\ud800", "x" * 300])).map(
            "".join
        ),
    )
)
def test_any_text_as_a_path(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    assume(not os.path.isdir(path))

    def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError(f"no {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        read_groups(path)
    one_line(caught.value)


class Faulty:
    """A data set whose second row cannot be decoded."""

    def __iter__(self) -> Any:
        yield {"text": "a"}
        raise OSError("a picture that is none\nat 0x00")


def test_a_data_set_that_fails_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Faulty())
    found = hub_rows("owner/name", "train")
    assert next(found) == (0, {"text": "a"})
    with pytest.raises(InputError, match=r"owner/name \[train\] \(a picture that is none\)"):
        next(found)
