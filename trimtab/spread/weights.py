"""Whether every process holds all weights or a part of each: as the options say, or by what fits."""

from __future__ import annotations

import torch

from trimtab.errors import InputError
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.rule import Held, idle_option, replicates, told, whole_bytes
from trimtab.parallel.world import world
from trimtab.spread.passes import free_bytes
from trimtab.spread.shard import Spread

BEGAN = "as the run began"
"""Why weights are held so, of a run that goes on."""


def choose_weights(
    options: ParallelConfig,
    held: Held | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantised: bool,
    before: str = "",
) -> tuple[Spread | None, str]:
    """What spreads the models of this run, None where every process holds all, and a line that says why.

    ``held``: the run's models, None where their size is not known. ``before``: what "auto" came to when the
    run began on as many processes, "shard" or "replicate"; memory is as free as it was then by chance only,
    and numbers differ in rounding. Collective. Raises InputError for options that cannot be met here.
    """
    size = world().size
    if options.weights == "replicate":
        return None, f"weights: each of the {size} processes holds all of them, as configured"
    if quantised:
        if options.weights == "shard":
            raise InputError(
                'parallel.weights = "shard" cannot spread a quantised base; take "replicate", or '
                'adapter.quantise = "none"'
            )
        return None, f"weights: each of the {size} processes holds all of them, the base being quantised"
    if options.weights == "shard":
        return _spread(options, dtype, device, "as configured")
    if before == "shard":
        return _spread(options, dtype, device, BEGAN)
    if before == "replicate":
        _refuse_idle(options, BEGAN)
        return None, f"weights: each of the {size} processes holds all of them ({BEGAN})"
    if held is None:
        return None, f"weights: each of the {size} processes holds all of them; their size is not known"
    need = whole_bytes(held, dtype.itemsize)
    free = world().gather(free_bytes(device))
    room = min((found for found in free if found is not None), default=None)
    if room is None:
        return None, f"weights: each of the {size} processes holds all of them; what is free is not known"
    why = told(need, room)
    if not replicates(need, room):
        return _spread(options, dtype, device, why)
    _refuse_idle(options, why)
    return None, f"weights: each of the {size} processes holds all of them ({why})"


def _refuse_idle(options: ParallelConfig, why: str) -> None:
    if option := idle_option(options.shard_over, options.gather):
        raise InputError(
            f"parallel.{option} has no effect here, since the weights fit whole ({why}); set "
            'parallel.weights = "shard", or leave it out'
        )


def _spread(
    options: ParallelConfig, dtype: torch.dtype, device: torch.device, why: str
) -> tuple[Spread, str]:
    size = world().size
    over = options.shard_over or size
    copies = f", in {size // over} copies" if over < size else ""
    return Spread(options, dtype, str(device)), f"weights: spread over {over} processes{copies} ({why})"
