"""The trunk's decode step as embedding, one compiled call for all layers, and norm; where that is the trunk.

Which models it is, a comparison of one step shows; for the others the engine calls the trunk itself.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.kernels.call import matrix_unit
from trimtab.kernels.decode import Plan
from trimtab.kernels.stack import LayerWeights, Stack
from trimtab.models.lean import Lean, lean_of
from trimtab.models.shards import is_part
from trimtab.models.tree_model import TreeModel
from trimtab.rollouts.cache import Blocks

TOLERANCE = 0.05
"""Of the largest hidden number; bf16 rounds each of a dozen steps a layer to 0.4 %."""
PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}


class DecodeStack:
    """The trunk's step on one token a row, over the given blocks."""

    def __init__(self, trunk: Any, leans: list[Lean], blocks: Blocks) -> None:
        self.trunk = trunk
        layers = [
            LayerWeights(
                linears=list(lean.linears),
                norms=[(weight, eps) for weight, eps, _ in lean.norms],
                head_norms=[None if norm is None else norm[:2] for norm in lean.head_norms],
                keys=blocks.keys[lean.attention.layer_idx],
                values=blocks.values[lean.attention.layer_idx],
                scale=lean.scaling,
                window=lean.window,
            )
            for lean in leans
        ]
        self.stack = Stack(layers, leans[0].width, leans[0].norms[0][2], leans[0].kind)

    def __call__(self, plan: Plan, ids_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[R, D]``, normed."""
        hidden = self.trunk.embed_tokens(ids_R)
        cos, sin = self.trunk.rotary_emb(hidden[None], positions_R[None])
        return self.trunk.norm(self.stack(plan, hidden, cos[0].contiguous(), sin[0].contiguous()))


def decode_stack(lm: TreeModel, blocks: Blocks) -> DecodeStack | None:
    """The stack of this model, None for one that is built otherwise. Its numbers are still to be checked."""
    trunk: Any = lm.trunk
    if lm.dtype != torch.bfloat16 or lm.device.type != "cpu" or not matrix_unit():
        return None
    if {name for name, _ in trunk.named_children()} != PARTS:
        return None
    leans = [lean_of(layer) for layer in trunk.layers]
    made = [lean for lean in leans if lean is not None]
    if len(made) < len(leans) or not made or len({_form(lean) for lean in made}) > 1:
        return None
    linears = [part for lean in made for part in lean.linears]
    if any(part.lora is not None and part.lora[0].dtype != torch.bfloat16 for part in linears):
        return None
    weights = [part.weight for part in linears]
    if any(is_part(w) for w in weights):  # gathered by the layers' own passes, which the stack goes past
        return None
    if any(w.shape[0] % 16 or w.shape[1] % 32 or not w.is_contiguous() for w in weights):
        return None
    return DecodeStack(trunk, made, blocks)


def agree(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """The stack's hidden states are the trunk's."""
    gap, largest = float((ours - truth).abs().max()), float(truth.abs().max())
    return gap <= TOLERANCE * largest  # False for NaN


def _form(lean: Lean) -> tuple[Any, ...]:
    """What the layers of one stack share."""
    shapes = tuple(part.weight.shape for part in (lean.q, lean.k, lean.v, lean.gate))
    return (*shapes, lean.width, lean.norms[0][2], lean.kind)
