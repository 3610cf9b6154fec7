"""How ``"auto"`` of ``[parallel]`` is decided: one rule, for the plan of a run and for the run. No torch.

Replicated weights cost one sum of gradients a step, sharded ones are gathered for every pass: they are
replicated where that leaves room. What is free is that of the process which has least.
"""

from __future__ import annotations

LEARNING = 16
"""Bytes of a parameter that learns: itself, its gradient and two moments in fp32."""
ROOM = 0.6
"""Share of the free memory that whole weights and what learns may take; the rest is for activations."""
GATHERED = 0.8
"""Of the memory that is free as sampling begins: what whole weights may take that are gathered for it."""
GIB = 2**30


def whole_bytes(parameters: float, size: int, *, frozen: bool) -> float:
    """What a process holds of a model that is whole in it. ``size``: bytes of a number computed with.

    With a frozen model beside what learns, as most methods have one; ``frozen``: an adapter learns.
    """
    return parameters * (size if frozen else 2 * size + LEARNING)


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
