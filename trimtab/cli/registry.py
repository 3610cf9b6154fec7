"""``trimtab runs`` and ``trimtab verify``: parsing, and printing what the calls give.

On a terminal a table of the columns that fit; elsewhere lines with tabs, every column, nothing cut.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from trimtab.errors import InputError

NOTHING = "–"

RUNS = "list, filter and compare runs, and show where one comes from"
VERIFY = "check that a run's files, and what its model measures, are what they were"

COLUMNS = ("name", "method", "status", "steps", "scores", "model", "parent", "seconds", "date")
FIRST = ("name", "method", "status", "scores", "steps", "date", "seconds", "processes", "parent", "model")
"""Which columns a narrow terminal shows, the most wanted first."""


def runs(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """``trimtab runs [FOLDER …]``."""
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="where runs are, also below (default runs)"
    )
    parser.add_argument(
        *("--where", "-w"),
        action="append",
        default=[],
        metavar="CONDITION",
        help="only runs that meet it: KEY=VALUE, !=, <, <=, >, >=; a metric or a dotted key of lineage or "
        "configuration (method=dpo, train.lr<1e-5); may be given again",
    )
    parser.add_argument(
        "--sort", default="-date", metavar="KEY", help="order; -KEY the other way (default -date)"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N; 0 all")
    parser.add_argument("--columns", default="", metavar="KEY,KEY", help="show these keys beside the name")
    parser.add_argument(
        "--compare", nargs="+", metavar="RUN", help="what tells these runs apart, side by side"
    )
    parser.add_argument("--ancestry", metavar="RUN", help="the runs that a run stands on")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    options = parser.parse_args(arguments)
    one = [name for name in ("compare", "ancestry") if getattr(options, name)]
    listing = options.where or options.limit or options.columns or options.folders or options.sort != "-date"
    if len(one) > 1 or (one and listing):
        raise InputError(f"trimtab runs: --{one[0]} stands alone: leave the other options out")
    if options.compare:
        return _compare(options.compare, as_json=options.json)
    if options.ancestry:
        return _ancestry(options.ancestry, as_json=options.json)
    if options.limit < 0:
        raise InputError("trimtab runs: --limit is 0 or more")
    from trimtab.registry.runs import find_runs
    from trimtab.registry.select import ordered, processes, where

    found = find_runs(options.folders or ["runs"])
    chosen = ordered(where(found.runs, options.where), options.sort)
    chosen = chosen[: options.limit or None]
    if options.json:
        _print_json([run.to_dict() for run in chosen])
        return 0
    header = (
        ["name", *(key.strip() for key in options.columns.split(","))] if options.columns else list(COLUMNS)
    )
    if not options.columns and any(processes(run) > 1 for run in chosen):
        header.insert(header.index("seconds") + 1, "processes")
    rows = [[_cell(run, key) for key in header] for run in chosen]
    _table(header, rows, FIRST)
    for line in [*found.lines, *(run.problem for run in chosen if run.problem)]:
        _say(line)
    if not chosen:
        _say("no run meets the conditions" if found.runs else "no runs here")
    return 0


def verify(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """``trimtab verify RUN``: 0 where all holds, 1 where something differs."""
    parser.add_argument("run", metavar="RUN", help="folder of a run (it holds lineage.json)")
    parser.add_argument("--no-eval", action="store_true", help="leave the evaluation of the model out")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    options = parser.parse_args(arguments)
    from trimtab.studies.verify import verify as check

    found = check(options.run, evaluate=not options.no_eval)
    if options.json:
        _print_json(found.to_dict())
        return 0 if found.holds else 1
    checks = [*found.digests, *found.figures]
    wide = max((len(check.what) for check in checks), default=0)
    for one in checks:
        _say(_check_line(one, wide))
    bad = [one.what for one in checks if not one.holds]
    if bad:
        _say(f"{options.run}: differs: {', '.join(dict.fromkeys(bad))}")
    else:
        _say(f"{options.run}: holds ({sum(one.state == 'same' for one in checks)} things are the same)")
    return 1 if bad else 0


def _check_line(check: Any, wide: int) -> str:
    told = "  ".join(part for part in (check.path, check.detail) if part)
    return f"{check.state:<8} {check.what:<{wide}}  {told}".rstrip()


def _compare(folders: Sequence[str], *, as_json: bool) -> int:
    from trimtab.registry.differences import differences
    from trimtab.registry.runs import read_run

    if len(folders) < 2:
        raise InputError("trimtab runs: --compare takes two or more runs")
    found = differences([read_run(folder) for folder in folders])
    if as_json:
        _print_json(found.to_dict())
        return 0
    for title, rows in _parts(found):
        _say(f"{title}: {'' if rows else 'no difference'}".rstrip())
        if rows:
            _table(["", *found.names], [[key, *map(_shown, values)] for key, values in rows], ())
    for line in found.lines:
        _say(line)
    return 0


def _parts(found: Any) -> list[tuple[str, list[tuple[str, list[Any]]]]]:
    return [
        ("configuration", found.configuration),
        ("made of", found.lineage),
        ("scores", found.scores),
    ]


def _ancestry(folder: str, *, as_json: bool) -> int:
    from pathlib import Path

    from trimtab.registry.tree import ancestry

    root = ancestry(Path(folder))
    if as_json:
        _print_json(root.to_dict())
        return 0
    for line in _tree(root, ""):
        _say(line)
    return 0


def _tree(node: Any, indent: str) -> list[str]:
    marks = {"same": "", "note": f"  ({node.detail})"}
    marked = f"  {node.state.upper()}{f': {node.detail}' if node.detail else ''}"
    role = f"{node.role}: " if node.role else ""
    about = ", ".join(part for part in (node.method, node.status) if part)
    lines = [f"{indent}{role}{node.path}{f' ({about})' if about else ''}{marks.get(node.state, marked)}"]
    for inner in node.ancestors:
        lines += _tree(inner, indent + "  ")
    return lines


def _cell(run: Any, key: str) -> str:
    from trimtab.registry.select import telling, value

    if key == "scores":
        return ", ".join(f"{name} {number:.4g}" for name, number in telling(run).items()) or NOTHING
    found = value(run, key)
    if key == "date" and isinstance(found, str):
        return found[:16].replace("T", " ")
    if key == "seconds" and isinstance(found, int | float):
        return f"{found:.0f}" if found >= 100 else f"{found:.3g}"
    return _shown(found)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return NOTHING
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _printable(text: str) -> str:
    """A lineage may be anybody's: nothing in it moves the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def _table(header: list[str], rows: list[list[str]], wanted: Sequence[str]) -> None:
    """``wanted``: the columns that go first where they do not all fit; without it all are shown, wrapped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = [[_printable(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for row in [header, *rows] if rows else []:
            print("\t".join(row))
        return
    shown = _fitting(header, rows, wanted, console.width)
    table = Table(header_style="bold")
    for i in shown:
        numbers = all(_is_number(row[i]) for row in rows)
        table.add_column(header[i], justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_short(row[i])) for i in shown))
    if rows:
        console.print(table)


def _fitting(header: list[str], rows: list[list[str]], wanted: Sequence[str], room: int) -> list[int]:
    """Indices of the columns that fit side by side, in their own order; always the first two wanted."""
    if not wanted or any(name not in wanted for name in header):
        return list(range(len(header)))
    left, chosen = room - 1, list[int]()
    for name in wanted:
        if name not in header:
            continue
        i = header.index(name)
        width = max([len(name), *(len(row[i]) for row in rows)]) + 3
        if width <= left or len(chosen) < 2:
            chosen.append(i)
            left -= width
    return sorted(chosen)


def _short(text: str) -> str:
    """Twelve digits tell two digests apart."""
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_digest else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == NOTHING
    return True


def _say(line: str) -> None:
    print(_printable(line))


def _print_json(values: Any) -> None:
    from trimtab.registry.scores import finite

    print(json.dumps(finite(values), indent=2, default=str))
