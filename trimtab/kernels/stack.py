"""All layers of a decode step in one call: what ``models/lean.py`` does layer by layer, no Python between.

For bf16 on a CPU with a matrix unit. The plain form is the model's own trunk, with which the engine compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trimtab.kernels.build import library
from trimtab.kernels.decode import Plan
from trimtab.kernels.fused import Gate

Linear = tuple[torch.Tensor, torch.Tensor | None]
Norm = tuple[torch.Tensor, float]


class LayerWeights(NamedTuple):
    """One layer: its linear layers q, k, v, o, gate, up, down, its norms, and those of q's and k's heads."""

    linears: Sequence[Linear]
    norms: Sequence[Norm]
    head_norms: Sequence[Norm | None]
    keys: torch.Tensor
    values: torch.Tensor
    """The layer's cache, in the shapes of decode.py."""
    scale: float
    window: int | None


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p * 7),
        ("bias", ctypes.c_void_p * 7),
        ("norm", ctypes.c_void_p * 2),
        ("head_norm", ctypes.c_void_p * 2),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("eps", ctypes.c_double * 2),
        ("head_eps", ctypes.c_double * 2),
        ("scale", ctypes.c_double),
        ("window", ctypes.c_int64),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "heads", "kv_heads", "d", "inner", "kind")),
        ("offset", ctypes.c_double),
    )


class Stack:
    """The layers of one model, by their addresses: to be made anew when weights or caches have moved."""

    def __init__(self, layers: Sequence[LayerWeights], d: int, offset: float, kind: Gate) -> None:
        (q, _), (k, _), _, _, (gate, _), _, _ = layers[0].linears
        self.width, self.d = q.shape[1], d
        self.heads, self.kv_heads, self.inner = q.shape[0] // d, k.shape[0] // d, gate.shape[0]
        self._held = layers
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._shape = _Shape(
            *(self.width, self.heads, self.kv_heads, d, self.inner, int(kind == "gelu_tanh")), offset
        )
        self._room = torch.empty(0, dtype=torch.bfloat16)
        self._scales = torch.empty(0)

    def __call__(
        self, plan: Plan, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """``hidden [R, D]`` below the layers → above them, in place; ``cos`` and ``sin [R, d]``; all bf16."""
        rows = len(hidden)
        plan.shape(self.heads, self.kv_heads, self.d, self.d, self._held[0].values.shape[3])
        padded = (rows + 15) // 16 * 16
        widest = max(self.width, self.heads * self.d, self.inner)
        size = (
            rows * (self.width + 2 * (self.heads + self.kv_heads) * self.d + 2 * self.inner) + padded * widest
        )
        if self._room.numel() < size:
            self._room, self._scales = self._room.new_empty(size), torch.empty(rows * self.heads)
        library().trimtab_stack(  # type: ignore[union-attr]
            self._layers,
            ctypes.c_long(len(self._layers)),
            ctypes.byref(self._shape),
            ctypes.c_void_p(plan.pointer),
            ctypes.c_long(rows),
            *(ctypes.c_void_p(t.data_ptr()) for t in (hidden, cos, sin, self._room, self._scales)),
        )
        return hidden


def _layer(layer: LayerWeights) -> _Layer:
    weights = [w.data_ptr() for w, _ in layer.linears]
    biases = [None if b is None else b.data_ptr() for _, b in layer.linears]
    heads = [None if n is None else n[0].data_ptr() for n in layer.head_norms]
    return _Layer(
        weight=(ctypes.c_void_p * 7)(*weights),
        bias=(ctypes.c_void_p * 7)(*biases),
        norm=(ctypes.c_void_p * 2)(*(w.data_ptr() for w, _ in layer.norms)),
        head_norm=(ctypes.c_void_p * 2)(*heads),
        keys=layer.keys.data_ptr(),
        values=layer.values.data_ptr(),
        eps=(ctypes.c_double * 2)(*(eps for _, eps in layer.norms)),
        head_eps=(ctypes.c_double * 2)(*(0.0 if n is None else n[1] for n in layer.head_norms)),
        scale=layer.scale,
        window=layer.window or 0,
    )
