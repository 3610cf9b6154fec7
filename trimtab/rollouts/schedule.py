"""Which responses run: rows that grow by a token a step, and the queue that fills the rows that fall free."""

from __future__ import annotations

from collections import deque

import numpy as np

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.kernels.decode import BLOCK, Plan, Stretch
from trimtab.rollouts.cache import Blocks, Node, blocks_for, prompt_tree
from trimtab.rollouts.finish import Transcript
from trimtab.rollouts.sampling import SamplingConfig

ROWS = 256
"""Rows at most where nothing is asked for: beyond it a step takes longer about in proportion."""


class Rows:
    """The running responses as arrays, one entry a row; the first ``count`` are in use.

    A row that has drawn t tokens has the keys and values of t − 1: the last one's are made by the next step.
    """

    FIELDS = ("request", "group", "key", "drawn", "stored", "position", "limit", "slot", "table")

    def __init__(self, capacity: int, new_tokens: int) -> None:
        self.count = 0
        self.request, self.group, self.slot = (np.zeros(capacity, dtype=np.int64) for _ in range(3))
        self.key = np.zeros(capacity, dtype=np.uint64)
        """Of the noise."""
        self.drawn, self.stored, self.position, self.limit = (
            np.zeros(capacity, dtype=np.int32) for _ in range(4)
        )
        """Tokens drawn, tokens in the cache, the position of the next token in its sequence, and how many
        tokens it may have."""
        self.table = np.zeros((capacity, max(1, blocks_for(new_tokens - 1))), dtype=np.int32)
        """Own blocks."""
        # By slot, which a row keeps when others leave and it moves up.
        self.tokens = np.zeros((capacity, new_tokens), dtype=np.int64)
        self.logps = np.zeros((capacity, new_tokens), dtype=np.float32)
        self._slots = list(range(capacity - 1, -1, -1))
        self.fresh = 0
        """Rows at the end that have drawn nothing."""

    def add(self, group: int, requests: range, keys: np.ndarray, position: int, limit: int) -> None:
        """New rows behind the others."""
        new = slice(self.count, self.count + len(requests))
        self.request[new], self.group[new], self.key[new] = requests, group, keys
        self.drawn[new], self.stored[new], self.position[new], self.limit[new] = 0, 0, position, limit
        self.slot[new] = [self._slots.pop() for _ in requests]
        self.count += len(requests)
        self.fresh += len(requests)

    def record(self, tokens: np.ndarray, logps: np.ndarray) -> None:
        """A drawn token for every row."""
        r = slice(0, self.count)
        self.tokens[self.slot[r], self.drawn[r]] = tokens
        self.logps[self.slot[r], self.drawn[r]] = logps
        self.drawn[r] += 1
        self.fresh = 0

    def transcript(self, row: int) -> Transcript:
        """What a row has drawn."""
        made, slot, drawn = Transcript(int(self.limit[row])), self.slot[row], self.drawn[row]
        made.tokens, made.logps = self.tokens[slot, :drawn].tolist(), self.logps[slot, :drawn].tolist()
        return made

    def extend(self, blocks: Blocks) -> None:
        """A new own block for every row whose last one is full."""
        stored = self.stored[: self.count]
        for row in np.flatnonzero(stored % BLOCK == 0).tolist():
            self.table[row, stored[row] // BLOCK] = blocks.take(1)[0]

    def remove(self, rows: np.ndarray, blocks: Blocks) -> None:
        """These rows are finished: their blocks and slots are free, the others move up."""
        for row in rows.tolist():
            blocks.give(self.table[row, : blocks_for(int(self.stored[row]))].tolist())
            self._slots.append(int(self.slot[row]))
        keep = np.delete(np.arange(self.count), rows)
        self.count = len(keep)
        for name in self.FIELDS:
            array = getattr(self, name)
            array[: self.count] = array[keep]


class Queue:
    """Groups that wait, in an order in which those with a common beginning are neighbours.

    A response is let in only when its prompt and its longest possible continuation fit: nothing that runs
    ever has to give way.
    """

    def __init__(self, groups: list[Group], n: int, config: SamplingConfig) -> None:
        self.n = n
        self.own = blocks_for(config.max_new_tokens - 1)
        self.leaves, order = prompt_tree([group.prompt_tokens or [] for group in groups])
        self.waiting = deque(order)
        self.admitted = [0] * len(groups)
        """Samples let in, by group."""
        self._held = 0

    @property
    def demand(self) -> int:
        """Blocks that would let everything run at once."""
        nodes = {id(node): node for leaf in self.leaves for node in leaf.chain()}
        return sum(node.size for node in nodes.values()) + len(self.leaves) * self.n * self.own

    def check(self, budget: int, block_bytes: int, config: SamplingConfig) -> None:
        """Raises InputError where one sequence alone is more than the budget of blocks."""
        need, leaf = max(
            ((sum(n.size for n in leaf.chain()) + self.own, leaf) for leaf in self.leaves), key=lambda x: x[0]
        )
        if need > budget:
            prompt = leaf.start + len(leaf.tokens)
            raise InputError(
                f"sampling.cache_mb is {config.cache_mb}, but one sequence of {prompt} prompt and "
                f"{config.max_new_tokens} new tokens needs {-(-need * block_bytes // 2**20)} MiB of keys and "
                "values; raise it, or lower sampling.max_new_tokens or data.max_prompt_tokens"
            )

    def admit(self, blocks: Blocks, running: int, most: int) -> tuple[list[tuple[int, range]], list[Node]]:
        """What fits now: (group, its samples) in order, and the nodes to be computed for them."""
        admitted: list[tuple[int, range]] = []
        nodes: list[Node] = []
        free = blocks.capacity - self._held - running * self.own
        while self.waiting and running < most:
            group = self.waiting[0]
            missing = [node for node in self.leaves[group].chain() if not node.blocks]
            free -= sum(node.size for node in missing)
            left = self.n - self.admitted[group]
            count = min(left, most - running, free // self.own if self.own else left)
            if count <= 0:
                break
            for node in missing:
                node.blocks = blocks.take(node.size)
                self._held += node.size
            nodes += missing
            admitted.append((group, range(self.admitted[group], self.admitted[group] + count)))
            self.admitted[group] += count
            free -= count * self.own
            running += count
            if count == left:
                self.waiting.popleft()
        return admitted, nodes

    def release(self, group: int, blocks: Blocks) -> None:
        """A group has finished: what no other group needs is free."""
        for node in self.leaves[group].chain():
            node.groups -= 1
            if node.groups == 0:
                blocks.give(node.blocks)
                self._held -= node.size
                node.blocks = []

    def plan(self, rows: Rows) -> Plan:
        """Who attends to what, for the rows that run now."""
        members: dict[int, tuple[Node, list[int]]] = {}
        for row, group in enumerate(rows.group[: rows.count].tolist()):
            node: Node | None = self.leaves[group]
            while node is not None:
                members.setdefault(id(node), (node, []))[1].append(row)
                node = node.parent
        shared = [Stretch(n.blocks, n.start, len(n.tokens), below) for n, below in members.values()]
        r = slice(0, rows.count)
        return Plan(shared, rows.table[r], rows.stored[r], rows.position[r])
