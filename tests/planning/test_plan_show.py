"""How a plan is written: figures with units, bars that add up, output that is read without colour, SVG."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from trimtab.errors import InputError
from trimtab.planning.advice import Advice, Change
from trimtab.planning.look import (
    COLOURS,
    GIB,
    LETTERS,
    MIB,
    _luminance,
    count,
    duration,
    fact,
    in_unit,
    ink,
    kinds_of,
    money,
    operations,
    read_size,
    size,
)
from trimtab.planning.result import KINDS, Memory, Part, Phase, PhaseName, Plan, Time, Work
from trimtab.planning.showing.bars import bars, cells_of
from trimtab.planning.showing.show import show_advice, show_plan, show_plans, verdict
from trimtab.planning.showing.svg import draw, folded, ticks

SVG = "{http://www.w3.org/2000/svg}"


def phase(name: PhaseName, *parts: tuple[str, str, float]) -> Phase:
    return Phase(name, tuple(Part(role, kind, held * GIB) for role, kind, held in parts))


def a_plan(available: float | None = 24.0, **changed: object) -> Plan:
    """Loading 3 GiB, sampling 10, training 20, of two models."""
    memory = Memory(
        (
            phase("loading", ("policy", "weights", 1), ("reference", "weights", 1), ("", "framework", 1)),
            phase("sampling", ("policy", "weights", 1), ("reference", "weights", 1), ("policy", "cache", 8)),
            phase(
                "training",
                ("policy", "weights", 1),
                ("reference", "weights", 1),
                ("policy", "optimiser", 8),
                ("policy", "activations", 9.998),
                ("", "workspace", 0.002),
            ),
        )
    )
    works = (
        Work("sampling", 3.1e13, 8e12, 4.2, "memory"),
        Work("training", 1.2e14, 9e11, 1.3),
        Work("reference once", 5e15, 1e12, 90.0),
    )
    time = Time("H100-SXM", works, 5.5, 92.0, 5.5 * 300 + 92, 19_660_800, 9_830_400, 8, 2.5, 9.68)
    plan = Plan(
        "grpo of qwen3-0.6b",
        memory,
        time,
        None if available is None else available * GIB,
        {"parameters": 596_049_920, "models in memory": ["policy", "reference"], "adapter": None},
        ("lengths are the limits",),
    )
    return replace(plan, **changed)  # type: ignore[arg-type]


def shown(plan: Plan, width: int = 80) -> str:
    """What a pipe gets."""
    file = io.StringIO()
    show_plan(plan, Console(file=file, width=width))
    return file.getvalue()


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("bytes", "text"),
    [
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (1.5 * GIB, "1.50 GiB"),
        (24 * GIB, "24.0 GiB"),
        (1023.9 * MIB, "1.00 GiB"),  # not "1,024 MiB"
        (999 * MIB, "999 MiB"),
        (140 * GIB, "140 GiB"),
        (9.999 * GIB, "10.0 GiB"),
        (3 * 2**40, "3.00 TiB"),
    ],
)
def test_sizes_have_three_figures(bytes: float, text: str) -> None:
    assert size(bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0121, "12.1 ms"),
        (3.21, "3.21 s"),
        (59.96, "1 min 00 s"),  # not "60.0 s"
        (250, "4 min 10 s"),
        (3599.6, "1 h 00 min"),  # not "59 min 60 s", nor "60 min 00 s"
        (2 * 3600 + 5 * 60, "2 h 05 min"),
        (76 * 3600, "3 d 4 h"),
        (10 * 365.25 * 86400, "10 years"),
        (float("inf"), "for ever"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert count(596_049_920) == "596 M"
    assert count(999_900_000) == "1.00 B"  # not "1,000 M"
    assert count(65_536) == "65,536"
    assert operations(3.1e13) == "31.0 TFLOP"
    assert operations(2.5e9) == "2.50 GFLOP"
    assert operations(1000) == "1,000 FLOP"
    assert (money(1234.5), money(0.0421)) == ("1,234.50", "0.042")


def test_small_shares_are_not_nothing() -> None:
    assert in_unit(0, GIB) == "-"
    assert in_unit(MIB, GIB) == "<0.01"
    assert in_unit(1.5 * GIB, GIB) == "1.50"
    assert in_unit(1.25 * MIB, MIB) == "1.2"


def test_facts_are_words() -> None:
    assert fact(True) == "yes"
    assert fact(["policy", "critic"]) == "policy, critic"
    assert fact({"prompt": 512}) == "prompt 512"
    assert fact("a\x1b[2Jb") == "a [2Jb"


@pytest.mark.parametrize(
    ("text", "bytes"),
    [
        ("24GiB", 24 * GIB),
        ("24", 24 * GIB),
        ("24g", 24 * GIB),
        ("24 GB", 24e9),
        ("1.5TiB", 1.5 * 2**40),
        ("512MiB", 512 * MIB),
        ("512 mb", 512e6),
    ],
)
def test_sizes_are_read(text: str, bytes: float) -> None:
    assert read_size(text, "--memory") == bytes


@pytest.mark.parametrize(
    "text", ["", "much", "24GiBs", "0", "-5GiB", "1e3", "nan", "24 G i B", "1.2.3", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        read_size(text, "--memory")


# ---------------------------------------------------------------- bars


def test_every_kind_has_a_letter_and_a_colour_of_its_own() -> None:
    assert len(set(LETTERS.values())) == len(set(COLOURS.values())) == len(KINDS)
    for kind in KINDS:
        bright, text = (_luminance(colour) for colour in (COLOURS[kind], ink(kind)))
        assert (max(bright, text) + 0.05) / (min(bright, text) + 0.05) >= 4.5  # WCAG AA


def test_a_bar_ends_where_its_sum_does() -> None:
    """Ten kinds of 0.26 of a cell each: rounded one by one they would vanish, and the bar with them."""
    assert sum(n for _, n in cells_of(dict.fromkeys(KINDS[:10], 0.26), 10, 10)) == 3


def test_roles_of_a_kind_are_one_segment() -> None:
    assert kinds_of(a_plan().memory.phases[1]) == {"weights": 2 * GIB, "cache": 8 * GIB}


def rows_of(plan: Plan) -> list[tuple[str, Phase]]:
    return [(one.name, one) for one in plan.memory.phases]


def test_the_limit_is_a_line_at_its_place() -> None:
    """20 of 24 GiB fill 5 / 6 of the room, whose end is the limit."""
    console = Console(file=io.StringIO(), width=80)
    *lines, note = [line.plain for line in bars(rows_of(a_plan()), 24 * GIB, console)]
    room = 80 - len("sampling") - 14
    columns = {line.index("|") for line in lines}
    assert columns == {note.index("^")} == {len("  sampling ") + room}
    filled = lines[2][len("  sampling ") :].split("|")[0].rstrip()
    assert len(filled) == round(room * 20 / 24)
    assert {char: filled.count(char) for char in "WOAK"} == {"W": 5, "O": 19, "A": 24, "K": 0}
    assert "24.0 GiB available ^" in note


def test_what_does_not_fit_reaches_over_the_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    lines = [line.plain for line in bars(rows_of(a_plan()), 10 * GIB, console)]
    before, behind = lines[2].split("|")
    assert before.endswith("O")
    assert behind.startswith("A")
    assert lines[-1].index("^") == lines[2].index("|")
    assert lines[1].split("|")[1].split() == ["10.0", "GiB"]  # exactly full: nothing behind the line


def test_a_far_limit_is_said() -> None:
    """Bars to the scale of 1,000 GiB would be stubs of one cell."""
    console = Console(file=io.StringIO(), width=80)
    *lines, note = [line.plain for line in bars(rows_of(a_plan()), 1000 * GIB, console)]
    assert "|" not in "".join(lines)
    assert "1,000 GiB" in note
    assert lines[2].count("A") > 20


@pytest.mark.parametrize("width", [70, 80, 120, 200])
@pytest.mark.parametrize("available", [None, 5.0, 20.0, 24.0, 59.0, 500.0])
def test_nothing_is_wider_than_the_terminal(width: int, available: float | None) -> None:
    for line in shown(a_plan(available), width).splitlines():
        assert len(line) <= width, line


def test_a_narrow_terminal_loses_no_figure() -> None:
    """rich would cut "training" to "trai…", which is no ASCII either."""
    text = shown(a_plan(), 40)
    assert text.isascii()
    for word in ("sampling", "training", "optimiser", "120 TFLOP", "10.00"):
        assert word in text
    assert all(len(line) <= 40 for line in text.splitlines() if "|" in line or line.startswith("warning"))


# ---------------------------------------------------------------- the terminal


def test_a_pipe_gets_ascii_without_colours() -> None:
    text = shown(a_plan())
    assert text.isascii()
    assert "\x1b" not in text


def test_a_terminal_gets_colours_and_the_same_letters() -> None:
    file = io.StringIO()
    show_plan(a_plan(), Console(file=file, width=80, force_terminal=True, color_system="truecolor"))
    text = file.getvalue()
    assert "48;2;68;119;170" in text  # weights, #4477aa
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == shown(a_plan())


def test_the_table_holds_every_byte() -> None:
    lines = shown(a_plan()).splitlines()
    cells = {line[:18].strip(): line[18:].split() for line in lines if line}
    assert cells["W weights"] == ["2.00", "2.00", "2.00"]
    assert cells["A activations"] == ["-", "-", "10.00"]
    assert cells["K workspace"] == ["-", "-", "<0.01"]
    assert cells["all"] == ["3.00", "10.00", "20.00"]
    assert cells["policy"] == ["1.00", "9.00", "19.00"]
    assert cells["reference"] == ["1.00", "1.00", "1.00"]
    assert cells["of no model"] == ["1.00", "-", "<0.01"]


def test_one_model_is_not_listed_by_model() -> None:
    plan = a_plan(memory=Memory((phase("training", ("policy", "weights", 1)),)))
    assert "of no model" not in shown(plan)
    assert shown(plan).count("policy") == 1  # among the facts


def test_order_and_words() -> None:
    text = shown(a_plan())
    places = [
        text.index(word)
        for word in (
            "grpo of",
            "parameters 596 M",
            "warning: lengths",
            "fits: peak",
            "W weights",
            "a step",
            "cost",
        )
    ]
    assert places == sorted(places)
    assert "adapter" not in text  # a fact that is not there
    assert "reference (once)" in text
    assert "300 steps; 1 min 32 s of the run" in text
    assert "8 x H100-SXM" in text
    assert "19.7 M tokens are learned from" in text
    assert "9.83 M are generated" in text
    assert "cost 9.68 at 2.50" in text


@pytest.mark.parametrize(
    ("available", "start"),
    [
        (None, "peak 20.0 GiB (training); nobody knows"),
        (30.0, "fits: peak 20.0 GiB (training), 67 % of 30.0 GiB"),
        (20.0, "fits, if barely: peak 20.0 GiB"),
        (22.0, "fits, if barely: peak 20.0 GiB"),
        (19.0, "does not fit: peak 20.0 GiB (training), 1.00 GiB over the 19.0 GiB"),
    ],
)
def test_the_verdict(available: float | None, start: str) -> None:
    assert verdict(a_plan(available)).startswith(start)


def test_a_name_moves_no_cursor_and_is_no_markup() -> None:
    text = shown(a_plan(title="x\x1b[2J[bold]y", warnings=("[red]z",)))
    assert "[bold]y" in text
    assert "[red]z" in text
    assert "\x1b" not in text


def test_several_methods_are_a_row_each() -> None:
    file = io.StringIO()
    plans = {
        "ppo": a_plan(10.0),
        "sft": a_plan(10.0, memory=Memory((phase("update", ("policy", "weights", 1)),))),
    }
    show_plans("two methods", plans, {"kto": "the context is 512"}, Console(file=file, width=80))
    text = file.getvalue()
    assert text.isascii()
    assert re.search(r"ppo +20\.0 GiB +training +no +5\.50 s", text)
    assert re.search(r"sft +1\.00 GiB +update +yes", text)
    assert text.count("lengths are the limits") == 1
    assert "kto: no plan: the context is 512" in text
    assert "W weights" in text
    assert "C cache" not in text  # sampling is not the fullest phase


def test_advice_is_options_with_what_they_save() -> None:
    file = io.StringIO()
    changes = (
        Change({"train.micro_batch_tokens": 2048}, 3 * GIB, "training", "same", "fewer tokens at once"),
        Change({"adapter.kind": "lora"}, GIB, "training", "another", "only an adapter learns"),
    )
    show_advice(Advice(changes, a_plan(), True), Console(file=file, width=80))
    text = " ".join(file.getvalue().split())
    assert "--train.micro_batch_tokens 2,048" not in text  # as it is typed, not as it is read
    assert "--train.micro_batch_tokens 2048 (training -3.00 GiB; same result)" in text
    assert "--train.micro_batch_tokens 2048 --adapter.kind lora" in text
    assert "peak of 20.0 GiB" in text


# ---------------------------------------------------------------- SVG


def boxes(root: ElementTree.Element) -> Mapping[str, tuple[float, float, float, float]]:
    """Where each text stands: left, top, right, bottom, taken as wide as it can be."""
    found = {}
    for i, text in enumerate(root.iter(f"{SVG}text")):
        words, classes = text.text or "", (text.get("class") or "").split()
        points = 19 if "title" in classes else 13
        wide = len(words) * points * 0.5
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        left = x - wide if "end" in classes else x - wide / 2 if {"middle", "letter"} & set(classes) else x
        found[f"{i} {words}"] = (left, y - points * 0.75, left + wide, y + 2)
    return found


@pytest.mark.parametrize("available", [None, 0.1, 10.0, 19.9, 24.0, 59.0, 500.0])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_the_svg_is_sound_and_nothing_overlaps(available: float | None, scale: float) -> None:
    phases = [
        (
            f"{one.name} <&> of a rather long name",
            Phase(one.name, tuple(replace(p, bytes=p.bytes * scale) for p in one.parts)),
        )
        for one in a_plan().memory.phases
    ]
    limit = None if available is None else available * scale * GIB
    root = ElementTree.fromstring(draw('a "title" <&>\x00', [verdict(a_plan())] * 3, phases, limit))
    width, height = (float(root.get(name, 0)) for name in ("width", "height"))
    places = boxes(root)
    for name, (left, top, right, bottom) in places.items():
        assert left >= 0, name
        assert right <= width, name
        assert top >= 0, name
        assert bottom <= height, name
    for (one, a), (other, b) in itertools.combinations(places.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one!r} and {other!r}"


def test_the_svg_is_to_scale() -> None:
    root = ElementTree.fromstring(draw("t", [], rows_of(a_plan()), 24 * GIB))
    widths: dict[float, float] = {}
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") == "part":
            y = float(rect.get("y", 0))
            widths[y] = widths.get(y, 0.0) + float(rect.get("width", 0))
    loading, sampling, training = (widths[y] for y in sorted(widths))
    assert sampling / loading == pytest.approx(10 / 3, rel=1e-3)
    assert training / loading == pytest.approx(20 / 3, rel=1e-3)
    first = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "part")
    line = next(path for path in root.iter(f"{SVG}path") if path.get("class") == "limit")
    x = float(line.get("d", "").removeprefix("M").split()[0])
    assert (x - float(first.get("x", 0))) / training == pytest.approx(24 / 20, rel=1e-3)


def test_the_svg_stands_alone() -> None:
    text = draw("t", [], rows_of(a_plan()), None)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "<script" not in text
    assert "limit" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL)


def test_ticks_are_round_and_few() -> None:
    for reach in (1e6, 7e8, 3e9, 2.4e10, 1e12, 5e13):
        values, unit = ticks(reach)
        assert 3 <= len(values) <= 8
        assert all(value <= reach * (1 + 1e-9) for value in values)
        step = (values[1] - values[0]) / unit
        assert f"{step:.0e}"[0] in "125"


def test_long_notes_are_folded() -> None:
    assert folded("one two three", 8 * 13 * 0.58, 13) == ["one two", "three"]
    assert folded("", 100, 13) == []
    assert all(len(line) <= 8 for line in folded("x" * 30, 8 * 13 * 0.58, 13))
