"""How sure a comparison is: win rates, means and paired differences, each with an interval.

Two methods answer the same prompts, so their scores rise and fall together with how hard a prompt is;
comparing them pair by pair removes that shared part. Several samples of one prompt are alike as well:
20 samples of 50 prompts tell less than 1,000 prompts would. Every interval here therefore takes a
cluster (the prompt's id) as the unit that could have come out otherwise, and resamples or counts
clusters, never single samples. Without ``clusters`` each value is its own unit.

Python's own library and numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError

Floats = npt.NDArray[np.float64]

BOOTSTRAP_CHUNK = 256
"""Resamples drawn at a time: bounds memory at 256 × prompts."""
MIN_EFFECTIVE = 5.0
"""Below this value of m·p·(1−p), m prompts at win rate p, the bootstrap is not trusted."""


class Interval(NamedTuple):
    """A mean and the bounds of its interval, in the unit of the values."""

    mean: float
    lo: float
    hi: float


@dataclass(slots=True, frozen=True)
class WinRate:
    """How often ours beats theirs.

    >>> paired_win_rate([1.0, 0.0, 2.0, 5.0], [0.0, 0.0, 3.0, 1.0]).rate  # win, tie, loss, win
    0.625
    """

    rate: float
    """(wins + ties / 2) / n, between 0 and 1."""
    ci95: tuple[float, float]
    """The 95 % interval of ``rate``."""
    wins: int
    ties: int
    losses: int
    n: int
    """Pairs compared: wins + ties + losses."""


def win_rate(wins: float, ties: float, losses: float) -> float:
    """(wins + ties / 2) / (wins + ties + losses): a tie is half a win, so equal methods score 0.5.

    Raises InputError for a negative count and for no comparison at all.
    """
    counts = (wins, ties, losses)
    if min(counts) < 0 or not all(math.isfinite(count) for count in counts):
        raise InputError(f"win rate: wins, ties and losses must be 0 or more, got {counts}")
    n = wins + ties + losses
    if n == 0:
        raise InputError("win rate: nothing was compared (0 wins, 0 ties, 0 losses): give at least one pair")
    return (wins + 0.5 * ties) / n


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927).

    With z the normal quantile and p̂ = successes / n:
    (p̂ + z²/2n ± z·√(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n).
    It stays within [0, 1] and keeps a width at p̂ = 0 and p̂ = 1, where p̂ ± z·se has none.
    ``successes`` may be fractional, ties counting half.
    """
    if not n > 0 or not 0 <= successes <= n:
        raise InputError(f"wilson: needs 0 <= successes <= n and n > 0, got successes={successes}, n={n}")
    z = NormalDist().inv_cdf(0.5 + _checked_confidence(confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and 1 centre and half cancel exactly on paper but only nearly in floating point.
    lo = 0.0 if successes == 0 else (centre - half) / scale
    hi = 1.0 if successes == n else (centre + half) / scale
    return max(0.0, lo), min(1.0, hi)


def paired_win_rate(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    tolerance: float = 0.0,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> WinRate:
    """The share of pairs in which ours scores higher, with a 95 % paired bootstrap interval over prompts.

    ``ours[i]`` and ``theirs[i]`` score the same prompt, named by ``clusters[i]``. A difference of at
    most ``tolerance`` (in score units) is a tie and counts half.

    The interval: prompts are drawn with replacement, each with all its pairs, and the 2.5 % and 97.5 %
    points of the recomputed rates are taken (percentile bootstrap; Efron and Tibshirani, 1993, ch. 13).
    Whole prompts are drawn because samples of one prompt are not independent: drawing single pairs
    would give an interval that is too narrow by up to √(pairs per prompt).

    Where the bootstrap cannot be trusted, Wilson's interval over the m prompts takes its place: when
    m·p·(1−p) < 5 (few prompts, or a rate near 0 or 1), or when every prompt came out the same, since
    resampling identical prompts gives an interval of width zero, a certainty that no sample can give.
    It errs on the wide side: a prompt's share of wins, which lies in [0, 1], varies at most as much as
    a coin with the same mean.

    The draw depends on ``seed`` alone. Raises InputError for empty, unequal or non-finite scores.
    """
    if not tolerance >= 0:
        raise InputError(f"paired win rate: tolerance must be 0 or more, got {tolerance}")
    if resamples < 100:
        raise InputError(f"paired win rate: resamples must be at least 100, got {resamples}")
    difference = _differences(ours, theirs)
    points = np.where(difference > tolerance, 1.0, np.where(difference < -tolerance, 0.0, 0.5))
    sums, sizes = _by_cluster(points, clusters)
    rate = float(points.mean())
    m = len(sums)
    if m * rate * (1 - rate) < MIN_EFFECTIVE or np.ptp(sums / sizes) == 0:
        ci95 = wilson(rate * m, m)
    else:
        rates = _bootstrap_means(sums, sizes, resamples, seed)
        lo, hi = np.quantile(rates, [0.025, 0.975])
        ci95 = (float(lo), float(hi))
    wins, losses = int((points == 1.0).sum()), int((points == 0.0).sum())
    return WinRate(rate, ci95, wins, len(points) - wins - losses, losses, len(points))


def mean_interval(
    values: Sequence[float], clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Interval:
    """The mean of all values and Student's interval for it, with a standard error over clusters.

    With x̄ the mean of n values in m clusters and e_c = Σ_{i in c} (x_i − x̄):
    se² = m / (m−1) · Σ_c e_c² / n² (Liang and Zeger, 1986), with m − 1 degrees of freedom. Without
    clusters this is the textbook interval x̄ ± t·s/√n.

    Raises InputError for fewer than two clusters: one prompt says nothing about how prompts vary.
    """
    level = 0.5 + _checked_confidence(confidence) / 2
    array = _finite(values, "values")
    sums, sizes = _by_cluster(array, clusters)
    m = len(sums)
    if m < 2:
        raise InputError(f"an interval needs at least 2 prompts, got {m}: evaluate on more prompts")
    mean = float(array.mean())
    residuals = sums - mean * sizes
    error = math.sqrt(m / (m - 1) * float(residuals @ residuals)) / len(array)
    half = _student_quantile(level, m - 1) * error
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """The mean of ours − theirs over the same prompts, with :func:`mean_interval` of the differences.

    Narrower than two separate intervals suggest whenever the scores rise and fall together.
    """
    return mean_interval(_differences(ours, theirs).tolist(), clusters, confidence)


def _bootstrap_means(sums: Floats, sizes: Floats, resamples: int, seed: int) -> Floats:
    """Means of ``resamples`` draws of whole clusters with replacement; large clusters weigh more."""
    rng = np.random.default_rng(seed)
    m = len(sums)
    means = []
    for start in range(0, resamples, BOOTSTRAP_CHUNK):
        drawn = rng.integers(0, m, size=(min(BOOTSTRAP_CHUNK, resamples - start), m))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def _by_cluster(values: Floats, clusters: Sequence[str] | None) -> tuple[Floats, Floats]:
    """Sum and number of the values in each cluster, in order of first appearance."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise InputError(f"{len(values)} values but {len(clusters)} cluster names: give one name per value")
    order = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([order[name] for name in clusters])
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    return sums.astype(np.float64), sizes.astype(np.float64)


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> Floats:
    if len(ours) != len(theirs):
        raise InputError(f"paired scores differ in number: {len(ours)} of ours, {len(theirs)} of theirs")
    return _finite(ours, "ours") - _finite(theirs, "theirs")


def _finite(values: Sequence[float], name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name}: needs a list of at least one number, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(f"{name}[{bad[0]}] is {array[bad[0]]}: drop or mend scores that are not numbers")
    return array


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence


def _student_quantile(level: float, freedom: int) -> float:
    """The quantile of Student's t at ``level`` (≥ 0.5) with an integer number of degrees of freedom.

    Bisection on the closed form of the distribution for integer degrees of freedom (Abramowitz and
    Stegun, 26.7.3 and 26.7.4). Past 200 the expansion around the normal quantile (26.7.5) is exact to
    about 1e-9 and needs no loop over the degrees of freedom.
    """
    z = NormalDist().inv_cdf(level)
    if freedom > 200:
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3
    lo, hi = 0.0, math.pi / 2  # the angle atan(t / √freedom), in which the closed form is written
    for _ in range(60):
        middle = (lo + hi) / 2
        if _student_central_mass(middle, freedom) < 2 * level - 1:
            lo = middle
        else:
            hi = middle
    return math.sqrt(freedom) * math.tan(lo)


def _student_central_mass(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan(angle)) for T of Student's distribution."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom == 1:
        return 2 * angle / math.pi
    # Each term multiplies the one before by cos² and a ratio of successive odd and even numbers.
    first = freedom % 2
    term = cosine if first else 1.0
    total = term
    for k in range(2 + first, freedom, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if first else sine * total
