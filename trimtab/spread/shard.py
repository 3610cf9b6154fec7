"""Weights spread over processes (FSDP2): each holds a part of every weight and gathers a layer to compute it.

One group of weights for each layer of the trunk and one, the root's, for the rest: embedding, last norm,
head. A pass gathers the root's group first and leaves it whole, since the head comes behind the trunk
(models/head.py calls the model's own forward with the trunk replaced); a layer's is freed behind the layer
and gathered again for its backward pass. Every call of the trunk is made a pass of the root: FSDP2 prepares a
module for a pass when the module itself is called, and a trunk that was called past its root would prepare
its layers as roots of their own, which the next call of the root does not survive.

Weights that learn are kept in fp32 (fp64), and so are the masters; a pass gathers them in what the run
computes in. Gradients are summed, not averaged, in fp32 (fp64): losses are divided by global counts already.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from trimtab.errors import InputError
from trimtab.models.lean import KEPT
from trimtab.models.quantised import held
from trimtab.models.shards import reshard, spread_modules, whole
from trimtab.models.tree_model import TreeModel, layers_of
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.world import world
from trimtab.spread import gloo
from trimtab.spread.passes import Passes, local_passes

__all__ = ["Spread", "local_passes"]

RUN = "trimtab_run_trunk"
"""The root's method that runs the trunk; to FSDP2 a forward pass like another."""
PART = "trimtab_part"
"""Where a stand-in keeps the part that it stands for."""
STAND_IN = 0.02
"""Every number of a weight that stands in for one that was spread: so small that nothing overflows."""


