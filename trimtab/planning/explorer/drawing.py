"""A method's data flow (``flows.py``) as SVG: rows from top to bottom, arrows with the numbers of a list.

Arrows to the next row go straight; those that skip rows, and gradients on their way back, run in lanes beside
the rows, so that no arrow crosses a box. What an arrow carries stands in the list, where there is room.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from trimtab.planning.flows import Edge, Flow, Node

WIDTH, LANE, MARGIN = 432.0, 22.0, 12.0
GAP, BETWEEN, LINE, PAD = 54.0, 16.0, 17.0, 12.0
CHARACTER = 6.9
"""Width of a letter at the size of a label, a little more than the mean."""
Side = Literal["left", "right"]


@dataclass(slots=True)
class Box:
    """A node where it stands."""

    node: Node
    lines: list[str]
    row: int
    first: bool
    """The leftmost of its row."""
    last: bool
    left: float = 0.0
    top: float = 0.0
    width: float = 0.0
    height: float = 0.0

    @property
    def middle(self) -> float:
        """Of its width."""
        return self.left + self.width / 2


def told(flow: Flow) -> list[tuple[str, str]]:
    """From where to where, and what, of each arrow in the order of their numbers."""
    # A loss is its formula and a reward lists its kinds: too long to be said of every arrow.
    names = {node.id: "loss" if node.kind == "loss" else node.label.partition(":")[0] for node in flow.nodes}
    return [(f"{names[edge.source]} → {names[edge.target]}", edge.label) for edge in flow.edges]


def draw(flow: Flow, title: str) -> str:
    """The SVG. ``title``: what a screen reader says of it; the list of :func:`told` has the rest."""
    lanes = _lanes(flow)
    room = {side: max(MARGIN, LANE * (len(edges) + 0.75)) for side, edges in lanes.items()}
    boxes = _boxes(flow, room["left"], WIDTH - room["right"])
    height = max(box.top + box.height for box in boxes.values()) + MARGIN
    paths, numbers = [], []
    for number, edge in enumerate(flow.edges, 1):
        side = next((side for side, edges in lanes.items() if edge in edges), None)
        if side is None:
            points = _straight(flow, edge, boxes)
        else:
            at = lanes[side].index(edge)
            x = (
                room["left"] - LANE * (at + 0.75)
                if side == "left"
                else WIDTH - room["right"] + LANE * (at + 0.75)
            )
            points = _around(flow, edge, boxes, lanes, side, x)
        gradient = edge.label == "gradient"
        paths.append(_arrow(points, gradient))
        numbers.append(_number(number, points, gradient))
    drawn = [*paths, *(_drawn(box) for box in boxes.values()), *numbers]
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg>"
    )


def _rows(flow: Flow) -> list[list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in flow.nodes:
        found.setdefault(node.column, []).append(node)
    # The policy stands left of whoever is beside it, so that its gradient comes by the left lane.
    return [sorted(found[key], key=lambda node: node.id != "policy") for key in sorted(found)]


def _lanes(flow: Flow) -> dict[Side, list[Edge]]:
    """The arrows that go around, inner lanes first."""
    rows = _rows(flow)
    place = {node.id: (i, k, len(row)) for i, row in enumerate(rows) for k, node in enumerate(row)}
    found: dict[Side, list[Edge]] = {"left": [], "right": []}
    for edge in flow.edges:
        (start, at, among), (end, end_at, end_among) = place[edge.source], place[edge.target]
        if start == end or end == start + 1:
            continue
        if end > start:
            found["left" if at == 0 and among > 1 else "right"].append(edge)
        else:
            found["right" if end_at == end_among - 1 and end_among > 1 else "left"].append(edge)
    for edges in found.values():
        edges.sort(key=lambda edge: abs(place[edge.source][0] - place[edge.target][0]))
    return found


def _boxes(flow: Flow, left: float, right: float) -> dict[str, Box]:
    found: dict[str, Box] = {}
    top = MARGIN
    for row, nodes in enumerate(_rows(flow)):
        width = min(215.0, (right - left - BETWEEN * (len(nodes) - 1)) / len(nodes))
        boxes = []
        for node in nodes:
            lines = textwrap.wrap(
                node.label, max(6, int((width - 2 * PAD) / CHARACTER)), break_long_words=False
            )
            boxes.append(Box(node, lines, row, node is nodes[0], node is nodes[-1], width=width))
        height = max(len(box.lines) + bool(_note(box.node)) for box in boxes) * LINE + 2 * PAD
        x = left + (right - left - width * len(nodes) - BETWEEN * (len(nodes) - 1)) / 2
        for box in boxes:
            box.left, box.top, box.height = x, top, height
            x += width + BETWEEN
            found[box.node.id] = box
        top += height + GAP
    return found


def _note(node: Node) -> str:
    """The small line in a box."""
    if node.learns:
        return "learns"
    return "if it is a model" if node.optional else "frozen" if node.kind == "model" else ""


def _spread(index: int, count: int, start: float, length: float) -> float:
    """The place of one of several arrows on a side of a box."""
    return start + length * (index + 1) / (count + 1)


def _straight(flow: Flow, edge: Edge, boxes: dict[str, Box]) -> list[tuple[float, float]]:
    source, target = boxes[edge.source], boxes[edge.target]
    if source.row == target.row:
        y = source.top + source.height / 2
        ends = (
            (source.left + source.width, target.left)
            if source.left < target.left
            else (source.left, target.left + target.width)
        )
        return [(ends[0], y), (ends[1], y)]

    def down(one: Edge) -> bool:
        return boxes[one.target].row == boxes[one.source].row + 1

    out = sorted(
        (e for e in flow.edges if e.source == edge.source and down(e)), key=lambda e: boxes[e.target].middle
    )
    into = sorted(
        (e for e in flow.edges if e.target == edge.target and down(e)), key=lambda e: boxes[e.source].middle
    )
    x1 = _spread(out.index(edge), len(out), source.left, source.width)
    x2 = _spread(into.index(edge), len(into), target.left, target.width)
    if len(out) == len(into) == 1:
        # Nothing else to make room for: straight down where the boxes overlap.
        x1 = x2 = min(max(x1, target.left + PAD), target.left + target.width - PAD)
    return [(x1, source.top + source.height), (x2, target.top)]


def _around(
    flow: Flow,
    edge: Edge,
    boxes: dict[str, Box],
    lanes: dict[Side, list[Edge]],
    side: Side,
    x: float,
) -> list[tuple[float, float]]:
    """Out by a side, along the lane, in by the same side."""

    def port(box: Box) -> tuple[float, float]:
        # In the order of the other ends, so that arrows from one side do not cross each other.
        here = sorted(
            (one for one in lanes[side] if box.node.id in (one.source, one.target)),
            key=lambda one: boxes[one.target if one.source == box.node.id else one.source].top,
        )
        edge_x = box.left if side == "left" else box.left + box.width
        return edge_x, _spread(here.index(edge), len(here), box.top, box.height)

    (x1, y1), (x2, y2) = port(boxes[edge.source]), port(boxes[edge.target])
    return [(x1, y1), (x, y1), (x, y2), (x2, y2)]


def _arrow(points: Sequence[tuple[float, float]], gradient: bool) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    (x1, y1), (x2, y2) = points[-2:]
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5 or 1.0
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    head = [
        (x2, y2),
        (x2 - 9 * dx - 4 * dy, y2 - 9 * dy + 4 * dx),
        (x2 - 9 * dx + 4 * dy, y2 - 9 * dy - 4 * dx),
    ]
    corners = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in head) + "Z"
    kind = " gradient" if gradient else ""
    return f'<path class="edge{kind}" d="{path}"/><path class="head{kind}" d="{corners}"/>'


def _number(number: int, points: Sequence[tuple[float, float]], gradient: bool) -> str:
    pairs = list(itertools.pairwise(points))
    (x1, y1), (x2, y2) = max(
        pairs, key=lambda pair: abs(pair[0][0] - pair[1][0]) + abs(pair[0][1] - pair[1][1])
    )
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    kind = " gradient" if gradient else ""
    return (
        f'<circle class="count{kind}" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
        f'<text class="small" text-anchor="middle" x="{x:.1f}" y="{y + 4:.1f}">{number}</text>'
    )


def _drawn(box: Box) -> str:
    node = box.node
    kinds = ["node", node.kind, *(["learns"] if node.learns else []), *(["maybe"] if node.optional else [])]
    corner = 14 if node.kind == "data" else 3
    note = _note(node)
    lines = [*((line, "") for line in box.lines), *([(note, "small")] if note else [])]
    y = box.top + box.height / 2 - LINE * len(lines) / 2 + 13
    written = '<text class="{}" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>'
    texts = [
        written.format(kind, box.middle, y + i * LINE, escape(line)) for i, (line, kind) in enumerate(lines)
    ]
    return (
        f'<rect class="{" ".join(kinds)}" x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{corner}"/>{"".join(texts)}'
    )
