"""A plan as one SVG: a stacked bar for each phase (or method), a legend, the device's memory as a line.

A file of its own: no script, no font, no address is fetched. It follows the reader's light or dark theme, and
the letters in the bars say what the colours say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from trimtab.planning.look import COLOURS, GIB, MIB, ink, kinds_of, letter, printable, size
from trimtab.planning.result import KINDS, Phase

WIDTH = 960
MARGIN = 24
TOTALS = 92
"""Room right of the plot for what a bar comes to."""
BAR, GAP = 30, 14
CHARACTER = 0.58
"""Of the type's size: the mean width of a character of a wide sans-serif; room is better left over."""
BOLD = 0.7
"""The same of the title."""
LETTER = 15
"""Room that a letter needs in a bar."""
RIGHT_EDGE = 3.0
"""A limit this many times beyond the longest bar is said, not drawn."""

STYLE = """
svg { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --over: #b42318; font-family: system-ui, "DejaVu Sans", Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181c; --ink: #e6e9ec; --soft: #9da7b1; --line: #3a424b; --over: #ff8f85; } }
.paper { fill: var(--paper); } text { fill: var(--ink); font-size: 14px; }
.title { font-size: 19px; font-weight: 600; } .soft { fill: var(--soft); font-size: 13px; }
.over { fill: var(--over); font-weight: 600; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.limit { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 6 4; }
.halo { stroke: var(--paper); stroke-width: 6; }
.part { stroke: var(--paper); stroke-width: 1; }
.letter { font-size: 13px; font-weight: 600; text-anchor: middle; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
"""


def draw(
    title: str, notes: Sequence[str], rows: Sequence[tuple[str, Phase]], limit: float | None = None
) -> str:
    """The SVG's text. ``rows``: what a bar is called and what it holds; ``notes``: lines below the title."""
    most = max((float(phase.bytes) for _, phase in rows), default=0.0) or 1.0
    shown = limit if limit is not None and limit <= RIGHT_EDGE * most else None
    left = MARGIN + max((wide(name, 14) for name, _ in rows), default=0) + 10
    right = WIDTH - MARGIN - TOTALS
    reach = max(most, shown or 0.0) * (1.02 if shown is None or shown >= most else 1.0)
    lines = [line for note in notes for line in folded(note, WIDTH - 2 * MARGIN, 13)]
    top = MARGIN + 24 + 20 * len(lines) + (34 if limit is not None else 14)
    bottom = top + len(rows) * (BAR + GAP)
    parts = _head(title, lines)
    parts += _axis(left, right, top, bottom, reach)
    for i, (name, phase) in enumerate(rows):
        parts += _bar(name, phase, left, top + i * (BAR + GAP) + GAP / 2, (right - left) / reach, limit)
    if limit is not None:
        parts += _limit(limit, shown, left, right, top, bottom, reach)
    legend, end = _legend([phase for _, phase in rows], bottom + 62)
    said = "; ".join(f"{name} {size(float(phase.bytes))}" for name, phase in rows)
    return _svg(f"{title}: {said}", [*parts, *legend], end + MARGIN - 8)


def wide(text: str, points: float) -> float:
    """About how wide a text is, never less."""
    return len(text) * points * CHARACTER


def folded(text: str, room: float, points: float) -> list[str]:
    """The text in lines that fit, broken between words, or within one that is longer than a line."""
    most, lines = max(8, int(room / (points * CHARACTER))), [""]
    for word in printable(text).split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while len(lines[-1]) > most:
            lines[-1:] = [lines[-1][:most], lines[-1][most:]]
    return lines if lines[0] else []


def ticks(reach: float) -> tuple[list[float], int]:
    """Round values in bytes from 0 on, and their unit."""
    unit = 1024 * GIB if reach >= 4096 * GIB else GIB if reach >= 2 * GIB else MIB
    raw = reach / unit / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999) * unit
    return [i * step for i in range(int(reach / step + 1e-9) + 1)], unit


def _head(title: str, notes: Sequence[str]) -> list[str]:
    most = int((WIDTH - 2 * MARGIN) / (19 * BOLD))
    title = printable(title)
    shown = title if len(title) <= most else f"{title[: most - 1]}…"
    lines = [_text(MARGIN, MARGIN + 18, shown, "title")]
    return [*lines, *(_text(MARGIN, MARGIN + 42 + 20 * i, note, "soft") for i, note in enumerate(notes))]


