"""At the start all processes compare what has to be the same: versions, options, data, weights.

Each check is collective and raises the same InputError in every process, or in none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from trimtab import __version__
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.parallel.world import world

SHOWN = 60
"""Characters of a value that a message shows."""


def same_run(method: str, config: BaseModel, device: str, beside: Mapping[str, Any] | None = None) -> None:
    """Versions, method, every option, and what ``auto`` makes of the device. Names the first that differs.

    ``device``: the models'; its number may differ. ``beside``: what else decides (``--force``), by the name
    that a message gives it.
    """
    here = world()
    if here.alone:
        return
    about = {
        "trimtab's version": __version__,
        "Python's version": platform.python_version(),
        "PyTorch's version": torch.__version__,
        "transformers' version": importlib.metadata.version("transformers"),
        "the method": method,
        **(beside or {}),
        **options_of(config.model_dump(mode="json")),
        "the device that models run on": device.partition(":")[0],
    }
    if (found := _difference(about)) is not None:
        name, one, mine, other, theirs = found
        raise InputError(
            f"{name} differs between processes: {mine} in process {one} and {theirs} in process {other}; all "
            "have to be started alike"
        )


def options_of(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaf options by dotted key; a list's entries by their number.

    >>> options_of({"train": {"lr": 0.1}, "data": {"sources": [{"path": "a"}]}})
    {'train.lr': 0.1, 'data.sources.0.path': 'a'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, dict) and value:
            found |= options_of(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_size(batch_groups: int, shard_over: int) -> None:
    """The number of processes fits what they share. Raises InputError."""
    size = world().size
    if size == 1:
        return
    if batch_groups < size:
        raise InputError(
            f"train.batch_groups = {batch_groups} is below the number of processes, {size}: some would have "
            "nothing to do; raise it, or start fewer processes"
        )
    if shard_over and size % shard_over:
        raise InputError(
            f"parallel.shard_over = {shard_over} does not divide the number of processes, {size}"
        )


def same_data(fingerprints: Mapping[str, str | None], groups: Sequence[Group]) -> None:
    """Files by their digests, then groups as they were read and tokenised. Names the first that differs."""
    here = world()
    if here.alone:
        return
    if (found := _difference(dict(fingerprints))) is not None:
        name, one, mine, other, theirs = found
        raise InputError(
            f"{name} is not the same file in all processes: its SHA-256 is {mine[:16]} in process {one} and "
            f"{theirs[:16]} in process {other}; give every machine the same data"
        )
    marks = array("Q", [_mark(group) for group in groups])
    about = {"the number of groups": len(marks), "": hashlib.sha256(marks.tobytes()).hexdigest()}
    found = _difference(about)
    if found is None:
        return
    name, one, mine, other, theirs = found
    if name:
        raise InputError(
            f"{name} that the data gives differs between processes: {mine} in process {one}, {theirs} in "
            f"process {other}; give every machine the same data and tokenizer"
        )
    every = here.gather(list(marks))
    place = next(i for i, both in enumerate(zip(every[one], every[other], strict=True)) if len({*both}) > 1)
    raise InputError(
        f"{here.agreed(groups[place].id)} is not the same in processes {one} and {other}, as read and "
        "tokenised: give every machine the same data and tokenizer"
    )


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_weights(model: nn.Module) -> None:
    """The sums of all weights, which loading or drawing them may have made differ. Names the first."""
    if world().alone:
        return
    about: dict[str, Any] = {}
    for name, p in model.named_parameters():
        # Bits as whole numbers: their sum is exact, whatever the order and the device.
        bits = p.detach().view(_WHOLE[p.element_size()]) if p.element_size() in _WHOLE else p.detach()
        about[name] = [list(p.shape), int(bits.sum(dtype=torch.int64))]
    if (found := _difference(about)) is not None:
        name, one, _, other, _ = found
        raise InputError(
            f"the model's weight {name} differs between processes {one} and {other} before the first step: "
            "give every machine the same model files"
        )


def _difference(about: dict[str, Any]) -> tuple[str, int, str, int, str] | None:
    """The first entry that differs from the first process's: name, and rank and value of two processes.

    In every process the same; None where all are equal.
    """
    here = world()
    digest = hashlib.sha256(_written(about).encode()).hexdigest()
    digests = here.gather(digest)
    odd = next((rank for rank, other in enumerate(digests) if other != digests[0]), None)
    if odd is None:
        return None
    every = here.gather(about if here.rank in (0, odd) else {})
    first, other = every[0], every[odd]
    name = next(k for k in {**first, **other} if _written(first.get(k, ...)) != _written(other.get(k, ...)))
    return name, 0, _shown(first.get(name, ...)), odd, _shown(other.get(name, ...))


def _written(value: Any) -> str:
    """What values are compared by: 1 and 1.0 are equal, and a message has them as two."""
    return "" if value is ... else json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    if value is ...:
        return "nothing"
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _mark(group: Group) -> int:
    """A number that changes with what is learned from a group: 64 bits of two checksums."""
    low = high = 0
    plain: list[Any] = [group.id, group.weight, group.source]
    parts = [group.prompt_tokens or []]
    for response in group.responses:
        parts.append(response.tokens or [])
        plain += [response.mask, response.preferred, response.label, response.rank, response.ratings]
        plain += [response.step_labels, response.step_ends, response.reward, response.ref_logps]
    for part in parts:
        raw = array("q", part).tobytes()
        low, high = zlib.crc32(raw, low), zlib.adler32(raw, high)
    raw = repr(plain).encode()
    return zlib.crc32(raw, low) << 32 | zlib.adler32(raw, high)
