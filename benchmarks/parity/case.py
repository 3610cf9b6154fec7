"""One parity case: a configuration of ours beside one of a peer.

A case with ``differs`` shows the two sides' defaults, or what one of them has no option for; the case beside
it is the configuration of ours that computes the peer's numbers, wherever there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OFFLINE, ONLINE, PPO = (f"benchmarks.peers.parity_{name}" for name in ("offline", "online", "ppo"))
TRAINERS = {
    name: "Reward" if name == "reward" else name.upper()
    for name in ("dpo", "cpo", "orpo", "reward", "sft", "kto", "grpo", "rloo", "ppo")
}
"""The peer's trainers by the name that a case has for them."""
SHARED = ("group_size", "epochs_per_rollout", "rollout_groups", "batch_groups", "path")
"""Options of ours that follow from a case's sizes and files."""
Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    method: str
    """Ours, as ``trimtab METHOD``."""
    ours: Mapping[str, Options]
    """Our sections, over what all cases have in common (``ours.sections``).

    ``{files}`` in them is the inputs' folder.
    """
    trainer: str
    """The peer's: a key of its script's TRAINERS."""
    peer: Options
    """Its configuration, over what all cases have in common."""
    rows: str = "pairs"
    """Which file of ``world.build`` both learn from."""
    model: str = "model"
    lr: float = 3e-4
    rollouts: str = ""
    """Of a sampling method, which fixed rollouts: "mixed" or "even"."""
    epochs: int = 5
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimiser steps of one pass over a rollout."""
    reversed_rows: bool = False
    """The peer gets the rows of each batch in reverse."""
    module: str = OFFLINE
    environment: str = "trl-1.16.0"
    differs: str = ""
    """Why the two are expected to differ; empty where they are to agree."""

    def in_words(self) -> dict[str, str]:
        """Both configurations as a reader would write them, less what all cases of the kind share."""
        options = [
            f"{section}.{name} = {_toml(value)}"
            for section, given in self.ours.items()
            for name, value in given.items()
            if name not in SHARED
        ]
        peer = [f"{name}={value!r}" for name, value in self.peer.items()]
        trainer = self.trainer.removesuffix("-margin")
        return {
            "ours": "; ".join([f"trimtab {self.method}", *options]),
            "peer": f"{TRAINERS[trainer]}Trainer({', '.join(peer)})",
        }


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
