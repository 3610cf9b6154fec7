"""How ``"auto"`` of ``[parallel]`` is decided: one rule, for the plan of a run and for the run. No torch.

Replicated weights cost one sum of gradients a step, sharded ones are gathered for every pass: they are
replicated where that leaves room. What is free is that of the process which has least.
"""

from __future__ import annotations

from typing import NamedTuple

ROOM = 0.6
"""Share of the free memory that whole weights and what learns may take; the rest is for activations."""
GATHERED = 0.8
"""Of the memory that is free as sampling begins: what whole weights may take that are gathered for it."""
GIB = 2**30


class Held(NamedTuple):
    """The models of a run, were all of them whole in a process."""

    learns: float
    """Parameters that learn, but for adapters': the policy's, and those of a critic of its own."""
    frozen: tuple[tuple[float, float], ...] = ()
    """(parameters, bytes of each) of what does not: a reference, reward models, the base under an adapter."""


def learning_bytes(size: int) -> int:
    """Of a parameter that learns: itself, gradient and two moments in fp32, and what bf16 computes with.

    ``size``: bytes of a number computed with; what computes in fp32 or fp64 is its own master.
    """
    return 18 if size == 2 else 4 * size


def whole_bytes(held: Held, size: int) -> float:
    """What a process holds of models that are whole in it. ``size``: bytes of a number computed with."""
    return held.learns * learning_bytes(size) + sum(count * each for count, each in held.frozen)


def replicates(need: float, free: float) -> bool:
    """``weights = "auto"``: every process holds ``need`` bytes, ``free`` being free before it loads."""
    return need <= ROOM * free


def gathers_whole(size: float, free: float | None) -> bool:
    """``gather = "auto"``: ``size`` bytes of whole weights are gathered to sample from them.

    ``free``: as sampling begins. Where nobody knows, they are.
    """
    return free is None or size <= GATHERED * free


def told(need: float, free: float) -> str:
    """What was compared."""
    return f"they take about {need / GIB:,.1f} GiB with what learns, and {free / GIB:,.1f} are free"


def idle_option(shard_over: int, gather: str) -> str:
    """Of the options that only sharded weights take notice of, one that was given; empty for none."""
    return "shard_over" if shard_over else "gather" if gather != "auto" else ""
