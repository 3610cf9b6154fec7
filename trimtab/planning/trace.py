"""The planner's formulas, written down while they run: what :class:`Quantity` puts in the place of numbers.

``memory_of(job)`` of a job whose sizes are quantities gives expressions instead of bytes. :class:`Table`
keeps each expression once, whatever formula it is met in, and :meth:`Table.written` gives the ones that are
needed as short lists, which some thirty lines in any language can compute (:func:`evaluate` is ours).

A quantity refuses whatever a formula cannot do without knowing its value: ``if``, ``<``, ``==``, ``int()``.
The formulas use ``numbers.py`` for that. Nothing is rounded or reordered: the same operations in the same
order give the same number; only x + 0, x·1, x·0 and what has no quantity in it are settled at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

Node = tuple[Any, ...]
"""(operation, …): ("i", name), ("k", number), or an operation and the places of what it is done to."""

SYMBOLS = {"+": "+", "-": "−", "*": "×", "/": "÷", "q": "//", "^": "**"}
CALLS = {"c": "ceil", "f": "floor", "M": "largest", "m": "smallest", "?": "choose"}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "q": lambda x, y: x // y,
    "^": lambda x, y: x**y,
    "c": math.ceil,
    "f": math.floor,
    "M": max,
    "m": min,
    "?": lambda positive, then, otherwise: then if positive > 0 else otherwise,
}
"""What the letters of a written table stand for. choose computes both, and takes one."""
LONGEST = 160
"""Characters of a formula in a message."""


class Unknown(TypeError):
    """A formula asked a quantity for its value."""


class Table:
    """Expressions, each once. Quantities of one table only go together."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._places: dict[Node, Quantity] = {}
        self.known: dict[tuple[Any, ...], Any] = {}
        """What operations came to that were met before."""

    def name(self, name: str) -> Quantity:
        """A number that is not known yet."""
        return self._kept(("i", name))

    def constant(self, value: Any) -> Quantity:
        """A number as a quantity, for where one is needed. Raises ValueError for nan and infinity."""
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"a formula may hold finite numbers only, not {value!r}")
        exact = math.floor(value)
        return self._kept(("k", exact if exact == value else float(value)))

    def apply(self, operation: str, *operands: Any) -> Any:
        """The operation on quantities and numbers: a quantity, or a number where no name is left in it."""
        settled = _settled(operation, operands)
        if settled is not None:
            return settled
        places = [self._place(operand) for operand in operands]
        if operation in "+*Mm" and places[0] > places[1]:
            # x + y and y + x are the same number, to the last bit.
            places.reverse()
        return self._kept((operation, *places))

    def _place(self, operand: Any) -> int:
        if not isinstance(operand, Quantity):
            operand = self.constant(operand)
        if operand.table is not self:
            raise ValueError(f"{operand} is of another table of formulas")
        place: int = operand.place
        return place

    def _kept(self, node: Node) -> Quantity:
        if node not in self._places:
            self._places[node] = Quantity(self, len(self.nodes))
            self.nodes.append(node)
        return self._places[node]

    def text(self, place: int, depth: int = 5) -> str:
        """The formula in letters, … below ``depth``."""
        operation, *operands = self.nodes[place]
        if operation in "ik":
            return f"{operands[0]}"
        if not depth:
            return "…"
        parts = [self.text(operand, depth - 1) for operand in operands]
        if operation in CALLS:
            return f"{CALLS[operation]}({', '.join(parts)})"
        return f"({parts[0]} {SYMBOLS[operation]} {parts[1]})"

    def written(self, wanted: Iterable[Any], names: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        """The formulas that ``wanted`` (quantities and numbers) need, and where each of these stands.

        {"names": of the inputs, "operations": a letter each, "operands": one flat list}: an operation on
        n things takes n operands, places of earlier ones; "i" takes a place in ``names``, "k" a number.
        """
        ends = [self._place(one) for one in wanted]
        needed = set(ends)
        for place in range(len(self.nodes) - 1, -1, -1):
            if place in needed and self.nodes[place][0] not in "ik":
                needed.update(self.nodes[place][1:])
        new = {place: i for i, place in enumerate(sorted(needed))}
        operations, operands = "", []
        for place in new:
            operation, *rest = self.nodes[place]
            operations += operation
            if operation == "i":
                operands.append(names.index(rest[0]))
            else:
                operands += rest if operation == "k" else [new[one] for one in rest]
        return {"names": list(names), "operations": operations, "operands": operands}, [new[e] for e in ends]


def evaluate(written: Mapping[str, Any], inputs: Mapping[str, float]) -> list[Any]:
    """The value of every formula of :meth:`Table.written`."""
    values: list[Any] = []
    operands = iter(written["operands"])
    for operation in written["operations"]:
        if operation == "k":
            values.append(next(operands))
        elif operation == "i":
            values.append(inputs[written["names"][next(operands)]])
        else:
            count = 1 if operation in "cf" else 3 if operation == "?" else 2
            values.append(OPERATIONS[operation](*(values[next(operands)] for _ in range(count))))
    return values


class Quantity:
    """A number that has a name or a formula, and no value yet."""

    __slots__ = ("place", "table")

    def __init__(self, table: Table, place: int) -> None:
        self.table = table
        self.place = place

    def __add__(self, other: Any) -> Any:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._known(("-", None, other, self.place), other, self)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other)

    def __truediv__(self, other: Any) -> Any:
        return self._with("/", other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._known(("/", None, other, self.place), other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._with("q", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._known(("q", None, other, self.place), other, self)

    def __pow__(self, other: Any) -> Any:
        return self._with("^", other)

    def __rpow__(self, other: Any) -> Any:
        return self._known(("^", None, other, self.place), other, self)

    def __neg__(self) -> Any:
        return self.table.apply("-", 0, self)

    def __pos__(self) -> Any:
        return self

    def ceil(self) -> Any:
        """For ``numbers.ceil``."""
        return self._known(("c", self.place), self)

    def floor(self) -> Any:
        """For ``numbers.floor``."""
        return self._known(("f", self.place), self)

    __ceil__ = ceil
    __floor__ = floor

    def largest(self, other: Any) -> Any:
        """For ``numbers.largest``."""
        return self._with("M", other)

    def smallest(self, other: Any) -> Any:
        """For ``numbers.smallest``."""
        return self._with("m", other)

    def choose(self, then: Any, otherwise: Any) -> Any:
        """For ``numbers.choose``."""
        return self.table.apply("?", self, then, otherwise)

    def _with(self, operation: str, other: Any) -> Any:
        if type(other) is not Quantity:
            return self._known((operation, self.place, None, other), self, other)
        if other.table is not self.table:
            return self.table.apply(operation, self, other)
        return self._known((operation, self.place, other.place), self, other)

    def _known(self, key: tuple[Any, ...], *operands: Any) -> Any:
        """``apply``, at once where the same was met before: combinations of options share most of it."""
        known = self.table.known
        found = known.get(key)
        if found is None:
            found = known[key] = self.table.apply(key[0], *operands)
        return found

    def __str__(self) -> str:
        text = self.table.text(self.place)
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    __repr__ = __str__

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unknown(
            f"a plan's formula asks for the value of {self}, which has none while it is written down: "
            "use ceil, floor, largest, smallest and choose of trimtab.planning.numbers"
        )

    __bool__ = __int__ = __float__ = __index__ = __round__ = __trunc__ = __abs__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refuse
    # Python's own == would say False of x == 0, and the formula would go on with the wrong branch.
    __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


def _settled(operation: str, operands: tuple[Any, ...]) -> Any:
    """What needs no formula: numbers alone, and what leaves a quantity as it is. None for the rest."""
    known = [not isinstance(operand, Quantity) for operand in operands]
    if all(known):
        return OPERATIONS[operation](*operands)
    x, y = operands[0], operands[1] if len(operands) > 1 else None
    if operation == "?":
        if known[0]:
            return OPERATIONS["?"](*operands)
        same = operands[1] is operands[2] or (known[1] and known[2] and operands[1] == operands[2])
        return operands[1] if same else None
    if operation in "cf":
        return x if x.table.nodes[x.place][0] in "cfq" else None
    if operation in "Mm":
        return x if x is y else None
    if operation in "*+" and known[0]:
        x, y, known = y, x, known[::-1]
    if known[1] and not known[0]:
        return _with_number(operation, x, y)
    return 0 if operation in "/q" and known[0] and x == 0 else None


def _with_number(operation: str, x: Quantity, y: Any) -> Any:
    """x ∘ y where y is a number that changes nothing, or everything."""
    if operation in "+-" and y == 0:
        return x
    if operation in "*/^" and y == 1:
        return x
    if operation == "q" and y == 1:
        return x.floor()
    return 0 if operation == "*" and y == 0 else 1 if operation == "^" and y == 0 else None
