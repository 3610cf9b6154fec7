"""What the engine keeps of the prompts: a tree of common beginnings, and keys and values in blocks.

Prompts that begin alike (a system prompt, the earlier turns of a conversation) share the node that holds
their common beginning. A node's keys and values are computed once, are attended to once for all rows below
it, and give their blocks back when the last group below it has finished.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from trimtab.kernels.decode import ALIGN, BLOCK

SHORTEST_SHARED = 16
"""A common beginning of fewer tokens is not worth a node of its own."""


class Shape(NamedTuple):
    """One layer's keys and values."""

    kv_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def stored_width(self) -> int:
        """A value's width as it is stored."""
        return -(-self.value_width // ALIGN) * ALIGN

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of this layer."""
        return self.kv_heads * BLOCK * (self.key_width + self.stored_width) * self.dtype.itemsize


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


class Blocks:
    """The pool: keys ``[blocks, kv heads, d, BLOCK]`` and values ``[blocks, kv heads, BLOCK, e]`` by layer.

    The tensors stay from call to call; what they hold does not. ``version`` is the weights' version that
    filled them: reading under another is an error, never a stale answer.
    """

    def __init__(self, shapes: dict[int, Shape], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.capacity = 0
        self.version = -1
        self.stack_agrees: bool | None = None
        """Whether the compiled stack of layers computes this model; None until it was compared."""
        self._free: list[int] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(shape.block_bytes for shape in self.shapes.values())

    @property
    def live(self) -> int:
        """Blocks in use."""
        return self.capacity - len(self._free)

    def begin(self, demand: int, budget: int, version: int) -> None:
        """Make room for ``demand`` blocks, at most ``budget``; forget whatever was there."""
        wanted = min(demand, budget)
        if self.capacity < wanted or self.capacity > budget:
            self.keys, self.values = {}, {}
            for layer, s in self.shapes.items():
                options = {"dtype": s.dtype, "device": self.device}
                # Not filled: memory that no block has been taken from is never touched, so it costs nothing.
                self.keys[layer] = torch.empty(wanted, s.kv_heads, s.key_width, BLOCK, **options)  # type: ignore[call-overload]
                self.values[layer] = torch.empty(wanted, s.kv_heads, BLOCK, s.stored_width, **options)  # type: ignore[call-overload]
            self.capacity = wanted
        self.version = version
        self.forget()

    def forget(self) -> None:
        """Everything is free."""
        # The lowest first, so that the same memory is used again and again.
        self._free = list(range(self.capacity - 1, -1, -1))

    def check(self, version: int) -> None:
        """Raises RuntimeError where the weights are no longer those that filled the cache."""
        if version != self.version:
            raise RuntimeError("the weights changed while a cache was in use")

    def take(self, count: int) -> list[int]:
        """``count`` free blocks."""
        return [self._free.pop() for _ in range(count)]

    def give(self, blocks: list[int]) -> None:
        """Back to the free ones."""
        self._free.extend(blocks)


class Node:
    """A stretch of prompt tokens that some groups have in common, or the rest of one group's prompt."""

    __slots__ = ("blocks", "groups", "parent", "start", "tokens")

    def __init__(self, tokens: list[int], start: int, parent: Node | None) -> None:
        self.tokens, self.start, self.parent = tokens, start, parent
        self.blocks: list[int] = []
        """Empty until its keys and values are computed."""
        self.groups = 0
        """Groups below it that have not finished."""

    @property
    def size(self) -> int:
        """Blocks that it needs."""
        return blocks_for(len(self.tokens))

    def chain(self) -> list[Node]:
        """From the root to this node."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def prompt_tree(prompts: list[list[int]]) -> tuple[list[Node], list[int]]:
    """Each prompt's last node; and the prompts in an order in which those that share a node are neighbours.

    That node holds at least the prompt's last token, so that the last hidden state is computed for each.
    """
    arrays = [np.array(p, dtype=np.int64) for p in prompts]
    leaves: dict[int, Node] = {}
    # (prompts in sorted order, where the parent ends, how far they are known to agree, parent)
    stack: list[tuple[list[int], int, int, Node | None]] = [
        (sorted(range(len(prompts)), key=prompts.__getitem__), 0, 0, None)
    ]
    while stack:
        members, start, known, parent = stack.pop()
        if len(members) == 1:
            leaves[members[0]] = Node(prompts[members[0]][start:], start, parent)
            continue
        first, last = arrays[members[0]], arrays[members[-1]]
        end = min(len(prompts[m]) for m in members) - 1
        # All that lies between the first and the last in sorted order agrees as far as these two do.
        differ = np.flatnonzero(first[known:end] != last[known:end])
        common = known + int(differ[0]) if len(differ) else end
        if common - start >= SHORTEST_SHARED:
            parent = Node(prompts[members[0]][start:common], start, parent)
            start = common
        parts: dict[object, list[int]] = {}
        for m in members:
            # A prompt that has only its last token left is a leaf, even where the others go on with it.
            ends = len(prompts[m]) == common + 1
            parts.setdefault(("leaf", m) if ends else prompts[m][common], []).append(m)
        # Popped in the order of their first prompt, so that groups finish about in the order given.
        stack.extend((p, start, common, parent) for p in sorted(parts.values(), key=min, reverse=True))
    for leaf in leaves.values():
        for node in leaf.chain():
            node.groups += 1
    return [leaves[i] for i in range(len(prompts))], list(leaves)
