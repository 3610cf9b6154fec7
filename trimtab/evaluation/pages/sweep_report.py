"""A sweep as a table, as sentences, and as one page with plots; all from its ``summary.json``.

Plots: each figure against each swept option, one line a method; and the KL–reward plane, whose points are
joined setting by setting, for the score that decides and for the learned reward beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trimtab.errors import InputError
from trimtab.evaluation.figures import (
    MISSING,
    decimals,
    display_name,
    duration,
    has,
    interval,
    lowered,
    number,
    plain_with_interval,
    share_with_interval,
    signed,
    written,
)
from trimtab.evaluation.pages.charts import Mark
from trimtab.evaluation.pages.planned import memory_cell
from trimtab.evaluation.pages.study_page import CONTROL, PALETTE, page_template
from trimtab.evaluation.pages.sweep_charts import Line, legend, places_of, sweep_chart
from trimtab.evaluation.verdict import score_name

Point = Mapping[str, Any]

AGAINST = (
    ("win_rate", "Win rate against the reference"),
    ("gold_reward", ""),
    ("kl_nats_per_token", "KL, nats per token"),
    ("implicit_ece", "Calibration error of the implicit reward"),
    ("implicit_accuracy", "Accuracy of the implicit reward"),
    ("response_tokens", "Tokens per response"),
)
"""What is drawn against a swept option; the score's title is its own name."""


def sweep_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header, and one row a setting, the reference first; every cell in words."""
    points = _points(summary)
    reference = display_name(str(summary.get("reference", "")))
    score = score_name(summary)

    def plain(p: Point, key: str) -> str:
        return plain_with_interval(p, key)

    def share(p: Point, key: str) -> str:
        return share_with_interval(p, key)

    def small(p: Point, key: str) -> str:
        return _small_with_interval(p, key)

    columns: list[tuple[str, str, Callable[[Point, str], str]]] = [
        ("gold_reward", f"{score} [95 %]", plain),
        ("proxy_reward", "Proxy reward [95 %]", plain),
        ("win_rate", f"Win rate vs {reference} [95 %]", share),
        ("judged_win_rate", f"Win rate vs {reference} by an outside judge [95 %]", share),
        ("kl_nats_per_token", "KL, nats per token [95 %]", small),
        ("implicit_accuracy", "Implicit-reward accuracy [95 %]", share),
        ("implicit_ece", "Implicit-reward ECE [95 %]", small),
        ("implicit_brier", "Implicit-reward Brier", lambda p, key: written(p, key, decimals)),
        ("preference_accuracy", "Preference accuracy [95 %]", share),
        ("accuracy", "Accuracy [95 %]", share),
        ("response_tokens", "Tokens per response", lambda p, key: written(p, key, "{:,.1f}".format)),
        ("wall_s", "Wall time of a run", lambda p, key: written(p, key, duration)),
        ("planned_peak_mb", "Planned peak memory", lambda p, key: memory_cell(p.get(key))),
        ("measured_peak_mb", "Measured peak memory", lambda p, key: memory_cell(p.get(key))),
    ]
    everything = [summary.get("reference_row") or {}, *points]
    shown = [column for column in columns if any(has(p, column[0]) for p in everything)]
    header = ["Setting", "Runs", *(title for _, title, _ in shown)]
    first = [f"{reference} (reference)", MISSING, *(write(everything[0], key) for key, _, write in shown)]
    rows = [first]
    for p in points:
        runs = f"{len(p['runs'])}" + (f" ({p['failed']} failed)" if p.get("failed") else "")
        name = (
            _name(p)
            + (" (sees the judge)" if p.get("sees_judge") else "")
            + (" *" if p.get("frontier") else "")
        )
        rows.append([name, runs, *(write(p, key) for key, _, write in shown)])
    return header, rows


def bracket_note(summary: Mapping[str, Any]) -> str:
    """What the brackets of the table are."""
    over = {p.get("over") for p in _points(summary) if p["runs"]}
    runs = "95 % t intervals over the runs of a setting"
    prompts = "95 % intervals over prompts, of the one run of a setting: they do not tell how runs vary"
    if over == {"runs"}:
        return f"Brackets hold {runs}; the reference's, over prompts."
    return (
        f"Brackets hold {prompts}."
        if over == {"prompts"}
        else f"Brackets hold {runs}, or, of one run, over prompts."
    )


def sweep_sentences(summary: Mapping[str, Any]) -> list[str]:
    """The setting of the highest mean score of each method, highest first, and what failed."""
    score = score_name(summary)
    best: dict[str, Point] = {}
    for p in _points(summary):
        value = number(p.get("gold_reward"))
        if value is not None and not p.get("sees_judge"):
            other = best.get(str(p["block"]))
            if other is None or value > float(other["gold_reward"]):
                best[str(p["block"])] = p
    lines = []
    for p in sorted(best.values(), key=lambda p: -float(p["gold_reward"])):
        kl = f" at KL {decimals(p['kl_nats_per_token'])}" if has(p, "kl_nats_per_token") else ""
        lines.append(f"{_name(p)}: {lowered(score)} {plain_with_interval(p, 'gold_reward')}{kl}.")
    if len(lines) > 1:
        lines[0] = f"Highest mean {lowered(score)}: {lines[0]}"
    failed = sum(int(p.get("failed") or 0) for p in _points(summary))
    if failed:
        lines.append(f"{failed} of {len(summary['runs'])} runs failed.")
    return lines or ["Nothing was scored."]


def write_sweep_report(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes the page and returns its path. Raises InputError for a summary that is no sweep's."""
    points = _points(summary)
    blocks = list(dict.fromkeys(str(p["block"]) for p in points))
    keys = {block: str(k % PALETTE) for k, block in enumerate(blocks)}
    header, rows = sweep_table(summary)
    score = score_name(summary)
    planes = []
    for figure, title in (("gold_reward", score), ("proxy_reward", "Proxy reward")):
        lines = _lines(points, keys, lambda p: number(p.get("kl_nats_per_token")), figure)
        if lines:
            base = number((summary.get("reference_row") or {}).get(figure))
            chart = sweep_chart(
                lines,
                title=f"{title} against KL",
                x_label="KL, nats per token",
                y_label=_on_axis(title),
                baseline=base,
            )
            planes.append((f"{title} against KL", chart))
    page = page_template("sweep.html.j2").render(
        title=str(summary.get("title", "Sweep")),
        sentences=sweep_sentences(summary),
        header=header,
        rows=rows,
        keys=["ref", *(keys[str(p["block"])] for p in points)],
        bracket_note=bracket_note(summary),
        planes=planes,
        legend=legend([Line(display_name(block), keys[block], []) for block in blocks]),
        options=[_option(summary, points, keys, option) for option in _options(points)],
        failures=[(name, run["failed"]) for name, run in summary["runs"].items() if "failed" in run],
        missing=MISSING,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONTROL.sub("\ufffd", page), encoding="utf-8")
    return path


