"""Whether what a run's lineage names is still what it was: every digest is computed again."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.registry.ancestry import config_digest, entries, read_lineage, run_digest
from trimtab.registry.digests import Kind, forget, hub_snapshot
from trimtab.registry.inputs import NOT_HERE
from trimtab.registry.still import Check, locate, still
from trimtab.registry.surroundings import code, packages
from trimtab.registry.tree import ancestry


def check_run(run: Path) -> list[Check]:
    """Inputs, configuration, code, ancestors and what the run wrote, but for its checkpoints.

    Raises InputError for a folder without a lineage, or with a damaged one.
    """
    lineage = read_lineage(run)
    forget()
    return [
        *_status(lineage),
        _configuration(run, lineage),
        *(_input(item, run, lineage) for item in entries(lineage, "inputs")),
        *_code(lineage),
        *_ancestors(run),
        *_outputs(run, lineage),
    ]


def _status(lineage: dict[str, Any]) -> Iterator[Check]:
    status = lineage.get("status", "finished")
    if status != "finished":
        reason = f"{status}: {lineage['reason']}" if lineage.get("reason") else f"its lineage says {status!r}"
        yield Check("run", "missing", detail=f"it did not finish ({reason})")
    for number, sitting in enumerate(entries(lineage, "sittings"), start=1):
        if changed := sitting.get("inputs_changed"):
            listed = ", ".join(map(str, changed)) if isinstance(changed, list) else str(changed)
            yield Check("run", "note", detail=f"before sitting {number} there was a change of {listed}")


def _configuration(run: Path, lineage: dict[str, Any]) -> Check:
    file, was = run / "config.toml", lineage.get("config_sha256")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Check("config", "missing", str(file))
    except (OSError, ValueError, RecursionError) as error:
        return Check("config", "changed", str(file), f"damaged: {error}")
    if was is None:
        return Check("config", "note", str(file), "no digest was recorded")
    return Check("config", "same" if config_digest(values) == was else "changed", str(file))


def _input(item: dict[str, Any], run: Path, lineage: dict[str, Any]) -> Check:
    what, path, was = str(item.get("role")), str(item.get("path")), item.get("sha256")
    said = item.get("kind")
    kind: Kind = said if said in ("folder", "model") else "file"
    where = locate(path, run, lineage)
    if where is None:
        hub = hub_snapshot(
            path.partition(":")[0],
            str(item.get("commit") or item.get("revision") or "main"),
            "models" if kind == "model" else "datasets",
        )
        where = hub[0]
    if was is None:
        return Check(what, "note", path, f"no digest was recorded: {item.get('note') or NOT_HERE}")
    if where is None:
        return Check(what, "missing", path)
    return still(what, path, where, kind, item)


def _code(lineage: dict[str, Any]) -> Iterator[Check]:
    was, now = lineage.get("code"), code()
    if not isinstance(was, dict) or not was.get("sha256"):
        yield Check("code", "note", detail="no digest was recorded")
    elif was["sha256"] == now["sha256"]:
        yield Check("code", "same", detail=f"version {now['version']}")
    else:
        yield Check("code", "changed", detail=f"{_version(was)} then, {_version(now)} now")
    before = lineage.get("packages")
    if isinstance(before, dict):
        here = packages()
        other = [
            f"{k} {v or 'none'} then, {here.get(k) or 'none'} now"
            for k, v in before.items()
            if here.get(k) != v
        ]
        if other:
            yield Check("packages", "note", detail="; ".join(other))


def _version(about: dict[str, Any]) -> str:
    text = f"version {about.get('version')}"
    if commit := about.get("commit"):
        text += f" at {str(commit)[:10]}{' with changes' if about.get('changed') else ''}"
    return text


def _outputs(run: Path, lineage: dict[str, Any]) -> Iterator[Check]:
    found = lineage.get("outputs")
    for name, about in (found if isinstance(found, dict) else {}).items():
        if isinstance(about, dict) and name in ("model", "metrics.jsonl"):
            where = run / name
            yield still(f"written {name}", str(where), where, "model" if name == "model" else "file", about)
    digest = lineage.get("digest")
    if digest is not None and digest != run_digest(lineage):
        yield Check("lineage.json", "changed", str(run), "edited: its own digest is another")


def _ancestors(run: Path) -> Iterator[Check]:
    """Each ancestor once, the nearest first."""
    waiting = [("", node) for node in ancestry(run, again=False).ancestors]
    while waiting:
        prefix, node = waiting.pop(0)
        what = f"{prefix}{node.role}"
        yield Check(f"ancestor {what}", node.state, node.path, node.detail)
        waiting += [(f"{what}.", inner) for inner in node.ancestors]
