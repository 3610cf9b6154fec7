"""``python -m benchmarks plot growth.json growth.svg``: seconds and memory against what grew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.growth_points import SWEEPS, points


def draw_growth(file: Path, picture: Path) -> None:
    """One panel a sweep, both axes logarithmic; SVG, PNG or PDF by the picture's ending.

    Raises KeyError for a result that is not of ``growth``.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Without a date and with fixed ids, so that the same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"
    from matplotlib import pyplot

    rows = {row["case"].rpartition(", ")[0]: row for row in json.loads(file.read_text())["rows"]}
    figure, panels = pyplot.subplots(1, len(SWEEPS), figsize=(11, 3.2), layout="constrained")
    for panel, (title, (field, _)) in zip(panels, SWEEPS.items(), strict=True):
        found = [(getattr(p, field), rows[case]) for case, p in points().items() if _in(case, title, rows)]
        places = [_place(value) for value, _ in found]
        panel.plot(places, [row["ours_s"] for _, row in found], "o-", color="tab:blue")
        panel.set(
            title=title, xscale="log", yscale="log", xticks=places, xticklabels=[_label(v) for v, _ in found]
        )
        panel.minorticks_off()
        other = panel.twinx()
        other.plot(places, [row["ours_above_model_mb"] for _, row in found], "s--", color="tab:orange")
        other.set_yscale("log")
    panels[0].set_ylabel("seconds", color="tab:blue")
    other.set_ylabel("MB above the model", color="tab:orange")
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    pyplot.close(figure)


def _in(case: str, title: str, rows: dict[str, Any]) -> bool:
    return case.startswith(title) and case in rows


def _place(value: Any) -> float:
    return float(value.removesuffix("M")) if isinstance(value, str) else float(value)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else f"{value // 1024}k" if value >= 8192 else str(value)
