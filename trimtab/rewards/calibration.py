"""One temperature for a reward model's probabilities, fitted on held-out comparisons (Guo et al., 2017).

    p(better) = σ((r_better − r_worse)/T)

T > 0 divides every score alike, so that no ranking and no accuracy changes: what changes is how sure the
model says it is. It is fitted on one half of the prompts and judged on the other.

Axes: ``_P`` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import InputError
from trimtab.groups import Group, prompt_text, stable_hash

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

BINS = 10
"""Bins of confidence, for the reliability diagram and the calibration error."""
MAX_SHARPENING = 1e12
"""Margins divided by a temperature this much smaller than the largest of them are as good as certain."""


def fit_temperature(margin_P: Floats, target_P: Floats | None = None) -> tuple[float | None, str]:
    """The T that minimises the mean cross-entropy of σ(margin/T) (Guo et al., 2017, section 4.2).

    ``target_P`` is the probability that the better one is better; 1 where it is not given. In a = 1/T the
    mean is convex with slope mean(margin·(σ(a·margin) − target)), whose zero is bisected. None, and why,
    where no finite temperature is best.
    """
    target_P = np.ones_like(margin_P) if target_P is None else target_P
    scale = float(np.abs(margin_P).max())
    if scale == 0 or float((margin_P * (2 * target_P - 1)).mean()) <= 0:
        return None, "the margins do not point the labels' way on average"
    if not ((margin_P > 0) & (target_P < 1)).any() and not ((margin_P < 0) & (target_P > 0)).any():
        return None, "no pair is ordered wrongly"
    unit_P = margin_P / scale

    def rises(a: float) -> bool:
        """Whether the likelihood still rises at a."""
        return float((unit_P * (_sigmoid(a * unit_P) - target_P)).mean()) < 0

    lo, hi = 0.0, 1.0
    while rises(hi):
        if hi > MAX_SHARPENING:
            return None, "no pair is ordered wrongly by more than nothing"
        lo, hi = hi, 2 * hi
    for _ in range(80):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if rises(middle) else (lo, middle)
    return scale / hi, ""


def calibration_figures(
    margin_P: Floats, target_P: Floats | None = None, temperature: float = 1.0
) -> dict[str, Any]:
    """Pairs, accuracy, and the log loss (nats), calibration error and Brier score of σ(margin/T)."""
    target_P = np.ones_like(margin_P) if target_P is None else target_P
    cooled_P = margin_P / temperature
    _, over_P, bin_P = confidence(cooled_P, target_P)
    return {
        "pairs": len(margin_P),
        "accuracy": float(_right(margin_P, target_P).mean()),
        "nll": float((np.logaddexp(0.0, -cooled_P) + (1 - target_P) * cooled_P).mean()),
        "ece": expected_error(bin_P, over_P),
        "brier": float(np.square(_sigmoid(cooled_P) - target_P).mean()),
    }


def confidence(margin_P: Floats, target_P: Floats | None = None) -> tuple[Floats, Floats, Indices]:
    """Confidence c, c less 1 for a right pair, 0 for a wrong one, ½ for a tie, and the bin of c."""
    confidence_P = _sigmoid(np.abs(margin_P))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(np.intp), BINS - 1)
    right_P = _right(margin_P, np.ones_like(margin_P) if target_P is None else target_P)
    return confidence_P, confidence_P - right_P, bin_P


def expected_error(bin_P: Indices, over_P: Floats) -> float:
    """Σ_b |Σ_{p in b} (confidence − right)| / n, which is the weighted mean of the bins' gaps."""
    return float(np.abs(np.bincount(bin_P, weights=over_P)).sum() / len(over_P))


def _right(margin_P: Floats, target_P: Floats) -> Floats:
    return np.where(margin_P > 0, target_P, np.where(margin_P < 0, 1 - target_P, 0.5))


def _sigmoid(x_P: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x_P))


def halves(groups: Sequence[Group], seed: int) -> tuple[list[Group], list[Group]]:
    """What is fitted on and what is measured on: half of the prompts each, by a hash of their text.

    Raises InputError for fewer than two prompts.
    """
    keys = {prompt_text(group.prompt) or group.id for group in groups}
    if len(keys) < 2:
        raise InputError(
            f"calibrate: {len(keys)} held-out prompts, and two at least are needed: one to fit on and one to "
            "measure on"
        )
    # Not the hash of the held-out split, whose lowest part these prompts may be.
    ordered = sorted(keys, key=lambda key: (stable_hash("calibration", seed, key), key))
    fitted = set(ordered[: (len(ordered) + 1) // 2])
    sides: tuple[list[Group], list[Group]] = ([], [])
    for group in groups:
        sides[(prompt_text(group.prompt) or group.id) not in fitted].append(group)
    return sides


def ordered_margins(groups: Sequence[Group], scores: Sequence[torch.Tensor | Sequence[float]]) -> Floats:
    """Better less worse of every strictly ordered pair of ranked groups, from each response's score."""
    margins = []
    for group, found in zip(groups, scores, strict=True):
        values = [float(value) for value in found]
        for better, high in zip(group.responses, values, strict=True):
            for worse, low in zip(group.responses, values, strict=True):
                if better.rank is not None and worse.rank is not None and better.rank < worse.rank:
                    margins.append(high - low)
    return np.array(margins, dtype=np.float64)


def calibrate(
    fit_P: Floats, test_P: Floats, fit_target_P: Floats | None = None, test_target_P: Floats | None = None
) -> dict[str, Any]:
    """The temperature of the first margins, and the figures before and after it of the second.

    ``temperature`` is None where none is best (``reason`` says why); then ``after`` is None too.
    """
    value, reason = fit_temperature(fit_P, fit_target_P)
    found: dict[str, Any] = {"temperature": value, "fitted_on_pairs": len(fit_P)}
    if value is None:
        found["reason"] = reason
    before = calibration_figures(test_P, test_target_P)
    after = None if value is None else calibration_figures(test_P, test_target_P, value)
    return found | {"measured_on_pairs": len(test_P), "before": before, "after": after}


def calibration_line(found: dict[str, Any]) -> str:
    """What is said of it, in one line."""
    if found["temperature"] is None:
        return f"calibration: no temperature is best ({found['reason']}); scores stay as they are"
    before, after = found["before"], found["after"]
    return (
        f"calibration: temperature {found['temperature']:.3g}, fitted on {found['fitted_on_pairs']:,} "
        f"held-out pairs; on {found['measured_on_pairs']:,} others the log loss goes from "
        f"{before['nll']:.3f} to {after['nll']:.3f} and the calibration error from {before['ece']:.3f} to "
        f"{after['ece']:.3f}"
    )
