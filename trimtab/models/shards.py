"""Tensors of which each process holds a part (DTensor), and modules that gather them for a pass (FSDP2).

Between passes an FSDP2 model may hold some of its weights whole: its root's, for the head that comes behind
the trunk. Whole ones are a copy. So before weights are read or written by name, :func:`reshard` makes the
model show its parts again, and drops what would go stale.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def spread_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that gather their weights for a pass, the root first; none where none is spread."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Have the model hold nothing but its parts, and forget passes that no backward pass will follow."""
    modules = spread_modules(model)
    if modules:
        modules[0].reset_iter_state()
        for module in modules:
            module.reshard()


def on_gradients(model: nn.Module, noted: set[str]) -> None:
    """Have the names of a spread model's parameters noted that get a gradient in a backward pass here.

    The gradient that comes out is the sum over processes, and so is zeros where no process had one.
    Collective.
    """
    for module in spread_modules(model):
        module.unshard()
        for name, parameter in model.named_parameters():
            if not is_part(parameter) and parameter.requires_grad:
                # Without the optimiser: a circle through a hook is one that Python's collector does not see.
                parameter.register_post_accumulate_grad_hook(functools.partial(_note, noted, name))
        module.reshard()


def _note(noted: set[str], name: str, _: torch.Tensor) -> None:
    noted.add(name)


def is_part(tensor: torch.Tensor) -> bool:
    """This process holds a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, in every process; collective for a part, itself otherwise."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """``value``, the same in every process or a part already, laid out as ``model`` is; sends no message."""
    if not isinstance(model, DTensor) or isinstance(value, DTensor):
        return value
    # None: every process has it, so that each cuts out its own part.
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


@torch.no_grad()
def put(to: torch.Tensor, value: torch.Tensor) -> None:
    """Write ``value`` into ``to``, rounded to its dtype; each may be whole or a part.

    Collective where a part is written into a whole tensor.
    """
    if isinstance(to, DTensor):
        local(to.detach()).copy_(local(like(value, to)))
    else:
        to.detach().copy_(whole(value))


@torch.no_grad()
def norm(tensors: Iterable[torch.Tensor]) -> float:
    """The 2-norm of them together, the same number in every process; collective where there are parts."""
    parts = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    if not parts:
        raise ValueError("no tensor of which processes hold parts")
    own = nn.utils.get_total_norm([part.to_local() for part in parts], foreach=True)
    # All lie on one mesh; of its dimensions only the last one cuts, the first repeats.
    total = own.double().square()
    torch.distributed.all_reduce(total, group=parts[0].device_mesh.get_group(-1))
    return float(total.sqrt())
