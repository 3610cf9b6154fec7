"""What was measured of a side, and the rows of a result: the contract's keys, then what a benchmark adds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIGURES = ("ours_s", "peer_s", "speedup", "ours_peak_mb", "peer_peak_mb", "memory_ratio")
STATE_BYTES = 12
"""Of a parameter in training: its gradient and AdamW's two moments, in fp32."""


@dataclass(slots=True)
class Side:
    """What was measured of one side in one case."""

    seconds: list[float]
    peak_mb: float | None
    loaded_mb: float | None
    """What the process held once its weights were loaded; None if it did not say."""
    facts: dict[str, Any]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def above_model_mb(self) -> float | None:
        """The peak less what the process held once its weights were loaded."""
        if self.peak_mb is None or self.loaded_mb is None:
            return None
        return self.peak_mb - self.loaded_mb


def to_row(case: str, sides: Mapping[str, Side], runs: int, *, above_model: bool = False) -> dict[str, Any]:
    """One row of the result; null where a side was not run or its figure is unknown.

    ``speedup`` is the peer's median over ours (2 = twice as fast); ``memory_ratio`` is our peak over the
    peer's (0.5 = half the memory). ``above_model`` puts the peaks above the loaded weights in their place.
    Further keys follow where a side's facts allow: ``*_above_model_mb``, ``*_tokens_per_s``, ``gflops``.
    """
    ours, peer = sides.get("ours"), sides.get("peer")
    peaks = {name: side.above_model_mb if above_model else side.peak_mb for name, side in sides.items()}
    ours_peak, peer_peak = peaks.get("ours"), peaks.get("peer")
    row = {
        "case": case,
        "ours_s": _rounded(ours.median_s if ours else None, 4),
        "peer_s": _rounded(peer.median_s if peer else None, 4),
        "speedup": _rounded(peer.median_s / ours.median_s if ours and peer else None, 3),
        "ours_peak_mb": _rounded(ours_peak, 1),
        "peer_peak_mb": _rounded(peer_peak, 1),
        "memory_ratio": _rounded(ours_peak / peer_peak if ours_peak and peer_peak else None, 3),
        "runs": runs,
    }
    for name, side in sides.items():
        row |= _further(name, side, above_model)
    return row


def _further(name: str, side: Side, above_model: bool) -> dict[str, Any]:
    """The keys beyond the contract's that a side's facts give."""
    more: dict[str, Any] = {}
    if side.above_model_mb is not None:
        more[f"{name}_above_model_mb"] = _rounded(side.above_model_mb, 1)
        if above_model and (parameters := side.facts.get("parameters")):
            states = STATE_BYTES * parameters / 2**20
            more[f"{name}_above_states_mb"] = _rounded(side.above_model_mb - states, 1)
    if tokens := side.facts.get("tokens_per_step"):
        more[f"{name}_tokens_per_s"] = _rounded(tokens / side.median_s, 1)
    if flops := side.facts.get("flops_per_step"):
        gflops, peak = flops / side.median_s / 1e9, side.facts["peak_gflops"]
        more |= {"gflops": _rounded(gflops, 1), "peak_gflops": _rounded(peak, 1)}
        more["fraction"] = _rounded(gflops / peak, 3)
    return more


def skipped_row(case: str, reason: str) -> dict[str, Any]:
    """A row without figures, and why."""
    return {"case": case, **dict.fromkeys(FIGURES), "runs": 0, "skipped": reason}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
