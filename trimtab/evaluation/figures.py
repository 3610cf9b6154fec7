"""Figures in words: what a number, an interval, a share or a cost looks like, in a sentence and in a cell.

They read the mappings of ``summary.json``, in which any figure may be missing, null or not a number; such
a figure shows as –.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MISSING = "–"
"""What a figure that was not measured shows as."""
ABBREVIATIONS = {
    name.lower(): name
    for name in (
        *("SFT", "SPIN", "DPO", "IPO", "SimPO", "ORPO", "KTO", "RM"),
        *("PPO", "GRPO", "RLOO", "DAPO", "GSPO", "CISPO"),
    )
}


def display_name(name: str) -> str:
    """A method's name as the field writes it: "grpo" → "GRPO", "dpo-beta0.3" → "DPO-beta0.3"."""
    for whole, written in (("dr-grpo", "Dr. GRPO"), ("online-dpo", "Online DPO")):
        if name.lower().startswith(whole):
            return written + name[len(whole) :]
    stem, rest = re.match(r"([A-Za-z]*)(.*)", str(name), re.DOTALL).groups()  # type: ignore[union-attr]
    return ABBREVIATIONS.get(stem.lower(), stem) + rest


def listed(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def lowered(name: str) -> str:
    """With a small first letter, for the middle of a sentence."""
    return name[:1].lower() + name[1:]


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else stands in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def has(figures: Mapping[str, Any], key: str) -> bool:
    """Whether ``key`` was measured."""
    return number(figures.get(key)) is not None


def interval(figures: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The bounds filed under ``key``_ci95, or None if there are not two."""
    return _bounds(figures.get(f"{key}_ci95"))


def _bounds(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    lo, hi = number(value[0]), number(value[1])
    return None if lo is None or hi is None else (lo, hi)


def written(figures: Mapping[str, Any], key: str, write: Callable[[float], str]) -> str:
    """The figure as ``write`` has it."""
    value = number(figures.get(key))
    return MISSING if value is None else signed(write(value))


def signed(text: str) -> str:
    """With the typographic minus, and none before a rounded zero."""
    return re.sub(r"^-(?=[0.]*$)", "", text).replace("-", "−") if text != MISSING else text


def decimals(value: Any) -> str:
    """Two decimals; three below 0.1, so that a small KL is not rounded to nothing."""
    figure = number(value)
    if figure is None:
        return MISSING
    return f"{figure:.3f}" if 0 < abs(figure) < 0.1 else f"{figure:,.2f}"


def plain_with_interval(figures: Mapping[str, Any], key: str) -> str:
    """ "0.71 [0.68, 0.74]"."""
    value, bounds = number(figures.get(key)), interval(figures, key)
    if value is None:
        return MISSING
    shown = signed(f"{value:,.2f}")
    if bounds is None:
        return shown
    return f"{shown} [{signed(f'{bounds[0]:,.2f}')}, {signed(f'{bounds[1]:,.2f}')}]"


def share_with_interval(figures: Mapping[str, Any], key: str, places: int = 0) -> str:
    """A share in per cent; with more decimals where rounding would put a bound on 50 that lies beside it.

    >>> share_with_interval({"win_rate": 0.55, "win_rate_ci95": [0.503, 0.6]}, "win_rate")
    '55.0 % [50.3, 60.0]'
    """
    value, bounds = number(figures.get(key)), interval(figures, key)
    if value is None:
        return MISSING
    if bounds is None:
        return f"{100 * value:.{places}f} %"
    while places < 3 and any(
        bound != 0.5 and float(f"{100 * bound:.{places}f}") == 50 for bound in (value, *bounds)
    ):
        places += 1
    point, lo, hi = (f"{100 * share:.{places}f}" for share in (value, *bounds))
    return f"{point} % [{lo}, {hi}]"


def duration(seconds: float) -> str:
    """ "9.5 s", "1 min 01 s", "1 h 06 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(megabytes: float) -> str:
    """ "812 MB", "1.5 GB"."""
    return f"{megabytes:,.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"
