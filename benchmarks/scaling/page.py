"""``python -m benchmarks scaling``: writes the tables of docs/scaling.md, which the planner works out.

The page asks for a table with ``<!-- scaling: NAME -->`` and ``<!-- end scaling -->`` on lines of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.scaling import example
from benchmarks.scaling.tables import TABLES

PAGE = ROOT / "docs" / "scaling.md"
MARK = re.compile(r"(<!-- scaling: ([\w-]+) -->\n).*?(<!-- end scaling -->)", re.DOTALL)
MADE: dict[str, Callable[[], str]] = {
    **TABLES,
    "example-memory": example.all_of_memory,
    "example-time": lambda: example.shown(example.time()),
}


def fill(page: str) -> str:
    """The page with today's tables between its marks."""
    return MARK.sub(lambda mark: f"{mark[1]}\n{MADE[mark[2]]()}\n{mark[3]}", page)


def write(page: Path = PAGE) -> bool:
    """Fill the page in place; whether it changed."""
    text = page.read_text(encoding="utf-8")
    new = fill(text)
    if new != text:
        page.write_text(new, encoding="utf-8")
    return new != text
