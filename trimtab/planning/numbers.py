"""Arithmetic of plans: on numbers, and on quantities that only have a name yet (``trace.py``).

A formula of a plan is written once, with + − × ÷ and these functions, and never asks ``if`` of a quantity,
only of an option. So the same code computes a plan and writes down the formula that the explorer's page
evaluates for whatever lengths and sizes its reader chooses.
"""

from __future__ import annotations

import math
from typing import Any

Number = Any
"""An int or a float, or a :class:`trimtab.planning.trace.Quantity`."""


def ceil(x: Number) -> Number:
    """The smallest whole number that is not below x."""
    return x.ceil() if hasattr(x, "ceil") else math.ceil(x)


def floor(x: Number) -> Number:
    """The largest whole number that is not above x."""
    return x.floor() if hasattr(x, "floor") else math.floor(x)


def largest(*xs: Number) -> Number:
    """The largest of these."""
    found = xs[0]
    for x in xs[1:]:
        found = found.largest(x) if hasattr(found, "largest") else _swapped(x, "largest", found, max)
    return found


def smallest(*xs: Number) -> Number:
    """The smallest of these."""
    found = xs[0]
    for x in xs[1:]:
        found = found.smallest(x) if hasattr(found, "smallest") else _swapped(x, "smallest", found, min)
    return found


def apart(a: Number, b: Number) -> Number:
    """|a − b|, to choose by: above 0 where they differ."""
    return largest(a - b, b - a)


def choose(positive: Number, then: Number, otherwise: Number) -> Number:
    """``then`` where ``positive`` > 0, else ``otherwise``."""
    if hasattr(positive, "choose"):
        return positive.choose(then, otherwise)
    return then if positive > 0 else otherwise


def _swapped(x: Number, name: str, found: Number, plain: Any) -> Number:
    return getattr(x, name)(found) if hasattr(x, name) else plain(found, x)
