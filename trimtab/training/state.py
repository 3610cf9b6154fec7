"""State: everything that changes in a run, in one place, saved and restored bit for bit.

What never changes (configuration, data, the initial model) is found again from the run directory. The
sampling noise and the data order are pure functions of the seed and of ``position`` and ``step``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.parallel.world import world
from trimtab.training.checkpoint import PLAIN, Damaged, Snapshot, stored
from trimtab.training.optimiser import Optimiser
from trimtab.training.pieces import Beneath, is_spread, own_pieces

EXTRA = "extra."
"""Before the names of ``State.extra`` in a checkpoint."""
SKIPPED = "skipped_steps"
"""The count of steps without an update, in ``controllers`` and in the metrics."""


@dataclass
class State:
    """All that changes. A method adds what it needs to ``controllers``, ``pending`` and ``extra``."""

    optimiser: Optimiser
    step: int = 0
    """Optimiser steps done."""
    position: int = 0
    """Groups drawn from the data stream."""
    tokens: int = 0
    """Prompt and response tokens trained on: padding not counted, a prompt once for all its responses."""
    others: dict[str, Optimiser] = field(default_factory=dict)
    """Optimisers of further models that learn, by role ("critic")."""
    controllers: dict[str, float] = field(default_factory=dict)
    """Numbers that a method adapts (a KL coefficient, the step of the last reference refresh)."""
    pending: list[Group] = field(default_factory=list)
    """Sampled and scored groups still to be learned from, in order."""
    ahead: list[Group] = field(default_factory=list)
    """The rollout after them, where it was sampled while they were learned from."""
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors, such as a reference that was refreshed during the run."""
    seconds: float = 0.0
    """Wall time spent so far, over all sittings."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Choices that bit-exact repetition needs again: threads, compute dtype, a halved micro-batch."""
    ended: str = ""
    """Why the run ended before its last step, for whoever ran it; found again from the rest."""
    weights_of: int | None = None
    """The step that the weights were put back to after the last one; None: they are those of ``step``."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens computed at once: the run's option, halved wherever memory ran out."""
        return self.environment["micro_batch_tokens"]

    @micro_batch_tokens.setter
    def micro_batch_tokens(self, tokens: int) -> None:
        self.environment["micro_batch_tokens"] = tokens

    def snapshot(self, metrics: dict[str, Any]) -> Snapshot:
        """What this process writes of this moment; its tensors are still the run's own (see ``copied``).

        Of many processes the first writes everything, but for tensors that are spread over them. ``metrics``:
        what was logged of this very step.
        """
        here = world()
        tensors = {**self.optimiser.tensors(), **{f"{EXTRA}{k}": v for k, v in self.extra.items()}}
        for role, optimiser in self.others.items():
            tensors |= {f"{role}/{k}": v for k, v in optimiser.tensors().items()}
        tensors["rng.torch"] = torch.get_rng_state()
        spread = not here.alone and any(is_spread(tensor) for tensor in tensors.values())
        own, places = own_pieces(tensors)
        return Snapshot(
            self.step, own, json.dumps(self._plain()) if here.first else "", metrics, spread, places
        )

    def _plain(self) -> dict[str, Any]:
        """What state.json holds."""
        return {
            "step": self.step,
            "position": self.position,
            "tokens": self.tokens,
            "controllers": self.controllers,
            "pending": [group.to_dict() for group in self.pending],
            "ahead": [group.to_dict() for group in self.ahead],
            "seconds": self.seconds,
            "environment": self.environment,
        }

    def restore_weights(self, checkpoint: Path) -> None:
        """Take a checkpoint's weights and moments alone, of every model that learns.

        Raises InputError as :meth:`restore` does.
        """
        try:
            with stored(checkpoint, self._like) as tensors:
                self._load(tensors)
        except (OSError, SafetensorError, Damaged) as error:
            raise InputError(f"{checkpoint}: cannot be read: {error}") from None

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for role, optimiser in self.others.items():
            optimiser.load_tensors(Beneath(tensors, f"{role}/"))
        self.optimiser.load_tensors(tensors)

    def _like(self, name: str) -> torch.Tensor | None:
        """The weight that a checkpoint's tensor belongs to: itself, a moment of it, the reference's."""
        role, _, rest = name.rpartition("/")
        optimiser = self.others.get(role) if role else self.optimiser
        _, _, weight = rest.removeprefix(EXTRA).partition(".")
        return None if optimiser is None else optimiser.masters.get(weight)

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint's contents. Raises InputError for one that cannot be read or does not fit.

        That its bytes are those that were written is for ``checkpoint.verify`` to say. It may be that of any
        number of processes: each reads what it will hold.
        """
        try:
            plain = json.loads((checkpoint / PLAIN).read_text(encoding="utf-8"))
            pending = [Group.from_dict(group) for group in plain["pending"]]
            ahead = [Group.from_dict(group) for group in plain["ahead"]]
            self.step, self.position = plain["step"], plain["position"]
            self.tokens = plain["tokens"]
            self.controllers, self.seconds = plain["controllers"], plain["seconds"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(checkpoint, error) from None
        try:
            with stored(checkpoint, self._like) as tensors:
                if "rng.torch" not in tensors:
                    raise Damaged("it has no rng.torch")
                torch.set_rng_state(tensors["rng.torch"])
                self._load(tensors)
                extra = [name for name in tensors if name.startswith(EXTRA)]
                self.extra = {name.removeprefix(EXTRA): tensors[name] for name in extra}
        except (OSError, SafetensorError, Damaged) as error:
            raise _damaged(checkpoint, error) from None
        self.pending, self.ahead = pending, ahead


def _damaged(checkpoint: Path, error: Exception) -> InputError:
    return InputError(f"{checkpoint}: damaged checkpoint ({error}); remove it and resume again")


def saved_environment(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's ``environment``, which is needed before the model is built."""
    try:
        return json.loads((checkpoint / PLAIN).read_text(encoding="utf-8"))["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, error) from None
