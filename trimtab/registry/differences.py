"""What tells runs apart: configuration, inputs and surroundings, and the scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.registry.ancestry import entries
from trimtab.registry.runs import RunRecord
from trimtab.registry.select import flat

NOTHING = "–"
"""Shown where a run has no such value."""

MADE_OF = ("method", "parent", "seed", "code", "packages", "python", "hardware", "computing", "environment")
"""Parts of the lineage that decide the numbers."""
CLOCK = ("seconds", "tokens_per_s")


@dataclass
class Differences:
    """Rows of (key, one value a run), those that differ; of the scores all."""

    names: list[str]
    configuration: list[tuple[str, list[Any]]] = field(default_factory=list)
    lineage: list[tuple[str, list[Any]]] = field(default_factory=list)
    scores: list[tuple[str, list[Any]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """What could not be read, and so is not compared."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        parts = {"configuration": self.configuration, "lineage": self.lineage, "scores": self.scores}
        rows = {part: dict(rows) for part, rows in parts.items()}
        return {"runs": self.names, **rows, "lines": self.lines}


def differences(runs: Sequence[RunRecord]) -> Differences:
    """Of two or more runs. Where a run lives and whence it was resumed is no difference."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    return Differences(
        names,
        configuration=_differing([_configuration(run) for run in runs]),
        lineage=_differing([_lineage(run) for run in runs]),
        scores=_rows([_scores(run) for run in runs]),
        lines=[run.problem for run in runs if run.problem],
    )


def _configuration(run: RunRecord) -> dict[str, Any]:
    found = flat(run.config)
    return {k: v for k, v in found.items() if k not in ("run.out", "run.resume", "run.parent")}


def _lineage(run: RunRecord) -> dict[str, Any]:
    found = {"status": run.status, "steps": run.steps}
    found |= flat({key: run.lineage[key] for key in MADE_OF if key in run.lineage})
    for item in entries(run.lineage, "inputs"):
        # By content: the same file under two names is the same input.
        found[f"inputs.{item.get('role')}"] = item.get("sha256") or item.get("commit") or item.get("path")
    for item in entries(run.lineage, "ancestors"):
        found[f"ancestors.{item.get('role')}"] = item.get("digest") or item.get("path")
    return found


def _scores(run: RunRecord) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in ("eval", "train"):
        found = run.scores.get(part)
        if isinstance(found, dict):
            out |= {k: v for k, v in found.items() if k not in CLOCK and not k.endswith("_s")}
    return out | {"wall_s": run.lineage.get("wall_s"), "peak_rss_mb": run.lineage.get("peak_rss_mb")}


def _rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    keys = list(dict.fromkeys(key for values in found for key in values))
    rows = [(key, [values.get(key) for values in found]) for key in keys]
    return [(key, values) for key, values in rows if any(v is not None for v in values)]


def _differing(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    return [(key, values) for key, values in _rows(found) if any(v != values[0] for v in values)]
