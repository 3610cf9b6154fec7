"""An object whose unpickling can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Trap:
    """Whoever unpickles it makes the file ``trace``."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)
