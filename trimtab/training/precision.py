"""Which dtype to compute in, decided by measuring this machine on this model's own shapes."""

from __future__ import annotations

import time
from typing import Any

import torch

FASTER_BY = 1.25
"""bf16 has to win by this factor to be worth its rounding."""


def choose_dtype(requested: str, config: Any, device: torch.device, tokens: int) -> tuple[torch.dtype, str]:
    """The dtype and a line that says why. ``requested`` is "auto" or a torch dtype's name."""
    if requested != "auto":
        return getattr(torch, requested), f"computing in {requested}, as configured"
    if device.type == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16 if good else torch.float32), "computing in " + (
            "bfloat16" if good else "float32"
        )
    width = int(getattr(config, "hidden_size", 512))
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    seconds = {d: _seconds(d, min(tokens, 2048), width, inner) for d in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if ratio >= FASTER_BY else torch.float32
    name = str(chosen).removeprefix("torch.")
    return chosen, f"computing in {name}: on this model's shapes bf16 runs at {ratio:.1f}x the speed of fp32"


def _seconds(dtype: torch.dtype, tokens: int, width: int, inner: int) -> float:
    a = torch.ones((tokens, width), dtype=dtype)
    b = torch.ones((inner, width), dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return best
