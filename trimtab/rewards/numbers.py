"""Which number does a text give as its answer? Plain parsing, exact arithmetic, no other library."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_DIGITS = 400
"""Longer numbers are not read: a model that repeats a digit for ever must not cost minutes."""

DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(
    rf"""
    # A sign counts only where it touches the number and no operand stands before it: "10-5" ends in 5,
    # and "- 3 apples" is an item of a list.
    (?P<sign>(?<![\w)\]}}.])[-+−])?
    (?:\$|\\\$|€|£)?
    (?:
        (?:(?P<mixed>\d{{1,{MAX_DIGITS}}})\s?)?
        \\[dt]?frac\s*{{\s*(?:(?P<fsign>[-−])\s*)?(?P<top>\d+)\s*}}\s*{{\s*(?P<bottom>\d+)\s*}}
      | (?P<decimal>{DECIMAL})
        (?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d))?
        (?:\s?/\s?(?P<over>{DECIMAL}))?
    )
    """,
    re.VERBOSE,
)


def find_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly, or None if it gives none.

    In this order: the first number after the last ``####`` on the same line (the form of GSM8K); the
    last number inside the last ``\\boxed{…}``; the last number of the text. A marker or a box without
    a number gives None: what stands before it was not offered as the answer.

    Read are signs, decimals, thousands separators (``1,234.5``), exponents (``2e-3``), fractions
    (``3/4``, ``\\frac{3}{4}``, ``2\\frac{1}{2}``) and a currency sign before the number. A percent sign
    is a unit and left out, as other units are: ``50%`` is 50.

    >>> find_number("so 3 + 4 = 7.\\n#### 1,007")
    Fraction(1007, 1)
    """
    _, marker, after = text.rpartition("####")
    if marker:
        return next(iter(_numbers(after.lstrip(" \t").partition("\n")[0])), None)
    boxed = _last_box(text)
    found = _numbers(text if boxed is None else boxed)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    values = (_value(match) for match in NUMBER.finditer(text))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match stands for; None for a division by zero or a number that is too long."""
    if len(match[0]) > MAX_DIGITS:
        return None
    if match["top"] is not None:
        if int(match["bottom"]) == 0:
            return None
        value = Fraction(int(match["top"]), int(match["bottom"]))
        value = (-value if match["fsign"] else value) + int(match["mixed"] or 0)
    else:
        value = _decimal(match["decimal"]) * Fraction(10) ** int(match["exponent"] or 0)
        if match["over"]:
            bottom = _decimal(match["over"])
            if bottom == 0:
                return None
            value /= bottom
    return -value if match["sign"] in ("-", "−") else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _last_box(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` holds, inner braces included; None without a closed box."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None
