"""How the figures of a plan are written: letters and colours of what memory holds, units of counts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from trimtab.errors import InputError
from trimtab.planning.result import KINDS, Phase

GIB = 2**30
MIB = 2**20
NOTHING = "-"

LETTERS = {
    "weights": "W",
    "master weights": "M",
    "gradients": "G",
    "optimiser": "O",
    "adapter": "D",
    "activations": "A",
    "logits": "L",
    "cache": "C",
    "gathered layer": "T",
    "workspace": "K",
    "file": "I",
    "allocator": "R",
    "framework": "F",
}
"""One for each kind, so that bars are read without colour."""
COLOURS = {
    "weights": "#4477aa",
    "master weights": "#66ccee",
    "gradients": "#ee6677",
    "optimiser": "#aa3377",
    "adapter": "#9988ee",
    "activations": "#228833",
    "logits": "#ccbb44",
    "cache": "#ee8833",
    "gathered layer": "#009988",
    "workspace": "#777777",
    "file": "#ddbb99",
    "allocator": "#995533",
    "framework": "#bbbbbb",
}
"""Neighbours in a bar differ in lightness too: they stay apart in grey and for colour-blind readers."""


def kinds_of(phase: Phase) -> dict[str, float]:
    """Bytes of each kind that a phase holds, in the order of KINDS; all roles together."""
    held = dict.fromkeys(KINDS, 0.0)
    for part in phase.parts:
        held[part.kind] = held.get(part.kind, 0.0) + float(part.bytes)
    return {kind: size for kind, size in held.items() if size > 0}


def letter(kind: str) -> str:
    """A kind's own letter; its first for one that is not in the list."""
    return LETTERS.get(kind, kind[:1].upper() or "?")


def ink(kind: str) -> str:
    """Black or white, whichever is read on the kind's colour (WCAG's contrast)."""
    bright = _luminance(COLOURS.get(kind, "#bbbbbb"))
    return "#000000" if (bright + 0.05) / 0.05 >= 1.05 / (bright + 0.05) else "#ffffff"


def _luminance(colour: str) -> float:
    """WCAG 2's relative luminance of ``#rrggbb``."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def size(bytes: float) -> str:
    """``1.50 GiB``, ``12.0 MiB``: three figures."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if bytes >= 0.9995 * unit:
            return f"{_three(bytes / unit)} {name}"
    return f"{bytes:.0f} bytes"


def in_unit(bytes: float, unit: int) -> str:
    """Two decimals of GiB or one of MiB, for a column whose header names the unit."""
    if not bytes:
        return NOTHING
    least, decimals = (0.01, 2) if unit == GIB else (0.1, 1)
    return f"<{least}" if bytes < least / 2 * unit else f"{bytes / unit:,.{decimals}f}"


def duration(seconds: float) -> str:
    """``12 ms``, ``3.21 s``, ``4 min 10 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if not math.isfinite(seconds):
        return "for ever"
    if seconds < 59.95:
        return f"{_three(seconds * 1000)} ms" if seconds < 0.9995 else f"{_three(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h" if hours < 17_532 else f"{hours / 8766:,.0f} years"


def count(number: float) -> str:
    """``596 M``, ``1.24 B``: of parameters, tokens and operations; T, P, E and Z above B."""
    for power, name in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "B"), (6, "M")):
        if number >= 0.9995 * 10**power:
            return f"{_three(number / 10**power)} {name}"
    return f"{round(number):,}"


def operations(number: float) -> str:
    """Floating-point operations with the prefixes of the trade: ``3.10 TFLOP``."""
    prefix = "" if number >= 0.9995e6 else " "
    return f"{count(number).replace(' B', ' G')}{prefix}FLOP"


def money(amount: float) -> str:
    """In whatever currency the price was given in."""
    if amount >= 1e12:
        return f"{amount:.3g}"
    return f"{amount:,.2f}" if amount >= 0.0995 or not amount else f"{amount:.2g}"


def _three(number: float) -> str:
    """Three figures, or all of a whole number's."""
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def fact(value: Any) -> str:
    """What a plan took to be so, in a word or a few."""
    if value is None or value == "" or value == [] or value == {}:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value) if value >= 10**6 else f"{value:,}"
    if isinstance(value, float):
        return count(value) if value >= 10**6 else f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(inner) for inner in value)
    return printable(str(value))


def printable(text: str) -> str:
    """A model's or a file's name may be anybody's: nothing in it moves the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


_UNITS = {"": GIB, "b": 1, "k": 2**10, "m": MIB, "g": GIB, "t": 2**40}
_UNITS |= {f"{letter}ib": unit for letter, unit in _UNITS.items() if letter not in ("", "b")}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def read_size(text: str, option: str) -> float:
    """``24GiB``, ``24 gb``, ``512M``, ``24`` (GiB) as bytes. Raises InputError."""
    found = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise InputError(f"{option}: {text!r} is no size: write it as 24GiB, 24GB (10^9 bytes) or 512MiB")
    if not 0 < (amount := float(found[1]) * unit) < 2**63:
        raise InputError(f"{option}: memory must be more than 0, and less than 8 EiB (got {text[:40]!r})")
    return amount