# --- parts


def _points(summary: Mapping[str, Any]) -> list[Point]:
    points = summary.get("points")
    if not isinstance(points, list) or not points or not isinstance(summary.get("runs"), Mapping):
        raise InputError("the summary has no points: give summary.json as trimtab sweep writes it")
    return points


def _on_axis(title: str) -> str:
    """With a small first letter, unless it begins an abbreviation."""
    return title if title[:2].isupper() else lowered(title)


def _name(p: Point) -> str:
    return display_name(str(p["setting"]))


def _small_with_interval(p: Point, key: str) -> str:
    bounds = interval(p, key)
    shown = written(p, key, decimals)
    return shown if bounds is None else f"{shown} [{', '.join(signed(decimals(b)) for b in bounds)}]"


def _short(p: Point) -> dict[str, Any]:
    """The swept options by the last part of their names, or in full where two of a method share it."""
    last = [name.split(".")[-1] for name in p["options"]]
    return {
        short if last.count(short) == 1 else name: value
        for short, (name, value) in zip(last, p["options"].items(), strict=True)
    }


def _options(points: Sequence[Point]) -> list[str]:
    """What plots are of: dpo.beta and grpo.beta share one, train.lr and critic.lr of one method do not."""
    return list(dict.fromkeys(name for p in points for name in _short(p)))


def _swept(p: Point, option: str) -> Any:
    return _short(p).get(option)


def _others(p: Point, option: str) -> str:
    """What tells a line from the others of its method: the values of the options that are not its x."""
    rest = [f"{name}={value}" for name, value in _short(p).items() if name != option]
    return " ".join([display_name(str(p["block"])), *rest])


def _option(
    summary: Mapping[str, Any], points: Sequence[Point], keys: Mapping[str, str], option: str
) -> tuple[str, Markup, list[tuple[str, Markup]]]:
    """An option's name, its legend, and a chart of each figure that was measured."""
    having = [p for p in points if _swept(p, option) is not None]
    places, ticks = places_of([_swept(p, option) for p in having])
    place = {id(p): x for p, x in zip(having, places, strict=True)}
    lines_of: dict[str, str] = {_others(p, option): keys[str(p["block"])] for p in having}
    panels = []
    for figure, title in AGAINST:
        title = title or score_name(summary)
        lines = []
        for line, key in lines_of.items():
            marks = [
                mark
                for p in having
                if _others(p, option) == line
                and (mark := _mark(p, "", key, place[id(p)], figure)) is not None
            ]
            if marks:
                lines.append(Line(line, key, sorted(marks, key=lambda m: m.x)))
        if lines:
            base = number((summary.get("reference_row") or {}).get(figure))
            base = 0.5 if figure == "win_rate" else base
            drawn = sweep_chart(
                lines, title=title, x_label=option, y_label=_on_axis(title), x_marks=ticks, baseline=base
            )
            panels.append((title, drawn))
    return option, legend([Line(name, key, []) for name, key in lines_of.items()]), panels


def _lines(
    points: Sequence[Point], keys: Mapping[str, str], x: Callable[[Point], float | None], figure: str
) -> list[Line]:
    """One line a method through its settings, in the order of the file."""
    found: dict[str, list[Mark]] = {}
    for p in points:
        at = x(p)
        values = " ".join(str(v) for v in p["options"].values()) or _name(p)
        mark = (
            None if at is None else _mark(p, values, keys[str(p["block"])], at, figure, "kl_nats_per_token")
        )
        if mark is not None:
            found.setdefault(str(p["block"]), []).append(mark)
    return [Line(display_name(block), keys[block], marks) for block, marks in found.items()]


def _mark(p: Point, name: str, key: str, x: float, figure: str, x_figure: str = "") -> Mark | None:
    y = number(p.get(figure))
    if y is None:
        return None
    low, high = interval(p, figure) or (None, None)
    x_low, x_high = (interval(p, x_figure) or (None, None)) if x_figure else (None, None)
    return Mark(name, key, x, y, low, high, x_low, x_high)
