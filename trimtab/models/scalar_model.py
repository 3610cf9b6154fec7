"""ScalarModel: a trunk with a linear head of few outputs. The critic, the reward model.

The module is transformers' own sequence classification model of the architecture, so that what is saved
loads with ``AutoModelForSequenceClassification`` and what others saved loads here. It reads the head
itself, in fp32: a reward read in bf16 has steps of 0.4 %.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.batch import Layout, TreeBatch
from trimtab.errors import InputError
from trimtab.groups import Response
from trimtab.models.tree_model import TreeModel

ABOUT = "reward.json"
"""Beside a reward model's weights: what its scores are (:attr:`ScalarModel.about`)."""


class ScalarModel(TreeModel):
    """One number (or a few) for a response, or one for each of its states."""

    def __init__(self, model: nn.Module, tokenizer: Any, layout: Layout = "tree") -> None:
        self.head = score_head(model)
        self.about: dict[str, Any] = {}
        """Saved as reward.json: the kind of score, the names of several, their unit, a calibration."""
        super().__init__(model, tokenizer, layout)

    @property
    def outputs(self) -> int:
        """Numbers that the head gives at a place."""
        return self.head.out_features

    def scores(self, batch: TreeBatch) -> torch.Tensor:
        """The head's outputs at each response's last token, ``[N, outputs]``, at least fp32."""
        return self._read(self.hidden(batch, batch.lasts_N))

    def step_logits(
        self, batch: TreeBatch, responses: Sequence[Response]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First output at each step's last token, ``[N, S]``, at least fp32, and where there is a step.

        ``responses`` are the batch's, in its order. In every layout a response's tokens lie next to each
        other and end at ``lasts_N``: token t of n lies n − 1 − t places before it.
        """
        ends = [list(response.step_ends or []) for response in responses]
        back = [
            [len(r.tokens or ()) - 1 - end for end in own] for r, own in zip(responses, ends, strict=True)
        ]
        if any(not 0 <= b < len(r.tokens or ()) for r, own in zip(responses, back, strict=True) for b in own):
            raise ValueError("a step ends outside its response's tokens")
        lasts = batch.lasts_N.tolist()
        places_M = [last - b for last, own in zip(lasts, back, strict=True) for b in own]
        mask_NS = torch.zeros(len(ends), max(map(len, ends), default=0), dtype=torch.bool)
        for n, own in enumerate(ends):
            mask_NS[n, : len(own)] = True
        mask_NS = mask_NS.to(batch.lasts_N.device)
        found_M = self._read(self.hidden(batch, batch.lasts_N.new_tensor(places_M)))[:, 0]
        return found_M.new_zeros(mask_NS.shape).masked_scatter(mask_NS, found_M), mask_NS

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


def read_about(path: str) -> dict[str, Any]:
    """What a reward model's folder says of its scores; nothing where it says nothing, or for a hub name.

    Raises InputError for a file that cannot be read.
    """
    file = Path(path) / ABOUT
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a table of settings")
    return values
