"""Stacked bars of text: every cell is its kind's letter, on the kind's colour where there are colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.planning.look import COLOURS, ink, kinds_of, letter, size
from trimtab.planning.result import KINDS, Phase

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDEST = 120
"""Columns: a wider terminal's bars only grow emptier."""
RIGHT_EDGE = 3.0
"""A device this many times as large as the peak is not drawn: every bar would be a stub."""


def bars(rows: Sequence[tuple[str, Phase]], limit: float | None, console: Console) -> list[Text]:
    """A stacked bar for each row, to one scale, with the limit as a line across them."""
    from rich.text import Text

    if not rows:
        return []
    names = max(len(name) for name, _ in rows)
    most = max(float(phase.bytes) for _, phase in rows)
    drawn = limit if limit is not None and limit <= RIGHT_EDGE * most else None
    scale = max(most, drawn or 0.0) or 1.0
    room = max(10, min(console.width, WIDEST) - names - 5 - 9)
    column = None if drawn is None else round(drawn / scale * room)
    lines = []
    for name, phase in rows:
        cells = [
            (kind, char) for kind, n in cells_of(kinds_of(phase), scale, room) for char in letter(kind) * n
        ]
        line = Text(f"  {name:<{names}} ")
        for i in range(room + 1):
            if i == column:
                over = phase.bytes > (limit or 0.0)
                line.append("|", style="bold red" if over else "bold")
            if i < len(cells):
                line.append(cells[i][1], style=style_of(cells[i][0], console))
            elif i < room:
                line.append(" ")
        line.append(f" {size(float(phase.bytes)):>9}")
        lines.append(line)
    if limit is None:
        return lines
    if column is None:
        return [*lines, Text(f"  the limit, {size(limit)}, lies far beyond the right edge", style="dim")]
    label = f"{size(limit)} available"
    start = names + 3 + column
    note = f"{label} ^" if start > console.width - len(label) - 3 else f"^ {label}"
    lines.append(Text(" " * (start - (len(label) + 1 if note.endswith("^") else 0)) + note, style="bold"))
    return lines


def cells_of(held: Mapping[str, float], scale: float, room: int) -> list[tuple[str, int]]:
    """(kind, character cells): edges are rounded, not lengths, so that a bar ends where its sum does."""
    cells, below = [], 0.0
    for kind, bytes in held.items():
        start, below = round(below / scale * room), below + bytes
        cells.append((kind, round(below / scale * room) - start))
    return cells


def legend(phases: Sequence[Phase], console: Console) -> list[Text]:
    """The letters of the kinds that these phases hold, in lines that fit."""
    from rich.text import Text

    held = {kind for phase in phases for kind in kinds_of(phase)}
    lines = [Text(" ")]
    for kind in (kind for kind in KINDS if kind in held):
        if lines[-1].cell_len + len(kind) + 4 > console.width:
            lines.append(Text(" "))
        lines[-1].append(" ").append(letter(kind), style=style_of(kind, console)).append(f" {kind} ")
    return lines


def style_of(kind: str, console: Console) -> str:
    """Letters on the kind's colour; a console without colours leaves them out."""
    return f"{ink(kind)} on {COLOURS.get(kind, '#bbbbbb')}" if console.is_terminal else ""
