"""ScalarModel: a trunk with a linear head of few outputs. The critic, the reward model.

The module is transformers' own sequence classification model of the architecture, so that what is saved
loads with ``AutoModelForSequenceClassification`` and what others saved loads here. It reads the head
itself, in fp32: a reward read in bf16 has steps of 0.4 %.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.batch import Layout, TreeBatch
from trimtab.errors import InputError
from trimtab.models.tree_model import TreeModel


class ScalarModel(TreeModel):
    """One number (or a few) for a response, or one for each of its states."""

    def __init__(self, model: nn.Module, tokenizer: Any, layout: Layout = "tree") -> None:
        self.head = score_head(model)
        super().__init__(model, tokenizer, layout)

    @property
    def outputs(self) -> int:
        """Numbers that the head gives at a place."""
        return self.head.out_features

    def scores(self, batch: TreeBatch) -> torch.Tensor:
        """The head's outputs at each response's last token, ``[N, outputs]``, at least fp32."""
        return self._read(self.hidden(batch, batch.lasts_N))

    def values(self, batch: TreeBatch) -> torch.Tensor:
        """First output at the state before each counted token, ``[N, T]``, at least fp32; 0 elsewhere."""
        values_M = self._read(self.hidden(batch, batch.sources_NT[batch.mask_NT]))[:, 0]
        return values_M.new_zeros(batch.mask_NT.shape).masked_scatter(batch.mask_NT, values_M)

    def _read(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_MD.dtype, torch.float32)
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        return F.linear(hidden_MD.to(dtype), self.head.weight.to(dtype), bias)


def score_head(model: nn.Module) -> nn.Linear:
    """The head of a decoder's sequence classification model. Raises InputError for another model."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(model).__name__} has no linear head called score, so it cannot be a critic or be "
            "trained as a reward model here; use a decoder's sequence classification model"
        )
    return head
