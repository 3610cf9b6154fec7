"""How β, the weight of the KL in the token rewards, follows the KL that a rollout showed.

Pure functions of numbers. The only state is β itself, so that a checkpoint holds one number.
"""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["fixed", "adaptive", "linear"]

STEP = 0.2
"""Largest relative error that adaptive control reacts to (Ziegler et al., 2019, section 2.2)."""


def next_beta(
    beta: float,
    kl: float,
    *,
    kind: Kind,
    start: float,
    target: float,
    horizon: float,
    items: float,
    slope: float = 1.0,
    most: float = 10.0,
) -> float:
    """β for the next rollout, from the ``kl`` of this one; ``kl`` and ``target`` in nats per token.

        fixed      β
        adaptive   β·(1 + e·items/horizon),   e = clip(kl/target − 1, −0.2, 0.2)
        linear     start·min(1 + slope·max(kl/target − 1, 0), most)

    "adaptive" (Ziegler et al., 2019, section 2.2) integrates: β rises as long as the KL is above the target
    and falls as long as it is below, by at most a factor exp(±0.2) over ``horizon`` items. Items are
    responses; the paper's K_β is items/horizon. A rollout of more than ``horizon`` items counts as
    ``horizon``: without that bound a short horizon would turn β negative.

    "linear" answers spikes and forgets them: β is ``start`` while the KL is on or below its target, rises in
    proportion to the excess, to at most ``most`` times ``start``, and is back as soon as the KL is. It reads
    no earlier β.

    ValueError for an unknown kind, a target or horizon that is not positive, or a KL that is NaN.
    """
    if kind == "fixed":
        return beta
    if kind not in ("adaptive", "linear"):
        raise ValueError(f"unknown KL control {kind!r}: fixed, adaptive or linear")
    if math.isnan(kl):
        raise ValueError("the KL is not a number: the policy's or the reference's log-probabilities are not")
    if not (target > 0 and horizon > 0):
        raise ValueError(f"KL control needs a target and a horizon above 0, not {target} and {horizon}")
    excess = kl / target - 1
    if kind == "linear":
        return start * min(1 + slope * max(excess, 0.0), most)
    error = min(max(excess, -STEP), STEP)
    return beta * (1 + error * min(items / horizon, 1.0))
