"""What docs/plan-accuracy.md shows of a result of ``plan``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> list[str]:
    """Setting by setting, then method by method: planned over measured, less 1."""
    rows = [row for row in result["rows"] if "error" in row]
    failed = [row for row in result["rows"] if "error" not in row]
    said = result["summary"]
    lines = [f"Measured so far: {said['rows']} of {said['cases']} cases.\n"] * (said["rows"] < said["cases"])
    lines += [
        f"{said['counted']} of {said['rows']} runs held 1 GB or more above the baseline. Of these the median "
        f"error is **{said['median_error']:.1%}** and the worst **{said['worst_error']:.1%}**.\n",
        "| setting | runs | measured, MB | median error | lowest | highest |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        _line(setting, [r for r in rows if _setting(r) == setting]) for setting in _order(rows, _setting)
    ]
    lines += ["", "| method | runs | measured, MB | median error | lowest | highest |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    lines += [_line(method, [r for r in rows if r["method"] == method]) for method in _order(rows, _method)]
    lines += [f"\n{row['case']}: {row.get('failed')}" for row in failed]
    counts = Counter(row["cpu"] for row in rows)
    if len(counts) > 1:
        of = " and ".join(f"{count} on {cpu}" for cpu, count in counts.items())
        lines.append(f"\nRuns were measured on several machines: {of}.")
    return [*lines, ""]


def _setting(row: Row) -> str:
    return str(row["case"]).split(", ", 1)[1]


def _method(row: Row) -> str:
    return str(row["method"])


def _order(rows: Sequence[Row], of: Any) -> list[str]:
    return list(dict.fromkeys(of(row) for row in rows))


def _line(title: str, rows: Sequence[Row]) -> str:
    errors, peaks = [row["error"] for row in rows], [row["measured_mb"] for row in rows]
    middle = statistics.median(abs(error) for error in errors)
    shown = f"{min(peaks):,} to {max(peaks):,}"
    return f"| {title} | {len(rows)} | {shown} | {middle:.1%} | {min(errors):+.1%} | {max(errors):+.1%} |"


def step_tables(result: dict[str, Any]) -> list[str]:
    """Case by case: seconds of a step."""
    said = result["summary"]
    lines = [
        f"Median error **{said['median_error']:.1%}**, worst {said['worst_error']:.1%}.\n",
        "| case | planned | measured | error |",
        "|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        if "error" in row:
            seconds = f"{row['planned_s']:.2f} s | {row['measured_s']:.2f} s"
            lines.append(f"| {row['case']} | {seconds} | {row['error']:+.0%} |")
        else:
            lines.append(f"| {row['case']} | – | {row.get('failed')} | – |")
    return [*lines, ""]