def _axis(left: float, right: float, top: float, bottom: float, reach: float) -> list[str]:
    values, unit = ticks(reach)
    parts = []
    for value in values:
        x = left + value / reach * (right - left)
        parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(_text(x, bottom + 18, f"{value / unit:,.6g}", "soft middle"))
    parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
    name = {MIB: "MiB", GIB: "GiB"}.get(unit, "TiB")
    return [*parts, _text(WIDTH - MARGIN, bottom + 18, name, "soft end")]


def _bar(name: str, phase: Phase, left: float, y: float, scale: float, limit: float | None) -> list[str]:
    parts = [_text(left - 10, y + BAR / 2 + 5, printable(name), "end")]
    line = None if limit is None else left + limit * scale
    below = 0.0
    for kind, bytes in kinds_of(phase).items():
        x, wide_ = left + below * scale, bytes * scale
        below += bytes
        colour = COLOURS.get(kind, "#bbbbbb")
        parts.append(
            f'<rect class="part" x="{x:.2f}" y="{y:.1f}" width="{wide_:.2f}" height="{BAR}" fill="{colour}">'
            f"<title>{escape(f'{kind}: {size(bytes)}')}</title></rect>"
        )
        middle = _beside(x, x + wide_, line)
        if middle is not None:
            place = f'x="{middle:.1f}" y="{y + BAR / 2 + 5:.1f}" style="fill: {ink(kind)}"'
            parts.append(f'<text class="letter" {place}>{escape(letter(kind))}</text>')
    over = limit is not None and phase.bytes > limit
    return [*parts, _text(WIDTH - MARGIN, y + BAR / 2 + 5, size(below), "end over" if over else "end")]


def _beside(start: float, end: float, line: float | None) -> float | None:
    """Where a letter stands: in the middle, or on the wider side of the limit; None without room."""
    if line is not None and start < line < end and abs((start + end) / 2 - line) < LETTER:
        start, end = (start, line) if line - start > end - line else (line, end)
    return (start + end) / 2 if end - start >= LETTER else None


def _limit(
    limit: float, shown: float | None, left: float, right: float, top: float, bottom: float, reach: float
) -> list[str]:
    """The line with its label above it, kept within the picture; or only the words."""
    if shown is None:
        told = f"available: {size(limit)}, far beyond the right edge"
        return [_text(right, top - 8, told, "soft end")]
    x, told = left + limit / reach * (right - left), f"{size(limit)} available"
    half = wide(told, 14) / 2
    label = _text(min(max(x, MARGIN + half), WIDTH - MARGIN - half), top - 10, told, "middle")
    path = f'd="M{x:.1f} {top - 4:.1f}V{bottom:.1f}"'
    return [f'<path class="halo" {path}/>', f'<path class="limit" {path}/>', label]


def _legend(phases: Sequence[Phase], y: float) -> tuple[list[str], float]:
    """Squares with letters and names, as many a line as fit; and where the last line stands."""
    held = {kind for phase in phases for kind in kinds_of(phase)}
    parts, x = list[str](), float(MARGIN)
    for kind in [*(k for k in KINDS if k in held), *sorted(held - set(KINDS))]:
        room = 30 + wide(kind, 14) + 16
        if x + room > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 28
        colour = COLOURS.get(kind, "#bbbbbb")
        parts.append(f'<rect x="{x:.1f}" y="{y - 15:.1f}" width="20" height="20" fill="{colour}"/>')
        place = f'x="{x + 10:.1f}" y="{y:.1f}" style="fill: {ink(kind)}"'
        parts.append(f'<text class="letter" {place}>{escape(letter(kind))}</text>')
        parts.append(_text(x + 28, y, kind, ""))
        x += room
    return parts, y


def _text(x: float, y: float, text: str, classes: str) -> str:
    named = f' class="{classes}"' if classes else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}>{escape(text)}</text>'


def _svg(description: str, parts: Sequence[str], height: float) -> str:
    view = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    label = quoteattr(printable(description))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {view} role="img" aria-label={label}>'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>'
    return "\n".join([opening, f"<style>{STYLE}</style>", paper, *parts, "</svg>"]) + "\n"
