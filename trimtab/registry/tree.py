"""The tree of runs that a run stands on, read from the folders as they are now."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.registry.ancestry import DEEPEST, entries, read_lineage, run_digest
from trimtab.registry.digests import forget
from trimtab.registry.still import State, locate, still


@dataclass
class Ancestor:
    """A run in the tree of those that a run stands on."""

    role: str
    path: str
    state: State
    detail: str = ""
    method: str = ""
    status: str = ""
    ancestors: list[Ancestor] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return {**self.__dict__, "ancestors": [a.to_dict() for a in self.ancestors]}


def ancestry(run: Path, *, again: bool = True) -> Ancestor:
    """The tree of runs behind a run, from the folders themselves: which are missing, which changed since.

    A run has changed where its lineage is another than the one that its descendant was made from, or its
    model is other files. Below a run that is missing stands what its descendant recorded of it. Raises
    InputError for a folder without a lineage. ``again`` False takes digests that were computed just now.
    """
    lineage = read_lineage(run)
    if again:
        forget()
    root = Ancestor(
        "", str(run), "same", "", str(lineage.get("method")), str(lineage.get("status", "finished"))
    )
    root.ancestors = _below(run, lineage, [run.resolve()])
    return root


def _below(run: Path, lineage: dict[str, Any], above: list[Path]) -> list[Ancestor]:
    """Of a run that was read; ``above``: the runs between it and the root, so that no circle is walked."""
    if len(above) > DEEPEST:
        return []
    inputs = {item.get("role"): item for item in entries(lineage, "inputs")}
    out = []
    for item in entries(lineage, "ancestors"):
        where = locate(str(item.get("path")), run, lineage)
        node = _node(item, where)
        if node.state == "missing" or where is None:
            node.ancestors = _recorded(entries(item, "ancestors"), where or run, lineage)
        elif where.resolve() not in above:
            model = inputs.get("model" if node.role == "parent" else node.role)
            if node.state == "same" and model is not None:
                node = _with_model(node, where, model)
            node.ancestors = _below(where, read_lineage(where), [*above, where.resolve()])
        out.append(node)
    return out


def _node(item: dict[str, Any], where: Path | None) -> Ancestor:
    node = Ancestor(
        *(str(item.get("role")), str(item.get("path")), "missing"),
        method=str(item.get("method") or ""),
        status=str(item.get("status") or ""),
    )
    if where is None:
        return node
    try:
        lineage = read_lineage(where)
    except InputError as error:
        node.detail = str(error)
        return node
    node.method = str(lineage.get("method") or node.method)
    node.status = str(lineage.get("status") or node.status)
    was = item.get("digest")
    if was is None:
        node.state, node.detail = "note", "its digest was not recorded"
    elif run_digest(lineage) == was:
        node.state = "same"
    else:
        node.state, node.detail = "changed", "it was run again or edited since"
    return node


def _with_model(node: Ancestor, where: Path, model: dict[str, Any]) -> Ancestor:
    """The same, changed where the files of its model are no longer those that were started from."""
    folder = os.path.dirname(os.path.normpath(str(model.get("path"))))
    if model.get("sha256") is None or os.path.realpath(folder) != os.path.realpath(node.path):
        return node  # started from another model than its parent's
    found = still("model", node.path, where / "model", "model", model)
    if found.state != "same":
        node.state, node.detail = "changed", f"model {found.state}: {found.detail}".removesuffix(": ")
    return node


def _recorded(found: list[dict[str, Any]], run: Path, lineage: dict[str, Any]) -> list[Ancestor]:
    """What is known of the ancestors of a run that is gone."""
    out = []
    for item in found:
        node = _node(item, locate(str(item.get("path")), run, lineage))
        node.ancestors = _recorded(entries(item, "ancestors"), run, lineage)
        out.append(node)
    return out
