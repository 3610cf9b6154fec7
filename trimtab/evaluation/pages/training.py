"""The parts on how training went: metrics.jsonl as curves, of one run or of several, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from trimtab.evaluation.figures import number
from trimtab.evaluation.pages.blocks import Block, Charts, Folded, Grid, Part
from trimtab.evaluation.pages.charts import SMOOTH_FROM, Series, line_chart
from trimtab.evaluation.pages.planned import memory_cell, memory_cells
from trimtab.evaluation.pages.study_page import OWN_CURVES, SHARED_CURVES
from trimtab.evaluation.pages.values import table, tables, words

Records = Sequence[Mapping[str, Any]]

FIRST = {**SHARED_CURVES, "entropy": "Entropy", "cut_off": "Share cut off", **OWN_CURVES}
"""Shown at once, in this order; every other metric is folded."""
UNSEEN = ("step", "epoch", "seconds", "step_s", "sampling_s", "lr", "tokens_per_s", "generated_tokens")
"""Not how the model fared but how the machine did: in the file, not on the page."""
MOST = 30
"""Folded panels; a mixture of many terms logs one metric each."""


def training_part(runs: Sequence[tuple[str, str, Records]]) -> Part | None:
    """``runs`` holds (name, colour, records) of each."""
    metrics = list(dict.fromkeys(key for _, _, records in runs for record in records for key in record))
    evaluated = [key for key in metrics if key.startswith("eval_")]
    others = [key for key in metrics if key not in FIRST and key not in evaluated and key not in UNSEEN]
    first = _panels(runs, [*(key for key in FIRST if key in metrics), *evaluated])
    more = _panels(runs, others)[:MOST]
    blocks: list[Block] = [Charts(first, legend=_legend(runs))] if first else []
    if more:
        blocks.append(Folded(f"{len(more)} more", [Charts(more, legend=_legend(runs))], printed=False))
    note = (
        f"Over optimiser steps. Curves of {SMOOTH_FROM} points or more are drawn twice: faintly as logged, "
        "boldly as the mean of the surrounding steps."
    )
    return Part("training", "Training", blocks, note) if blocks else None


def memory_part(lineage: Any) -> Part | None:
    """The planned and the measured peak of a run, from its lineage; None where it was not planned."""
    plan = table(table(lineage).get("plan"))
    if number(plan.get("peak_mb")) is None:
        return None
    figures = memory_cells(plan.get("peak_mb"), plan.get("measured_peak_mb"))
    header = ["", "Planned peak", "Measured peak", "Error of the plan", "Free before it"]
    each = tables(table(lineage).get("processes"))
    whose = f"The first of {len(each)} processes" if len(each) > 1 else "The run"
    blocks: list[Block] = [Grid("", header, [[whose, *figures, memory_cell(plan.get("available_mb"))]])]
    rows = [
        [words(name) + (" (the fullest)" if name == plan.get("phase") else ""), memory_cell(held)]
        for name, held in table(plan.get("phases_mb")).items()
    ]
    if rows:
        blocks.append(Grid("What was planned for each phase", ["Phase", "At most"], rows))
    if len(each) > 1:
        peaks = [
            [words(one.get("rank")), words(one.get("host")), memory_cell(one.get("peak_rss_mb"))]
            for one in each
        ]
        grid = Grid("", ["Process", "Machine", "Peak, what it held before included"], peaks)
        blocks.append(Folded("Main memory of each process", [grid], printed=False))
    note = (
        "Peaks above what the process held before the run loaded anything. The plan was made before the "
        "first weight was read; its error is a share of what was measured."
    )
    return Part("memory", "Memory: planned and measured", blocks, note)


def _panels(runs: Sequence[tuple[str, str, Records]], metrics: Sequence[str]) -> list[tuple[str, Markup]]:
    panels = []
    for metric in metrics:
        title = FIRST.get(metric) or _title(metric)
        series = [
            Series(name, key, found) for name, key, records in runs if (found := _points(records, metric))
        ]
        if series and (len(series) > 1 or len(series[0].points) > 1):
            panels.append((title, line_chart(series, title=title, labels=False)))
    return panels


def _points(records: Records, metric: str) -> list[tuple[float, float]]:
    pairs = [(number(record.get("step")), number(record.get(metric))) for record in records]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _legend(runs: Sequence[tuple[str, str, Records]]) -> list[tuple[str, str]]:
    return [(key, name) for name, key, records in runs if records] if len(runs) > 1 else []


def _title(metric: str) -> str:
    held_out = metric.removeprefix("eval_")
    words = held_out.replace("_", " ").replace("/", ": ")
    return f"Held out: {words}" if held_out != metric else words[:1].upper() + words[1:]
