"""Selective recomputation: which layers keep their activations for the backward pass, by a memory budget.

A layer that keeps nothing but its input runs its forward pass once more when its gradient is due: a third
more work for that layer (Chen et al., 2016, "Training deep nets with sublinear memory cost"). How many
layers have to is worked out from what a forward pass on this model is seen to keep.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trimtab.batch import Span, TreeBatch
from trimtab.errors import InputError
from trimtab.models.shards import is_part, reshard
from trimtab.models.tree_model import TreeModel, layers_of
from trimtab.training.config import TrainConfig

PROBE_TOKENS = 256
"""Long enough that what is kept per token outweighs what is kept once."""
OWN = "_own_forward"
"""Where a layer that is computed again keeps its forward."""


def fit_activations(lm: TreeModel, train: TrainConfig) -> str | None:
    """Have as few layers computed again as the budget of a micro-batch needs; a line, or None without one.

    Raises InputError for a budget that no choice of layers meets, and for a model without a list of layers.
    """
    if not train.activation_mb:
        return None
    layers = layers_of(lm)
    if not layers:
        raise InputError(
            f"train.activation_mb: {type(lm.model).__name__} has no list of layers; lower "
            "train.micro_batch_tokens instead"
        )
    budget, tokens = train.activation_mb * 2**20, train.micro_batch_tokens
    whole = kept_bytes(lm) * tokens / PROBE_TOKENS
    for layer in layers:
        _recompute(layer)
    least = kept_bytes(lm) * tokens / PROBE_TOKENS
    if least > budget:
        _restore(layers)
        raise InputError(
            f"train.activation_mb = {train.activation_mb} is too small for train.micro_batch_tokens = "
            f"{tokens}: with all layers computed again it takes {math.ceil(least / 2**20)}; raise it or "
            f"lower train.micro_batch_tokens to {max(1, int(tokens * budget / least))}"
        )
    per_layer = (whole - least) / len(layers)
    again = min(len(layers), max(0, math.ceil((whole - budget) / per_layer))) if per_layer > 0 else 0
    # The last layers keep theirs: the backward pass frees those first.
    _restore(layers[again:])
    return (
        f"activations: {(whole - again * per_layer) / 2**20:,.0f} MiB for {tokens:,} tokens; "
        f"{again} of {len(layers)} layers are computed again in the backward pass"
    )


def forward_times(lm: TreeModel, train: TrainConfig) -> int:
    """How many training micro-batches a pass without gradient takes at once.

    It holds about two layers' activations where a training pass keeps all of them. Past 8 nothing is gained.
    """
    return 1 if train.activation_mb else min(8, max(1, len(layers_of(lm)) // 2))


def kept_bytes(lm: TreeModel) -> int:
    """Bytes that the trunk keeps for the backward pass of PROBE_TOKENS tokens; weights are not counted."""
    length = min(PROBE_TOKENS, lm.context)
    shape = (PROBE_TOKENS // length, length)
    zeros = torch.zeros(shape, dtype=torch.long, device=lm.device)
    none = torch.zeros((1, 0), dtype=torch.long, device=lm.device)
    spans: tuple[Span, ...] = ()
    if lm.layout == "packed":
        zeros = zeros.view(1, -1)
        spans = tuple(Span(n * length, (n + 1) * length, (n + 1) * length) for n in range(shape[0]))
    positions = torch.arange(zeros.numel(), device=lm.device).view(zeros.shape) % length
    batch = TreeBatch(
        zeros,
        positions,
        zeros,
        none,
        none,
        none.bool(),
        none[0],
        none[0].float(),
        branching=False,
        spans=spans,
    )

    def stored() -> set[int]:
        return {p.untyped_storage().data_ptr() for p in lm.model.parameters() if not is_part(p)}

    reshard(lm.model)
    weights = None if lm.spread else stored()
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Of a model that is spread, asked while the layer's weights are gathered.
        if storage.data_ptr() not in (stored() if weights is None else weights):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = lm.trunk(**lm.inputs(batch)).last_hidden_state
    # Alive until here, so that no storage is counted under another's address.
    del out
    reshard(lm.model)
    return sum(seen.values())


def _recompute(layer: nn.Module) -> None:
    # Both as methods of this layer, so that those of a deep copy are bound to the copy.
    layer.__dict__[OWN] = layer.forward
    layer.forward = types.MethodType(_forward, layer)


def _forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    own = layer.__dict__[OWN]
    if not torch.is_grad_enabled():
        return own(*arguments, **named)
    return checkpoint(own, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


def _restore(layers: list[nn.Module]) -> None:
    for layer in layers:
        own = layer.__dict__.pop(OWN, None)
        if own is not None:
            layer.forward = own
