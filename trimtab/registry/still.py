"""Whether one thing that a lineage names is still what it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.registry.digests import Kind, digests_of

State = Literal["same", "changed", "missing", "note"]
"""A note is no fault: it says what cannot be known, or what may explain one."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    state: State
    path: str = ""
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Nothing is wrong with it."""
        return self.state in ("same", "note")


def locate(path: str, run: Path, lineage: dict[str, Any]) -> Path | None:
    """Where a path that a lineage names is now; None where it is nowhere.

    As it stands, from the run's working directory, and where the run's folder was moved together with what it
    was made from, beside it as it was then.
    """
    there = Path(path)
    candidates = [there]
    if not there.is_absolute():
        candidates.append(Path(str(lineage.get("working_directory") or ".")) / path)
    out = lineage.get("out")
    if isinstance(out, str) and Path(out).is_absolute() == there.is_absolute():
        candidates.append(run / os.path.relpath(path, out))
    for candidate in candidates:
        try:
            if candidate.exists():
                return candidate
        except (OSError, ValueError):
            continue
    return None


def still(what: str, path: str, where: Path, kind: Kind, was: dict[str, Any]) -> Check:
    """Compare what lies at ``where`` with the digests that an entry of a lineage recorded."""
    try:
        digest, now = digests_of(where, kind)
    except OSError as error:
        return Check(what, "missing", path, error.strerror or str(error))
    if digest == was.get("sha256"):
        return Check(what, "same", path)
    files = was.get("files")
    return Check(what, "changed", path, changes(files, now) if isinstance(files, dict) else "")


def changes(before: dict[str, Any], now: dict[str, str]) -> str:
    """Which files of a folder are not what they were, in words; empty where only the whole is known."""
    said = [(name, "gone") for name in before if name not in now]
    said += [(name, "new") for name in now if before and name not in before]
    said += [(name, "changed") for name in before if name in now and now[name] != before[name]]
    shown = ", ".join(f"{name} {how}" for name, how in sorted(said)[:5])
    return shown + (f" and {len(said) - 5} more" if len(said) > 5 else "")
