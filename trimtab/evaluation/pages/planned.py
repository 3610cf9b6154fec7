"""Memory in words: what was planned for a run, what was measured, and how far the plan was off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.evaluation.figures import MISSING, display_name, memory, number, signed


def memory_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row for each stage of a study that was planned: its name, planned, measured, error."""
    return [
        [display_name(name), *memory_cells(figures["planned_peak_mb"], figures.get("measured_peak_mb"))]
        for name, figures in stages.items()
        if number(figures.get("planned_peak_mb")) is not None
    ]


def memory_cells(planned: Any, measured: Any) -> list[str]:
    """The planned peak, the measured one, and the plan's error as a share of that."""
    plan, found = number(planned), number(measured)
    error = MISSING
    if plan is not None and found is not None and found > 0:
        percent = round(100 * (plan / found - 1))
        error = signed(f"{percent:+d} %") if percent else "0 %"
    return [memory_cell(planned), memory_cell(measured), error]


def memory_cell(megabytes: Any) -> str:
    """ "812 MB", "1.5 GB", or – for what was not measured."""
    figure = number(megabytes)
    return MISSING if figure is None else memory(figure)
