"""Two curves side by side: how far apart they lie, and how far they moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOLERANCE = 1e-4
"""Largest relative difference of a case that is to agree."""
NEAR_ZERO = 0.1
"""A curve that comes nearer to 0 than this share of its root mean square is measured by that."""

AGREES, DIFFERS = GOOD = ("agrees", "differs on purpose")
"""The verdicts that are hoped for."""

Curves = Mapping[str, Sequence[float]]
"""``loss`` and ``grad_norm``, a number a step; PPO has ``value_loss`` and ``critic_grad_norm`` too."""


def largest_difference(ours: Sequence[float], peer: Sequence[float]) -> float:
    """max over steps of |ours − peer| / |peer|; of a curve that meets 0, / max(|peer|, its RMS).

    A policy gradient's loss is a sum that cancels: it starts at 0 and changes its sign, and relative to such
    values two roundings of one number look unlike. So a curve (the peer's) that changes its sign, or comes
    nearer to 0 than NEAR_ZERO of its root mean square, is measured by its own size. ValueError for curves of
    different lengths or without a step; infinity where a number is not finite.
    """
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"{len(ours)} steps of ours, {len(peer)} of the peer's: expected as many, 1 or more")
    if not all(map(math.isfinite, [*ours, *peer])):
        return math.inf
    floor = floor_of(peer)
    return max(_relative(a, b, floor) for a, b in zip(ours, peer, strict=True))


def floor_of(curve: Sequence[float]) -> float:
    """What differences from a curve are relative to at the least: 0, or its RMS where it meets 0."""
    size = math.sqrt(sum(b * b for b in curve) / len(curve))
    one_sign = min(curve) > 0 or max(curve) < 0
    return 0.0 if one_sign and min(map(abs, curve)) >= NEAR_ZERO * size else size


def _relative(a: float, b: float, floor: float) -> float:
    gap, scale = abs(a - b), max(abs(b), floor)
    return gap / scale if scale else (math.inf if gap else 0.0)


def moved(curve: Sequence[float], period: int) -> float:
    """How far a curve went: |mean of its last ``period`` steps / mean of its first ``period`` − 1|.

    Over whole passes over the rows (``period`` steps each) the rows are the same, and only learning differs.
    """
    first, last = (sum(part) / len(part) for part in (curve[:period], curve[-period:]))
    return abs(last / first - 1) if first else math.inf


def spread(curve: Sequence[float]) -> float:
    """(largest − smallest) / largest absolute value: 0 for a curve that stands still."""
    size = max(map(abs, curve))
    return (max(curve) - min(curve)) / size if size else 0.0


def differences(ours: Curves, peer: Curves) -> dict[str, float]:
    """The largest difference of every curve that the peer has.

    Raises ValueError where ours lacks one.
    """
    if missing := sorted(set(peer) - set(ours)):
        raise ValueError(f"our side has no curve {', '.join(missing)}")
    return {name: largest_difference(ours[name], peer[name]) for name in peer}


def verdict(found: Mapping[str, float], *, differs: bool) -> str:
    """What a row says: "agrees", "differs on purpose", or what is wrong."""
    apart = {name: gap for name, gap in found.items() if not gap <= TOLERANCE}
    if differs:
        return DIFFERS if apart else "agrees, though a difference was expected"
    return AGREES if not apart else f"DIFFERS: {', '.join(apart)}"


def row_of(ours: Curves, peer: Curves, *, period: int, differs: str = "") -> dict[str, Any]:
    """The figures of one case: differences and movement; where it differs, both sides' numbers when it began.

    ``period`` 0: a sampling method, whose loss's spread over the run is given instead.
    """
    found = differences(ours, peer)
    loss = ours["loss"]
    row: dict[str, Any] = {
        "steps": len(loss),
        **{f"{name}_difference": _short(gap) for name, gap in found.items()},
        "loss_moved": _short(moved(loss, period) if period else spread(loss)),
        "verdict": verdict(found, differs=bool(differs)),
    }
    if differs:
        step = first_apart(ours, peer)
        row |= {"why": differs, "at_step": step + 1}
        for side, curves in (("ours", ours), ("peer", peer)):
            row |= {f"{side}_{name}": _short(curves[name][step], 7) for name in ("loss", "grad_norm")}
    return row


def first_apart(ours: Curves, peer: Curves) -> int:
    """The first step, from 0, at which two curves lie apart by more than TOLERANCE; else the last."""
    floors = {name: floor_of(curve) for name, curve in peer.items()}
    steps = range(len(peer["loss"]))
    apart = (
        k
        for k in steps
        if any(_relative(ours[name][k], peer[name][k], floors[name]) > TOLERANCE for name in peer)
    )
    return next(apart, steps[-1])


def _short(value: float, digits: int = 3) -> float | None:
    """JSON has no infinity."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
