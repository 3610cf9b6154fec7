"""The reference of a run: the model it starts from, refreshed from the policy where the options say so."""

from __future__ import annotations

import torch

from trimtab.methods.shared.online import refresh_reference, restore_reference
from trimtab.models.language_model import LanguageModel
from trimtab.models.roles import reference_of
from trimtab.models.shards import like, local, put, reshard
from trimtab.training.state import State

PREFIX = "reference."
"""Of a refreshed reference's tensors among the state's."""


class Reference:
    """The frozen anchor π_ref. Refreshed, it is part of the state and so of every checkpoint.

    A refresh every k steps makes it the policy (DeepSeekMath, 2024, its outer loop), or by a moving average

        ref ← (1 − m)·ref + m·policy

    of the weights in fp32, whatever the models compute in: a bf16 sum would lose small m. With an adapter its
    weights are averaged, not their product; the base is shared and stays.
    """

    def __init__(self, lm: LanguageModel, *, refreshed: bool) -> None:
        """Before the optimiser is made, so that what it copies is what the policy loaded, unrounded."""
        self.lm = reference_of(lm, own=refreshed)
        self._share = 1.0

    def begin(self, lm: LanguageModel, state: State, *, average: float = 1.0) -> None:
        """Compute in the policy's dtype. With ``average`` below 1 the fp32 weights are kept in the state."""
        self._share = average
        if average < 1:
            # Still what the run started from, which the reference holds rounded where it is spread.
            for name, master in state.optimiser.masters.items():
                state.extra[PREFIX + name] = master.detach().clone()
        self.lm.cast(lm.dtype)

    @torch.no_grad()
    def refresh(self, lm: LanguageModel, state: State) -> None:
        """Take the policy's weights, or its share of them."""
        if self._share == 1:
            refresh_reference(self.lm, lm, state)
            return
        for name, master in state.optimiser.masters.items():
            local(state.extra[PREFIX + name]).lerp_(local(master.detach()), self._share)
        self._take(state)
        self.lm.version += 1

    def restore(self, state: State) -> None:
        """Put a refreshed reference back after a resume."""
        if self._share == 1:
            restore_reference(self.lm, state)
        else:
            reshard(self.lm.model)
            own = dict(self.lm.model.named_parameters())
            for name, master in state.optimiser.masters.items():
                # A checkpoint is read onto the CPU; one of a run that averaged nothing yet may hold none.
                kept = state.extra.get(PREFIX + name, own[name].detach())
                state.extra[PREFIX + name] = like(kept, master).to(master.dtype, copy=True).to(master.device)
            self._take(state)

    def _take(self, state: State) -> None:
        reshard(self.lm.model)
        for name, parameter in self.lm.model.named_parameters():
            if (kept := state.extra.get(PREFIX + name)) is not None:
                put(parameter, kept)
