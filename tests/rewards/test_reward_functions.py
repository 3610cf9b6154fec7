"""Built-in rewards against hand-read answers, and loading functions by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import Mixture, RewardConfig, RewardTerm
from trimtab.rewards.functions import build_mixture, load_function
from trimtab.rewards.numbers import find_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("3 + 4 is 7.\n#### 7 apples, not 9", "7"),
        ("#### 1\nthen\n#### -1,234.50", "-1234.5"),
        ("#### $18", "18"),
        ("####\n7", None),  # the line after the marker is not the answer
        ("7 ####", None),
        (r"so \boxed{\frac{3}{4}} of 12", "3/4"),
        (r"\boxed{1} or rather \boxed{\text{5 cm}}", "5"),
        (r"\boxed{x} with 3", None),
        (r"cut off in \boxed{3", "3"),
        ("The answer is 42.", "42"),
        ("first 5, then 1,234,567.89 in all", "1234567.89"),
        ("1,2,3", "3"),
        ("x = -5", "-5"),
        ("it is −5.", "-5"),  # the typographic minus
        ("10-5", "5"),
        ("- 3 apples", "3"),  # an item of a list
        ("-$5", "-5"),
        (".5", "1/2"),
        ("-.5", "-1/2"),
        ("3/4", "3/4"),
        ("1 / 3", "1/3"),
        (r"2\frac{1}{2}", "5/2"),
        (r"-\dfrac{1}{2}", "-1/2"),
        ("2e-3", "1/500"),
        ("50%", "50"),
        ("1/0", None),
        ("none at all", None),
        ("", None),
    ],
)
def test_which_number_counts(text: str, number: str | None) -> None:
    assert find_number(text) == (None if number is None else Fraction(number))


@given(st.integers(-(10**15), 10**15))
def test_integers_survive_every_way_of_writing(value: int) -> None:
    for text in (
        f"#### {value}",
        f"#### {value:,}",
        rf"\boxed{{{value}}}",
        f"the answer is {value}.",
        f"{value:.2f}",
    ):
        assert find_number(text) == value


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    find_number(text)
    find_number("#### " + text)
    find_number(r"\boxed{" + text + "}")


@pytest.mark.parametrize("piece", ["1", "1,234", "1/", "- ", r"\frac{1", r"\boxed{", "1 ", "9" * 399 + " "])
def test_endless_repetition_is_read_in_linear_time(piece: str) -> None:
    started = time.perf_counter()
    find_number(piece * (100_000 // len(piece)))
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("#### 42", "6*7=42\n#### 42", 1.0),
        ("#### 42.0", 42, 1.0),
        ("I think 1,000", "1000", 1.0),
        (r"\boxed{0.75}", "3/4", 1.0),
        ("#### 0.3333333", "1/3", 1.0),  # within 1e-6
        ("#### 0.33333", "1/3", 0.0),
        ("#### 1000001", "1000000", 0.0),  # a relative tolerance of 1e-6 would call these equal
        ("#### -42", "42", 0.0),
        ("no idea", "42", 0.0),
        ("9" * 5000, "42", 0.0),
    ],
)
def test_numeric(response: str, answer: Any, score: float) -> None:
    assert load_function("numeric")(prompt="", response=response, answer=answer) == score


def test_numeric_parameters() -> None:
    assert load_function("numeric", {"tolerance": 0.5})(prompt="", response="3.2", answer="3") == 1.0
    assert load_function("numeric", {"column": "gold"})(prompt="", response="3", answer="4", gold=3) == 1.0
    assert load_function("numeric")(prompt="", response="3", answer=None, reference=3) == 1.0


def test_exact_match() -> None:
    exact = load_function("exact_match")
    assert exact(prompt="", response=" Paris\n", answer="Paris") == 1.0
    assert exact(prompt="", response="paris", answer="Paris") == 0.0
    assert exact(prompt="", response="42", reference=42) == 1.0
    assert (
        load_function("exact_match", {"ignore_case": True})(prompt="", response="PARIS", answer="Paris")
        == 1.0
    )


def test_format() -> None:
    marked = load_function("format", {"pattern": "#### -?[0-9]"})
    assert marked(prompt="", response="so\n#### -3\n") == 1.0
    assert marked(prompt="", response="#### none") == 0.0
    whole = load_function("format", {"pattern": "<a>.*</a>", "full": True})
    assert whole(prompt="", response="<a>x\ny</a>") == 1.0
    assert whole(prompt="", response="<a>x</a> more") == 0.0


@pytest.mark.parametrize(
    ("words", "score"), [(0, 0.0), (10, 0.0), (11, -0.25), (13, -0.75), (14, -1.0), (99, -1.0)]
)
def test_length(words: int, score: float) -> None:
    penalty = load_function("length", {"limit": 10, "span": 4})
    assert penalty(prompt="", response="w " * words) == score


@pytest.mark.parametrize(
    ("words", "score"), [(10, 0.0), (8, 0.0), (7, -0.25), (4, -1.0), (0, -1.0), (12, -0.5)]
)
def test_length_from_below(words: int, score: float) -> None:
    """0 from 8 to 10; below 8 a quarter a word."""
    penalty = load_function("length", {"limit": 10, "span": 4, "at_least": 8})
    assert penalty(prompt="", response="w " * words) == score


@pytest.mark.parametrize(
    ("response", "args", "score"),
    [
        # a b c, b c a, c a b, a b c: four trigrams, three of them distinct. Whatever the case.
        ("a b c a b c", {}, -0.25),
        ("a b c A B C", {}, -0.25),
        ("a b c a b", {}, 0.0),
        ("a b c a b c", {"n": 1}, -0.5),
        # a b twice, b a: three bigrams, two distinct. A mean over words would give 1/2.
        ("a b a b", {"n": 2}, -1 / 3),
        ("no no no no no", {}, -2 / 3),
        ("abab", {"n": 2, "unit": "characters"}, -1 / 3),
        ("a b", {}, 0.0),
        ("", {}, 0.0),
    ],
)
def test_repetition(response: str, args: dict[str, Any], score: float) -> None:
    assert load_function("repetition", args)(prompt="p p p p", response=response) == pytest.approx(score)


def test_length_in_characters() -> None:
    penalty = load_function("length", {"limit": 2, "span": 2, "unit": "characters"})
    assert penalty(prompt="", response="abc") == -0.5


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"so $\boxed{0.75}$", r"\frac{3}{4}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x-1)^2}", "x^2+2x+1", 0.0),
        ("#### 42", "6*7\n#### 42", 1.0),
        ("no idea", "12", 0.0),
    ],
)
def test_math(response: str, answer: str, score: float) -> None:
    pytest.importorskip("math_verify")
    assert load_function("math")(prompt="", response=response, answer=answer) == score


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "reward 'numeric' on a:1: ValueError: the row has no column answer or reference; it has none"),
        ({"gold": 1}, "it has gold"),
        ({"answer": "many"}, "no number in the row's answer 'many'"),
    ],
)
def test_a_row_without_an_answer_is_named(columns: dict[str, Any], message: str) -> None:
    one = Group(id="a:1", responses=[Response(text="4")], columns=columns)
    with pytest.raises(InputError, match=message):
        Mixture([RewardTerm("numeric", 1.0, load_function("numeric"))]).score([one])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("numerik", {}, "not built in: did you mean 'numeric'"),
        ("zzz", {}, "choose from exact_match, numeric, math, format, length"),
        ("reward.py", {}, r"write path/to/file\.py:function"),
        (":f", {}, "write package.module:function"),
        ("format", {}, "missing a required argument: 'pattern'"),
        ("format", {"pattern": "("}, "is not valid"),
        ("format", {"pattern": 3}, "is not valid"),
        ("numeric", {"tolerence": 1}, "'tolerence'"),
        ("numeric", {"tolerance": "small"}, "tolerance must be"),
        ("numeric", {"tolerance": -1}, "tolerance must be"),
        ("length", {"limit": 5, "span": 0}, "span >= 1"),
        ("length", {"limit": 5, "span": 1, "unit": "tokens"}, "unit must be"),
        ("length", {"limit": 5, "span": 1, "at_least": 6}, "at_least must be a whole number from 0 to limit"),
        ("repetition", {"n": 0}, "whole number n >= 1"),
        ("repetition", {"n": True}, "whole number n >= 1"),
        ("repetition", {"n": 2.0}, "whole number n >= 1"),
        ("repetition", {"unit": "tokens"}, "unit must be words or characters"),
        ("repetition", {"max": 1}, "unexpected keyword argument 'max'"),
        ("no_such_package_here:f", {}, "no module 'no_such_package_here'"),
        ("json:dmups", {}, "json has no 'dmups': did you mean 'dumps'"),
        ("json.decoder:NaN", {}, "NaN is a float, not a function"),
        ("textwrap:dedent", {}, "unexpected keyword argument 'prompt'"),
        ("nowhere/reward.py:f", {}, "there is no file"),
    ],
)
def test_bad_names_and_parameters(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_function(name, args)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(code: str) -> str:
        (tmp_path / "json.py").write_text(code)  # a name that must not replace Python's own module
        return f"{tmp_path}/json.py"

    return write


def test_a_function_from_a_file(write: Callable[[str], str]) -> None:
    path = write("def shouts(prompt, response, *, bonus=0.0):\n    return response.isupper() + bonus\n")
    config = RewardConfig.model_validate({"terms": [{"name": f"{path}:shouts", "args": {"bonus": 0.5}}]})
    one = Group(id="a:1", responses=[Response(text="HEY"), Response(text="hey")], columns={"other": 1})
    build_mixture(config).score([one])
    assert [r.reward_terms for r in one.responses] == [{"shouts": 1.5}, {"shouts": 0.5}]
    import json

    assert json.loads("1") == 1


def test_a_parameter_never_overrides_a_column(write: Callable[[str], str]) -> None:
    function = load_function(f"{write('def f(prompt, response, bonus): return bonus')}:f", {"bonus": 1})
    one = Group(id="a:1", responses=[Response(text="x")], columns={"bonus": 2})
    with pytest.raises(InputError, match="both a column of the row and one of the term's args"):
        Mixture([RewardTerm("f", 1.0, function)]).score([one])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("x = 1\ny = 1 / 0", r"ZeroDivisionError: division by zero \(.*json\.py:2\)"),
        ("import no_such_package_here", "no_such_package_here"),
        ("def g(prompt, response): return 0", "has no 'f': choose from g"),
        ("f = 3", "f is a int, not a function"),
        ("def f(text): return 0", "unexpected keyword argument 'prompt'"),
    ],
)
def test_broken_files_are_named(write: Callable[[str], str], code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_function(f"{write(code)}:f")


def test_numeric_works_in_any_thread() -> None:
    scores: list[float] = []
    worker = threading.Thread(
        target=lambda: scores.append(load_function("numeric")(prompt="", response="4", answer="4"))
    )
    worker.start()
    worker.join()
    assert scores == [1.0]