class Spread:
    """How the models of a run are spread, and what further models are made from one that was.

    A model that was spread cannot be copied. So before it is, its tree of modules is copied with a tensor
    of one number, expanded, in the place of each weight: ``skeleton``. Trees are built from that as from a
    whole model, and where one of these stand-ins comes up in a tree that is spread, the part that it stands
    for takes its place: the very part where it is frozen (roles share a base), else a copy of it.
    """

    def __init__(self, options: ParallelConfig, dtype: torch.dtype, device: str) -> None:
        """``dtype``: what passes compute in. Raises InputError for a shard_over that does not divide."""
        self.dtype = dtype
        self.gather: str = options.gather
        self.chosen: dict[str, str] = {}
        self.mesh = _mesh(options.shard_over, device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process of this machine after another, so that one whole model is in its memory at a time.

        What is raised within is raised in all: in the others an InputError with the same words.
        """
        here = world()
        failed: Exception | None = None
        why = ""
        for number in range(max(here.gather(here.local_size))):
            if number == here.local_rank:
                try:
                    yield
                except Exception as error:
                    failed = error
                    known = isinstance(error, InputError)
                    why = str(error) if known else f"process {here.rank}: {type(error).__name__}: {error}"
            told = here.gather(why)
            if failed is not None:
                raise failed
            if any(told):
                raise InputError(next(words for words in told if words))

    def spread(self, lm: TreeModel) -> None:
        """Keep this process's part of the model's weights, in place."""
        model = lm.model
        if held(model):
            raise InputError(
                "adapter.quantise: a quantised base cannot be spread over processes; set parallel.weights = "
                '"replicate"'
            )
        for module in model.modules():
            module.__dict__.pop(KEPT, None)  # it holds tensors from before
        places = _places(model)
        known = {id(p): part for p in model.parameters() if (part := getattr(p, PART, None)) is not None}
        skeleton, stand_ins = _skeleton(model)
        if lm.adapter is not None:
            _stand_in(lm.adapter.base, stand_ins)
        _emptied(model, known)
        # Nothing but the tree holds its weights now, so that each layer is freed as it is cut.
        self._fully_shard(lm)
        own = {key: part if not part.requires_grad else self._copied(part) for key, part in known.items()}
        for module, name, key in places:
            if key in own:
                setattr(module, name, own[key])
        for module, name, key in places:
            setattr(stand_ins[key], PART, module._parameters[name])
        lm.spread, lm.holder, lm.skeleton = True, self, skeleton
        lm.passes = _through_root(lm)

    def begin(self, lm: TreeModel) -> None:
        """The first pass, of one token: FSDP2 settles then which module is the root."""
        lm.passes.idle()
        reshard(lm.model)

    def whole_copy(self, lm: TreeModel) -> nn.Module:
        """A tree of whole weights in what passes compute in, in this process; collective."""
        reshard(lm.model)
        assert lm.skeleton is not None
        memo: dict[int, Any] = {id(b): b for b in lm.skeleton.buffers()}
        for stand_in in lm.skeleton.parameters():
            found = whole(getattr(stand_in, PART).detach())
            memo[id(stand_in)] = nn.Parameter(found.to(self.dtype, copy=True), requires_grad=False)
        return copy.deepcopy(lm.skeleton, memo)

    def _copied(self, part: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(part.detach().to(self.dtype, copy=True), requires_grad=False)

    def _fully_shard(self, lm: TreeModel) -> None:
        wide = torch.promote_types(self.dtype, torch.float32)
        # Inputs are left to the model, whose own code says which of them are rounded.
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=wide, cast_forward_inputs=False)
        for layer in layers_of(lm):
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        fully_shard(lm.model, mesh=self.mesh, mp_policy=policy)
        on_cpu: tuple[Any, Any] | None = None  # not subclasses: what they would be of has no public name
        if self.mesh.device_type == "cpu":
            on_cpu = gloo.Gather(), gloo.ReduceScatter()
        for module in spread_modules(lm.model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if on_cpu is not None:
                module.set_custom_all_gather(on_cpu[0])
                module.set_custom_reduce_scatter(on_cpu[1])
        # A layer that some process's tokens do not reach (an expert) still takes part in the sum.
        spread_modules(lm.model)[0].set_reduce_scatter_unused_params(True)


def _mesh(over: int, device: str) -> DeviceMesh:
    size = world().size
    kind = torch.device(device).type
    if over in (0, size):
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    if size % over or over > size:
        raise InputError(f"parallel.shard_over = {over} does not divide the {size} processes of this run")
    return init_device_mesh(kind, (size // over, over), mesh_dim_names=("replicate", "shard"))


def _places(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Where weights are and which: by id, since what holds them keeps them from being freed."""
    return [
        (module, name, id(p))
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]


def _skeleton(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Parameter]]:
    """The tree with stand-ins, and these by the id of what they stand in for."""
    stand_ins: dict[int, nn.Parameter] = {}
    for p in model.parameters():
        part = getattr(p, PART, None)
        if part is not None and not part.requires_grad:
            stand_ins[id(p)] = p
        else:
            number = torch.full((), STAND_IN, dtype=p.dtype)
            stand_ins[id(p)] = nn.Parameter(number.expand(p.shape), requires_grad=False)
    shared: dict[int, Any] = {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared | stand_ins), stand_ins


def _emptied(model: nn.Module, known: dict[int, nn.Parameter]) -> None:
    """Have weights hold no numbers for which a part is there already."""
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in known:
                bare = torch.empty(p.shape, dtype=p.dtype, device="meta")
                module._parameters[name] = empty.setdefault(
                    id(p), nn.Parameter(bare, requires_grad=p.requires_grad)
                )


def _stand_in(tree: nn.Module, stand_ins: dict[int, nn.Parameter]) -> None:
    for module in tree.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in stand_ins:
                module._parameters[name] = stand_ins[id(parameter)]


def _through_root(lm: TreeModel) -> Passes:
    """Make every call of the trunk a pass of the root."""
    root: Any = lm.model
    trunk = lm.trunk
    own: Callable[..., Any] = trunk.forward
    passes = Passes(root, trunk, lm.device)
    setattr(root, RUN, types.MethodType(lambda _self, *given, **named: own(*given, **named), root))
    register_fsdp_forward_method(root, RUN)
    run = getattr(root, RUN)

    @functools.wraps(own)
    def forward(*given: Any, **named: Any) -> Any:
        if passes.inside:  # of a call of the root itself
            return own(*given, **named)
        with passes.one():
            return run(*given, **named)

    trunk.forward = forward
    root.register_forward_pre_hook(lambda *_: passes.enter(), prepend=True)
    root.register_forward_hook(lambda *_: passes.leave(), always_call=True)
    return passes
