"""Attention of a decode step over a cache in blocks, storing to it, and drawing tokens.

Shapes: R rows (running responses), H heads, K kv heads, d and e the widths of a key and a value. A cache
holds keys ``[blocks, K, d, BLOCK]`` and values ``[blocks, K, BLOCK, E]``, E being e rounded up to
:data:`ALIGN`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from trimtab.kernels.build import library
from trimtab.kernels.call import compiled

BLOCK = 32
"""Tokens of a block."""
SPAN = 256
"""Keys of one part; a node longer than that is several tasks, which threads share."""
ALIGN = 16
_HEADER = 16


class Heads(NamedTuple):
    """What a layer's attention is given for L new tokens: their heads, and how scores are made of them."""

    query: torch.Tensor
    """``[1, H, L, d]``"""
    key: torch.Tensor
    """``[1, K, L, d]``"""
    value: torch.Tensor
    """``[1, K, L, e]``"""
    scale: float
    softcap: float | None = None
    window: int | None = None
    """How many positions back a token sees, itself included."""


class Stretch(NamedTuple):
    """Keys that several rows attend to: a node of the tree of prompts."""

    blocks: Sequence[int]
    start: int
    """Position of the first key."""
    length: int
    rows: Sequence[int]


class _Struct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "d", "dv", "dvp")),
        *((name, ctypes.c_int64) for name in ("tasks", "stride", "own_parts")),
        *((name, ctypes.c_void_p) for name in ("task_block", "task_keys", "task_start", "task_first")),
        *((name, ctypes.c_void_p) for name in ("task_rows", "blocks", "row_first", "row_slots")),
        *((name, ctypes.c_void_p) for name in ("own_blocks", "own_len", "position", "parts")),
    )


