"""What a model's folder may make the libraries do: read safetensors, and nothing else.

transformers reads a folder's ``model.safetensors.index.json`` and opens whatever it lists, by torch.load
where a name does not end in .safetensors, and outside the folder where it says so. A ``config.json`` may ask
for attention kernels from a hub repository, which are code. Neither is asked about by ``trust_remote_code``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import InputError

INDEX = "model.safetensors.index.json"


def vet_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raises InputError for a folder whose own files ask for pickles, other places or code from a hub.

    Only reads the two JSON files named above; a folder without them passes, since loading says what it lacks.
    """
    index = _read(folder / INDEX)
    listed = index.get("weight_map", {}) if isinstance(index, dict) else index
    if listed is not None and not isinstance(listed, dict):
        raise InputError(f"model.path: {folder / INDEX} is no index of weights: save the model anew")
    for name in set(map(str, (listed or {}).values())):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise InputError(
                f"model.path: {folder / INDEX} lists {name[:80]!r}, which is no .safetensors file of this "
                "folder: pickles and files elsewhere are not loaded; save the model anew"
            )
    if trust_remote_code:
        return
    for asked in _kernels(_read(folder / "config.json"), 0):
        raise InputError(
            f"model.path: {folder / 'config.json'} asks for attention kernels from {asked[:80]!r}, which is "
            'code from a hub: remove "attn_implementation" there'
        )


def _read(file: Path) -> Any:
    """The file's JSON; None where there is none or it cannot be read, which loading then says."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _kernels(values: Any, depth: int) -> Iterator[str]:
    """Names of hub repositories under ``attn_implementation``, also in the parts of a composed model."""
    if not isinstance(values, dict) or depth > 8:
        return
    for key, value in values.items():
        if key.strip("_").startswith("attn_implementation"):
            named = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in named if isinstance(name, str) and "/" in name)
        else:
            yield from _kernels(value, depth + 1)
