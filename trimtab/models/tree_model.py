"""TreeModel: a transformers model whose trunk computes trees of responses, whatever head stands on it.

No model is rewritten. The tree enters through the arguments that transformers offers: explicit position
ids and a 4-D attention mask (a dict of masks where layers alternate between full and sliding windows).
Whether a given architecture honours them is measured on the loaded model (``layout.py``), never assumed.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from trimtab.batch import PADDING, Layout, TreeBatch
from trimtab.errors import InputError
from trimtab.models.attention import as_mask
from trimtab.models.attention_plan import plan_attention
from trimtab.models.fused import fuse

if TYPE_CHECKING:
    from trimtab.models.adapters import Adapter


class Holder(Protocol):
    """What spreads the weights of models over processes, and makes further models of those that are."""

    dtype: torch.dtype
    """What passes compute in."""
    gather: str
    """How such a model is sampled from: auto, whole or layers."""
    chosen: dict[str, str]
    """What auto came to, by what a model is: decided once in a run."""

    def turn(self) -> AbstractContextManager[None]:
        """One process of this machine after another; what is raised within is raised in all."""
        ...

    def spread(self, lm: TreeModel) -> None:
        """Keep this process's part of the weights, in place; no message is sent."""
        ...

    def begin(self, lm: TreeModel) -> None:
        """The first pass, of all processes; what was raised before has been raised in all."""
        ...

    def whole_copy(self, lm: TreeModel) -> nn.Module:
        """A tree of modules that holds the whole weights in this process; collective."""
        ...


class TreeModel:
    """What a policy, a critic and a reward model have in common.

    ``layout`` is "tree" unless a check showed that the architecture needs the plain one.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, layout: Layout = "tree") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layout: Layout = layout
        self.config: Any = model.config
        self.trunk_name = trunk_name(model)
        fuse(model)
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.requested_dtype = "auto"
        """What the configuration asked the forward pass to compute in; masters are fp32 in any case."""
        self.version = 0
        """Counts weight updates; anything derived from the weights (a cache) carries the number."""
        self.spread = False
        """Each process holds a part of every weight (``spread/shard.py``): a pass is one of all of them."""
        self.holder: Holder | None = None
        """Of a model that is spread: what did it."""
        self.skeleton: nn.Module | None = None
        """Of a model that is spread: its tree of modules without weights, of which copies are made."""
        self.passes: Any = None
        """Of a model that is spread: how its passes are made (``spread/passes.py``)."""
        self.adapter: Adapter | None = None
        """Of a model that learns by one."""
        self.notes: list[str] = []
        """What loading has to say, a line each."""

    @property
    def trunk(self) -> nn.Module:
        """The part below the head; its output is the last hidden state."""
        return getattr(self.model, self.trunk_name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the forward pass computes in."""
        if self.holder is not None:  # what is kept may be wider
            return self.holder.dtype
        # A quantised base holds whole numbers too.
        return next(p for p in self.model.parameters() if p.is_floating_point()).dtype

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in ``dtype`` from now on. Buffers stay: rotary frequencies in bf16 move every position."""
        if self.holder is not None:
            if dtype != self.holder.dtype:
                raise ValueError("a model that is spread over processes computes in what it was spread in")
            return
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding (the tokenizer's vocabulary may be smaller)."""
        return int(self.config.vocab_size)

    @property
    def context(self) -> int:
        """The longest sequence the model can hold; very large where it has no limit."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    def inputs(self, batch: TreeBatch) -> dict[str, Any]:
        """The arguments of the forward pass for a batch in any layout."""
        if batch.spans:
            mask: Any = self._plan(batch)
        elif batch.branching:
            mask = self._tree_masks(batch)
        else:
            # One response a row is an ordinary right-padded sequence; the 2-D mask lets kernels skip work.
            keep = batch.segments_BL != PADDING
            mask = None if bool(keep.all()) else keep.long()
        positions = {"position_ids": batch.position_ids_BL} if self.takes_positions else {}
        return {"input_ids": batch.input_ids_BL, "attention_mask": mask, "use_cache": False, **positions}

    def hidden(self, batch: TreeBatch, places_M: torch.Tensor) -> torch.Tensor:
        """Last hidden states ``[M, D]`` at flattened places of the batch's rows. Differentiable."""
        hidden_BLD = self.trunk(**self.inputs(batch)).last_hidden_state
        return hidden_BLD.reshape(-1, hidden_BLD.shape[-1]).index_select(0, places_M)

    def _plan(self, batch: TreeBatch) -> Any:
        """A packed batch's attention plan in the place of a mask, for every kind of layer."""
        heads = int(getattr(self.config, "num_attention_heads", 1))
        plan = plan_attention(batch.spans, batch.position_ids_BL[0], heads, itemsize=self.dtype.itemsize)
        mask = as_mask(plan, self.device)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        # The window of a layer comes to the attention function as an argument, so one plan serves all kinds.
        return dict.fromkeys(kinds, mask) if len(kinds) > 1 and self._takes_dict() else mask

    def _tree_masks(self, batch: TreeBatch) -> Any:
        """The mask argument in the form that this model's layers and attention kernel expect."""
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if not kinds:
            return self._for_kernel(batch.attention_mask_BLL(window))
        by_kind = {
            kind: self._for_kernel(batch.attention_mask_BLL(window if kind == "sliding_attention" else None))
            for kind in kinds
        }
        # Models whose layers are all of one kind take a bare mask; those that can mix them take the dict.
        return by_kind if self._takes_dict() else next(iter(by_kind.values()))

    def _takes_dict(self) -> bool:
        # Families that index masks by layer type declare the types; Mistral and Mixtral declare a window
        # alone and take one mask. A wrong guess here fails the layout check, loudly.
        return hasattr(self.config, "layer_types")

    def _for_kernel(self, allowed: torch.Tensor) -> torch.Tensor:
        """Boolean for SDPA; additive for the eager kernel, which would add a boolean mask as 0 and 1."""
        if getattr(self.config, "_attn_implementation", "sdpa") == "eager":
            additive = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device)
            return additive.masked_fill(~allowed, torch.finfo(self.dtype).min)
        return allowed


def layers_of(lm: TreeModel) -> list[nn.Module]:
    """The trunk's layers, in order: the longest list of equal modules in it."""
    lists = [list(m) for m in lm.trunk.modules() if isinstance(m, nn.ModuleList)]
    return max((m for m in lists if len({type(layer) for layer in m}) == 1), key=len, default=[])


def trunk_name(model: nn.Module) -> str:
    """The attribute that holds the trunk. Some families' ``base_model_prefix`` names another class's."""
    for name in (str(getattr(model, "base_model_prefix", "")), "model", "transformer"):
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise InputError(
        f"model.path: {type(model).__name__} has no trunk below a head that Trimtab can find; "
        "use a causal language model of transformers"
    )