class Plan:
    """Who attends to what. Made anew when the set of rows changes; between, the three own arrays move on.

    ``own_blocks [R, …]``, ``own_len [R]`` (tokens stored, not the step's own) and ``position [R]`` (of the
    step's own token) are int32 and read in place at every step.
    """

    def __init__(
        self, shared: list[Stretch], own_blocks: np.ndarray, own_len: np.ndarray, position: np.ndarray
    ) -> None:
        self.shared, self.own_blocks, self.own_len, self.position = shared, own_blocks, own_len, position
        self.rows = len(own_len)
        block: list[int] = []
        keys: list[int] = []
        start: list[int] = []
        first, rows, blocks = [0], list[int](), list[int]()
        for node in shared:
            for at in range(0, node.length, SPAN):
                block.append(len(blocks) + at // BLOCK)
                keys.append(min(SPAN, node.length - at))
                start.append(node.start + at)
                rows.extend(node.rows)
                first.append(len(rows))
            blocks.extend(node.blocks)
        order = np.argsort(np.array(rows, dtype=np.int32), kind="stable")
        counts = np.bincount(np.array(rows, dtype=np.int64), minlength=self.rows)
        arrays = {
            "task_block": block,
            "task_keys": keys,
            "task_start": start,
            "task_first": first,
            "task_rows": rows,
            "blocks": blocks,
            "row_slots": order,
            "row_first": np.concatenate([[0], counts.cumsum()]),
        }
        self._arrays = {name: np.array(values, dtype=np.int32) for name, values in arrays.items()}
        own_parts = -(-own_blocks.shape[1] * BLOCK // SPAN)
        self.slots = len(rows) + self.rows * own_parts
        self.struct = _Struct(rows=self.rows, tasks=len(keys), stride=own_blocks.strides[0] // 4)
        self.struct.own_parts = own_parts
        for name, array in (*self._arrays.items(), ("own_blocks", own_blocks), ("own_len", own_len)):
            setattr(self.struct, name, array.ctypes.data)
        self.struct.position = position.ctypes.data
        self._shape: tuple[int, ...] = ()
        self._parts = torch.empty(0)
        self._step = np.zeros(3, dtype=np.int64)
        self.pointer = ctypes.addressof(self.struct)
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None
        """The plain form's: blocks of every row and the position of every key in them."""

    def shape(self, *shape: int) -> None:
        """Set (heads, kv heads, d, e, E) of the layer that is next; layers may differ."""
        if shape == self._shape:
            return
        self._shape = shape
        s = self.struct
        s.heads, s.kv_heads, s.d, s.dv, s.dvp = shape
        size = self.slots * shape[0] * (shape[4] + _HEADER)
        if self._parts.numel() < size:
            self._parts = torch.empty(size)
            s.parts = self._parts.data_ptr()


def attend(plan: Plan, new: Heads, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Store the keys and values of the step's tokens, one a row, then attend: ``[1, R, H, e]``.

    Each row sees its stretches, its own tokens and the new one, as far as the window reaches.
    """
    if not compiled(*new[:3], keys, values) or keys.shape[2] > 1024 or values.shape[3] > 1024:
        return attend_plain(plan, new, keys, values)
    query, key, value = map(_by_row, new[:3])
    rows, heads, width = query.shape[2], query.shape[1], value.shape[3]
    plan.shape(heads, keys.shape[1], query.shape[3], width, values.shape[3])
    plan._step[:] = query.stride(2), key.stride(2), value.stride(2)
    out = torch.empty((1, rows, heads, width), dtype=query.dtype)
    _attend()(
        *(plan.pointer, query.data_ptr(), key.data_ptr(), value.data_ptr(), plan._step.ctypes.data),
        *(keys.data_ptr(), values.data_ptr(), out.data_ptr(), new.scale, new.softcap or 0.0, new.window or 0),
        query.dtype == torch.bfloat16,
    )
    return out


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """``[1, heads, R, width]`` with each row's heads one after another in memory."""
    if x.stride(3) == 1 and (x.stride(1) == x.shape[3] or x.shape[1] == 1):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attend_plain(plan: Plan, new: Heads, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """:func:`attend` written out: each row gathers all its keys, and one softmax runs over them."""
    query, key, value, scale, softcap, window = new
    device = query.device
    length = torch.from_numpy(plan.own_len).to(device).long()
    table = torch.from_numpy(plan.own_blocks).to(device).long()
    rows = torch.arange(plan.rows, device=device)
    block, place = table[rows, length // BLOCK], length % BLOCK
    keys[block, :, :, place] = key[0].transpose(0, 1)
    values[block, :, place, : value.shape[-1]] = value[0].transpose(0, 1)
    if plan.table is None:
        plan.table = _table(plan, device)
    shared, places = plan.table
    now = torch.from_numpy(plan.position).to(device).long()
    own = torch.arange(table.shape[1] * BLOCK, device=device)
    used = int(length.max()) // BLOCK + 1
    own_places = torch.where(own <= length[:, None], own + (now - length)[:, None], -1)[:, : used * BLOCK]
    blocks, at = torch.cat([shared, table[:, :used]], dim=1), torch.cat([places, own_places], dim=1)
    seen = at >= 0
    if window is not None:
        seen &= now[:, None] - at < window
    kv_heads, width = keys.shape[1], value.shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    k = keys[blocks].permute(0, 2, 1, 4, 3).reshape(plan.rows, kv_heads, -1, keys.shape[2]).to(wide)
    v = values[blocks].permute(0, 2, 1, 3, 4).reshape(plan.rows, kv_heads, -1, values.shape[3]).to(wide)
    q = query[0].transpose(0, 1).reshape(plan.rows, kv_heads, -1, query.shape[-1]).to(wide)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1)
    # What a block holds beyond its tokens is whatever was there before; zero times it need not be zero.
    out = weights @ v[..., :width].masked_fill(~seen[:, None, :, None], 0.0)
    return out.to(query.dtype).reshape(1, plan.rows, query.shape[1], width)


def _table(plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's shared blocks ``[R, B]`` and the position of each of their keys, −1 where there is none."""
    blocks: list[list[int]] = [[] for _ in range(plan.rows)]
    places: list[list[int]] = [[] for _ in range(plan.rows)]
    for node in plan.shared:
        count = -(-node.length // BLOCK)
        at = [node.start + i if i < node.length else -1 for i in range(count * BLOCK)]
        for row in node.rows:
            blocks[row] += list(node.blocks[:count])
            places[row] += at
    most = max(map(len, blocks))
    return (
        torch.tensor([b + [0] * (most - len(b)) for b in blocks], device=device),
        torch.tensor([p + [-1] * (most * BLOCK - len(p)) for p in places], device=device),
    )


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """Write ``key [1, K, S, d]``, ``value [1, K, S, e]`` to each token's block and place, int32 ``[S]``."""
    if not compiled(key, value, keys, values):
        where, at = blocks.to(keys.device).long(), places.to(keys.device).long()
        keys[where, :, :, at] = key[0].transpose(0, 1)
        values[where, :, at, : value.shape[-1]] = value[0].transpose(0, 1)
        return
    key, value = _by_row(key), _by_row(value)
    shape = (ctypes.c_int64 * 4)(key.shape[1], key.shape[3], value.shape[3], values.shape[3])
    step = (ctypes.c_int64 * 2)(key.stride(2), value.stride(2))
    _store()(
        *(key.shape[2], shape, key.data_ptr(), value.data_ptr(), step, keys.data_ptr(), values.data_ptr()),
        *(blocks.data_ptr(), places.data_ptr(), key.dtype == torch.bfloat16),
    )


def draw(
    logits: torch.Tensor,
    temperature: float,
    hashes: torch.Tensor,
    keys: np.ndarray,
    positions: np.ndarray,
    held: np.ndarray,
    forbidden: np.ndarray,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens ``[R]`` and their log-probabilities, argmax(log p − log E); None where nothing is compiled.

    E is ``exponential_noise(keys, positions, hashes)`` of rollouts/sampling.py. ``forbidden`` ids (int64) are
    excluded in rows where ``held`` (bool) is true: ``logits [R, V]`` are overwritten there.
    """
    if not compiled(logits) or logits.stride(1) != 1:
        return None
    rows, vocab = logits.shape
    tokens, logps = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.float32)
    keys, positions = np.ascontiguousarray(keys, np.uint64), np.ascontiguousarray(positions, np.int32)
    _draw()(
        *(rows, vocab, logits.data_ptr(), logits.stride(0), 1 / temperature, hashes.data_ptr()),
        *(keys.ctypes.data, positions.ctypes.data, held.ctypes.data, len(forbidden), forbidden.ctypes.data),
        *(tokens.ctypes.data, logps.ctypes.data, logits.dtype == torch.bfloat16),
    )
    return tokens, logps


_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


def _function(name: str, *types: type) -> Callable[[], Any]:
    @functools.cache
    def found() -> Any:
        function = getattr(library(), name)
        function.argtypes = types
        function.restype = None
        return function

    return found


_attend = _function("trimtab_attend", *(_P,) * 8, _F, _F, _I, _I)
_store = _function("trimtab_store", _N, *(_P,) * 8, _I)
_draw = _function("trimtab_draw", _N, _N, _P, _N, _F, *(_P,) * 4, _N, *(_P,) * 3, _I)
