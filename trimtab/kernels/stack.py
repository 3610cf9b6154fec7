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

Lora = tuple[torch.Tensor, torch.Tensor, float]
"""An adapter's factors ``[rank, in]`` and ``[out, rank]``, and its scale."""
Linear = tuple[torch.Tensor, torch.Tensor | None, Lora | None]
"""Weight, bias, adapter."""
DEPTH = 32
"""What the matrix unit sums over at once: ranks are filled up with zeros to a multiple."""
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
        ("down", ctypes.c_void_p * 7),
        ("up", ctypes.c_void_p * 7),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("eps", ctypes.c_double * 2),
        ("head_eps", ctypes.c_double * 2),
        ("scale", ctypes.c_double),
        ("lora_scale", ctypes.c_double * 7),
        ("window", ctypes.c_int64),
        ("rank", ctypes.c_int64 * 7),
    )


_NUMBERS = ("width", "heads", "kv_heads", "d", "inner", "kind", "rank", "widest")


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("offset", ctypes.c_double),
    )


class Stack:
    """The layers of one model, by their addresses: to be made anew when weights or caches have moved."""

    def __init__(self, layers: Sequence[LayerWeights], d: int, offset: float, kind: Gate) -> None:
        q, k, gate = (layers[0].linears[part][0] for part in (0, 1, 4))
        self.width, self.d = q.shape[1], d
        self.heads, self.kv_heads, self.inner = q.shape[0] // d, k.shape[0] // d, gate.shape[0]
        layers = [layer._replace(linears=[_filled(part) for part in layer.linears]) for layer in layers]
        loras = [lora for layer in layers for _, _, lora in layer.linears if lora is not None]
        self.rank = max((len(down) for down, _, _ in loras), default=0)
        self.widest = max(self.width, self.heads * d, self.inner)
        self._held = layers
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._shape = _Shape(
            *(self.width, self.heads, self.kv_heads, d, self.inner, int(kind == "gelu_tanh")),
            *(self.rank, self.widest, offset),
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
        numbers = self.width + 2 * (self.heads + self.kv_heads) * self.d + 2 * self.inner
        if self.rank:
            numbers += self.rank + self.widest
        size = rows * numbers + padded * max(self.widest, self.rank)
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


def _filled(part: Linear) -> Linear:
    """The adapter's rank filled up with zeros, which change nothing: a copy, of weights that are small."""
    weight, bias, lora = part
    if lora is None:
        return part
    down, up, scale = lora
    room = -len(down) % DEPTH
    wider = torch.nn.functional.pad(down.detach(), (0, 0, 0, room)).contiguous()
    return weight, bias, (wider, torch.nn.functional.pad(up.detach(), (0, room)).contiguous(), scale)


def _layer(layer: LayerWeights) -> _Layer:
    weights = [w.data_ptr() for w, _, _ in layer.linears]
    biases = [None if b is None else b.data_ptr() for _, b, _ in layer.linears]
    loras = [lora for _, _, lora in layer.linears]
    heads = [None if n is None else n[0].data_ptr() for n in layer.head_norms]
    return _Layer(
        weight=(ctypes.c_void_p * 7)(*weights),
        bias=(ctypes.c_void_p * 7)(*biases),
        norm=(ctypes.c_void_p * 2)(*(w.data_ptr() for w, _ in layer.norms)),
        head_norm=(ctypes.c_void_p * 2)(*heads),
        down=(ctypes.c_void_p * 7)(*(None if lora is None else lora[0].data_ptr() for lora in loras)),
        up=(ctypes.c_void_p * 7)(*(None if lora is None else lora[1].data_ptr() for lora in loras)),
        lora_scale=(ctypes.c_double * 7)(*(0.0 if lora is None else lora[2] for lora in loras)),
        rank=(ctypes.c_int64 * 7)(*(0 if lora is None else len(lora[0]) for lora in loras)),
        keys=layer.keys.data_ptr(),
        values=layer.values.data_ptr(),
        eps=(ctypes.c_double * 2)(*(eps for _, eps in layer.norms)),
        head_eps=(ctypes.c_double * 2)(*(0.0 if n is None else n[1] for n in layer.head_norms)),
        scale=layer.scale,
        window=layer.window or 0,
    )
