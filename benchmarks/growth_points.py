"""The points of the benchmark ``growth``: one quantity moves, the others stay at the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import settings

RESPONSE_TOKENS = 64
PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration; ``argument`` is how a worker is told of it."""

    model: str = "30M"
    vocabulary: int = settings.VOCABULARY
    group: int = 8
    prompt: int = 256

    @property
    def argument(self) -> str:
        return f"{self.model} {self.vocabulary} {self.group} {self.prompt}"

    @classmethod
    def parse(cls, argument: str) -> Point:
        """The inverse of ``argument``."""
        model, *numbers = argument.split()
        return cls(model, *map(int, numbers))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of its Qwen2Config."""
        room = max(settings.QWEN2["max_position_embeddings"], self.prompt + RESPONSE_TOKENS)
        sizes = settings.MODEL_SIZES[self.model]
        return settings.QWEN2 | sizes | {"vocab_size": self.vocabulary, "max_position_embeddings": room}


SWEEPS: dict[str, tuple[str, Iterable[Any]]] = {
    "group size": ("group", (1, 2, 4, 8, 16, 32, 64)),
    "prompt": ("prompt", (64, 256, 1024, 4096)),
    "vocabulary": ("vocabulary", (8192, 32_768, 152_064)),
    "model": ("model", ("3M", "30M", "91M", "500M")),
}
"""What is shown → the field of Point and its values. All models here have the vocabulary of the base."""


def points() -> dict[str, Point]:
    """Case → point. The base is in every sweep, under a name of its own in each."""
    return {
        f"{title} {value:,}" if isinstance(value, int) else f"{title} {value}": dataclasses.replace(
            Point(), **{field: value}
        )
        for title, (field, values) in SWEEPS.items()
        for value in values
    }
