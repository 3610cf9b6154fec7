"""Formulas that are written down give what they give when they are computed at once."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.planning import explorer
from trimtab.planning.batch import batch_of
from trimtab.planning.job import Layout
from trimtab.planning.numbers import ceil, choose, floor, largest, smallest
from trimtab.planning.trace import Quantity, Table, evaluate

NAMES = ("a", "b", "c")


def computed(formula: Callable[..., Any], **inputs: float) -> Any:
    """The formula's value by way of its written form, through JSON as the page reads it."""
    table = Table()
    found = formula(*(table.name(name) for name in inputs))
    written, [place] = table.written([found], list(inputs))
    return evaluate(json.loads(json.dumps(written)), inputs)[place]


def test_a_formula_by_hand() -> None:
    # Padded to 64 and halved: 100 → 128 → 64. Without ceil it would be 50.
    assert computed(lambda a: ceil(a / 64) * 64 / 2, a=100) == 64
    assert computed(lambda a, b: largest(a, b, 7) - smallest(a, b, 7), a=5, b=9) == 4
    assert computed(lambda a: choose(a - 4, 10, 20), a=4) == 20, "choose takes the first only above 0"
    assert computed(lambda a: 100 // a + 2**a - (-a), a=7) == 14 + 128 + 7
    assert computed(lambda a: 7 - a, a=2) == 5, "not a − 7"
    assert computed(lambda a: 7 / a, a=2) == 3.5


@pytest.mark.parametrize(
    "asked",
    [
        *(bool, int, float, round, abs, math.sqrt, range),
        *(lambda a: a == 0, lambda a: a != 0, lambda a: a < 1, lambda a: a >= 1),
        *(lambda a: max(a, 1), lambda a: a % 2, lambda a: a or 1, lambda a: 1 if a else 2),
    ],
)
def test_a_quantity_has_no_value(asked: Callable[[Any], Any]) -> None:
    table = Table()
    with pytest.raises(TypeError, match="asks for the value of \\(widest × 2\\)"):
        asked(table.name("widest") * 2)


def test_pythons_own_rounding_is_written_down_too() -> None:
    assert computed(lambda a: math.ceil(a / 2) + math.floor(a / 2), a=5) == 5


def test_each_expression_is_kept_once() -> None:
    table = Table()
    a, b = table.name("a"), table.name("b")
    assert a * b + 1 is 1 + b * a
    assert a - b is not b - a
    count = len(table.nodes)
    assert ceil(ceil(a * b)) is ceil(a * b)
    assert len(table.nodes) == count + 1
    assert table.name("a") is a


def test_what_changes_nothing_is_left_out() -> None:
    table = Table()
    a = table.name("a")
    for same in (a + 0, 0 + a, a - 0, a * 1, 1 * a, a / 1, a**1, +a, largest(a, a), choose(1, a, 3)):
        assert same is a
    assert a * 0 == 0
    assert 0 / a == 0
    assert choose(a, 5, 5) == 5
    assert sum([a], 0) is a
    assert isinstance(0 - a, Quantity), "0 − a is not a"
    assert isinstance(1 / a, Quantity), "1 ÷ a is not a"


def test_only_what_is_wanted_is_written() -> None:
    table = Table()
    a, b = table.name("a"), table.name("b")
    kept, _ = a + 2, b**3
    written, places = table.written([kept, 7], ["a", "b"])
    assert len(written["operations"]) == 4, "a, 2, a + 2 and 7"
    assert [evaluate(written, {"a": 1, "b": 0})[place] for place in places] == [3, 7]


def test_tables_are_not_mixed_and_infinity_is_no_constant() -> None:
    a, b = Table().name("a"), Table().name("b")
    with pytest.raises(ValueError, match="another table"):
        a + b
    with pytest.raises(ValueError, match="finite"):
        a * math.inf
    with pytest.raises(ValueError, match="finite"):
        a + math.nan


def test_a_deep_formula_is_named_in_short() -> None:
    table = Table()
    x = table.name("x")
    for _ in range(3000):
        x = (x + 1) * x
    assert len(str(x)) <= 160
    written, [place] = table.written([x], ["x"])
    assert evaluate(written, {"x": 0})[place] == 0


def random_formula(rng: random.Random, leaves: list[Any], depth: int) -> Any:
    """Of everything a plan may do; divisors and exponents stay away from 0."""
    if depth == 0:
        return rng.choice([*leaves, rng.randint(0, 9), rng.choice([0.5, 1, 2.25])])
    x, y, z = (random_formula(rng, leaves, depth - 1) for _ in range(3))
    return rng.choice(
        [
            *(lambda: x + y, lambda: x - y, lambda: x * y, lambda: x / (largest(y, 0) + 1)),
            *(lambda: x // (largest(y, 0) + 0.25), lambda: smallest(largest(x, 0), 3) ** 2),
            *(lambda: ceil(x), lambda: floor(x), lambda: largest(x, y), lambda: smallest(x, y)),
            lambda: choose(x, y, z),
        ]
    )()


def traced(seed: int) -> tuple[dict[str, Any], list[int], dict[str, float], list[float]]:
    """Forty random formulas written down, and their values computed at once."""
    rng = random.Random(seed)
    inputs = {name: rng.choice([rng.randint(0, 5000), rng.random() * 100]) for name in NAMES}
    table = Table()
    names: list[Any] = [table.name(name) for name in NAMES]
    seeds = [rng.random() for _ in range(40)]
    formulas = [random_formula(random.Random(s), names, 4) for s in seeds]
    plain = [random_formula(random.Random(s), list(inputs.values()), 4) for s in seeds]
    written, places = table.written(formulas, NAMES)
    return written, places, inputs, plain


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**9))
def test_random_formulas_are_the_same_number(seed: int) -> None:
    written, places, inputs, plain = traced(seed)
    values = evaluate(written, inputs)
    assert [values[place] for place in places] == plain


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**9))
def test_a_batch_is_written_down(seed: int) -> None:
    rng = random.Random(seed)
    sizes: dict[str, Any] = {
        name: rng.randint(1, most)
        for name, most in [("prompt", 900), ("response", 900), ("groups", 40), ("responses", 9)]
    }
    sizes |= {"micro_batch_tokens": rng.randint(2000, 20000), "layers": rng.randint(1, 40)}
    layouts: tuple[Layout, ...] = ("packed", "tree", "plain")
    how: dict[str, Any] = {"layout": rng.choice(layouts), "divisible": rng.random() < 0.5}
    plain = batch_of(**sizes, **how)
    table = Table()
    quantities: dict[str, Any] = {name: table.name(name) for name in sizes}
    found = batch_of(**quantities, **how)
    fields = ("tokens", "scores", "micro_batches", "widest", "widest_targets", "rows", "forward_times")
    written, places = table.written([getattr(found, field) for field in fields], list(sizes))
    values = evaluate(written, sizes)
    assert [values[place] for place in places] == [getattr(plain, field) for field in fields]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's evaluator in")
def test_the_pages_evaluator_agrees(tmp_path: Path) -> None:
    """The same written formulas, computed by explorer/evaluate.js."""
    cases = [traced(seed) for seed in range(60)]
    source = (Path(explorer.__file__).parent / "evaluate.js").read_text(encoding="utf-8")
    told = json.dumps([[written, inputs] for written, _, inputs, _ in cases])
    script = tmp_path / "run.js"
    script.write_text(
        f"{source}\nconsole.log(JSON.stringify({told}.map(([table, inputs]) => evaluate(table, inputs))));"
    )
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, check=True, timeout=60)
    for (_, places, _, plain), values in zip(cases, json.loads(done.stdout), strict=True):
        assert [values[place] for place in places] == pytest.approx(plain, rel=1e-12)
