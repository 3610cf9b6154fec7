"""Which dtype to compute in and whether with compiled kernels, decided by measuring on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from trimtab.kernels import build
from trimtab.kernels.fused import gated, rms_norm
from trimtab.parallel.world import world

FASTER_BY = 1.25
"""bf16 has to win by this factor to be worth its rounding."""


def choose_dtype(requested: str, config: Any, device: torch.device, tokens: int) -> tuple[torch.dtype, str]:
    """The dtype and a line that says why. ``requested`` is "auto" or a torch dtype's name.

    Of many processes the first measures, and a GPU without bf16 is enough for all to do without.
    """
    if requested != "auto":
        return getattr(torch, requested), f"computing in {requested}, as configured"
    if device.type == "cuda":
        good = not world().any(not torch.cuda.is_bf16_supported(including_emulation=False))
        return (torch.bfloat16 if good else torch.float32), "computing in " + (
            "bfloat16" if good else "float32"
        )
    width = int(getattr(config, "hidden_size", 512))
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)

    def measured() -> float:
        seconds = {d: _seconds(d, min(tokens, 2048), width, inner) for d in (torch.float32, torch.bfloat16)}
        return seconds[torch.float32] / seconds[torch.bfloat16]

    ratio = world().found_first(measured)
    chosen = torch.bfloat16 if ratio >= FASTER_BY else torch.float32
    name = str(chosen).removeprefix("torch.")
    return chosen, f"computing in {name}: on this model's shapes bf16 runs at {ratio:.1f}x the speed of fp32"


ROUNDS = 8
"""Measurements after which slower kernels stay off."""


def choose_kernels(requested: str, device: str) -> tuple[bool, str | None]:
    """Whether to use the compiled kernels, and a line that says why. ``requested`` is auto, on or off.

    Measured is a norm with a gated activation, forward and backward, by the kernels and by PyTorch. For a
    model on a GPU nothing is measured or said: the choice then holds for what else computes on the CPU. Of
    many processes the first measures, and one that has no kernels is enough for all to do without.
    """
    build.use(requested != "off")
    on_cpu = device.startswith("cpu")
    if not on_cpu and world().alone:
        return requested != "off", None
    # Whatever the device is: were it not the same in all processes, one would wait here for another.
    reasons = [reason for reason in world().gather(build.why_not()) if reason is not None]
    if reasons and not world().alone:
        build.use(False)
    if not on_cpu:
        return not reasons, None
    if reasons:
        return False, f"compiled kernels: none ({reasons[0]})"
    if requested == "on":
        return True, "compiled kernels: on, as configured"
    ratio = world().found_first(_kernels_ratio)
    build.use(ratio > 1)
    verb = "on" if ratio > 1 else "off"
    return ratio > 1, f"compiled kernels: {verb}, {ratio:.1f}x the speed of PyTorch on a norm and a gate"


def _kernels_ratio() -> float:
    """How much faster the kernels are."""
    # In turns, and more of them where the kernels seem slower: what else runs on the machine may have slowed
    # them alone, and a run that is repeated should choose as it did.
    seconds = {True: float("inf"), False: float("inf")}
    for _ in range(ROUNDS):
        for used in (True, False):
            build.use(used)
            seconds[used] = min(seconds[used], _elementwise_seconds())
        if seconds[True] < seconds[False]:
            break
    return seconds[False] / seconds[True]


def _elementwise_seconds() -> float:
    x, gate = torch.ones(1024, 256, dtype=torch.bfloat16), torch.ones(1024, 256, dtype=torch.bfloat16)
    weight = torch.ones(256, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, gate, weight)]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.autograd.grad(gated(gate, rms_norm(x, weight, 1e-6), "silu").sum(), leaves)
        best = min(best, time.perf_counter() - start)
    return best


def _seconds(dtype: torch.dtype, tokens: int, width: int, inner: int) -> float:
    a = torch.ones((tokens, width), dtype=dtype)
    b = torch.ones((inner, width), dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return best
