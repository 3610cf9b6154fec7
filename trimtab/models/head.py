"""Token log-probabilities from hidden states, a chunk of tokens at a time.

The full ``tokens × vocabulary`` logits of a batch never exist: each chunk's logits are computed, reduced to
one number a token, dropped, and computed again in the backward pass.

The head is the model's own: its forward is called with the trunk replaced by a module that hands over
given hidden states. So soft-capping, logit scaling, biases and adapters on the head are the model's code,
not ours (reading ``lm_head.weight`` instead gives silently wrong numbers for several families).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from trimtab.kernels.call import wide
from trimtab.kernels.logps import Temperature, selected_logps
from trimtab.models.tree_model import trunk_name

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk's logits. Larger chunks are no faster once the matrix product is large."""
KEPT_BYTES = 128 * 2**20
"""Logits no larger than this in all are one chunk, kept for the backward pass and not computed again."""


class _TrunkOutput(BaseModelOutputWithPast):
    """Some heads copy further fields of their trunk's output (cross-attentions, router logits): None here."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # noqa: RET501 - the value, not a missing return


class _GivenHidden(nn.Module):
    """Stands where the trunk stood and returns the hidden states it was given."""

    hidden: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        # Heads that reach below the trunk (OPT calls ``model.decoder``) arrive here again.
        return self if name in ("decoder", "model") else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _TrunkOutput(last_hidden_state=self.hidden)


class Head:
    """``hidden [C, D] → logits [C, V]`` by the model's own code."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix = trunk_name(model)
        self._stub = _GivenHidden()

    @property
    def trunk(self) -> nn.Module:
        """The part below the head; its output is the last hidden state."""
        return getattr(self.model, self.prefix)

    @contextmanager
    def _given(self, hidden: torch.Tensor) -> Iterator[None]:
        trunk = self.trunk
        self._stub.hidden = hidden
        self.model._modules[self.prefix] = self._stub
        try:
            yield
        finally:
            self.model._modules[self.prefix] = trunk
            del self._stub.hidden

    def __call__(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        # The ids only satisfy models that ask for an input; the stub ignores them.
        ids = torch.zeros((1, 1), dtype=torch.long, device=hidden_CD.device)
        with self._given(hidden_CD[None]):
            return self.model.forward(input_ids=ids, use_cache=False).logits[0]


def chunked_logps(
    head: Head,
    hidden_MD: torch.Tensor,
    targets_M: torch.Tensor,
    vocab_size: int,
    *,
    temperature: Temperature = 1.0,
    entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    kept_bytes: int = KEPT_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`selected_logps` over M tokens with at most ``chunk_bytes`` of logits alive at once.

    ``temperature`` is one for all tokens or ``[M]``, one a token. Where a gradient is due and all the
    logits are within ``kept_bytes``, they are one chunk, computed once.
    """

    def piece(
        hidden: torch.Tensor, targets: torch.Tensor, temperature: Temperature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return selected_logps(head(hidden), targets, temperature, entropy=entropy)

    row_bytes = vocab_size * hidden_MD.element_size()
    size = max(1, chunk_bytes // row_bytes)
    again = torch.is_grad_enabled() and len(hidden_MD) * row_bytes > kept_bytes
    if torch.is_grad_enabled() and not again:
        # Whole: the gradient of the head's weights is one product, not a sum over chunks.
        size = max(1, len(hidden_MD))
    hiddens, targets = hidden_MD.split(size), targets_M.split(size)
    temperatures: Sequence[Temperature] = [temperature] * len(hiddens)
    if isinstance(temperature, torch.Tensor):
        temperatures = temperature.split(size)
    chunks = zip(hiddens, targets, temperatures, strict=True)
    if len(hidden_MD) and not torch.is_grad_enabled():
        found_2M = hidden_MD.new_empty(2, len(hidden_MD), dtype=wide(hidden_MD.dtype))
        for given, place in zip(chunks, found_2M.split(size, dim=1), strict=True):
            _write(piece(*given), place)
        return found_2M[0], found_2M[1]
    pieces = []
    for given in chunks:
        if again:
            pieces.append(checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(piece(*given))
    if not pieces:
        empty = hidden_MD.sum(-1)
        return empty, empty
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _write(found: tuple[torch.Tensor, torch.Tensor], place_2C: torch.Tensor) -> None:
    """Copy a chunk's numbers to their place, so that nothing of a chunk is alive when the next is computed.

    A small tensor that is kept lies in the C heap right behind its chunk's logits, and glibc, which looks for
    some bytes more than an aligned block takes, then makes new room for the next chunk's.
    """
    for out, value in zip(place_2C, found, strict=True):
        out.copy_(value)
