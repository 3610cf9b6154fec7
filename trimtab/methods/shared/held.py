"""What a run's processes would hold of its models, were each of them whole: for ``weights = "auto"``.

Read off the configuration before anything is loaded, as a plan's is off its job (``planning/processes.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.models.load import ModelConfig, count_parameters, resolve
from trimtab.parallel.rule import Held

OF_SCORES = ("reward_model", "process_reward")
"""Sections of methods whose policy is itself a model of scores."""
TERMS = ("reward_model", "process_reward_model")
"""Reward terms that are models."""


def held_by(config: Any, dtype: torch.dtype) -> Held | None:
    """Of the models of a method's configuration; None where the policy's size cannot be told.

    A further model whose size cannot be told counts nothing, nor does an adapter.
    """
    size = dtype.itemsize
    scored = any(hasattr(config, section) for section in OF_SCORES)
    own = count_parameters(config.model, scores=scored)
    if own is None:
        return None
    adapted = config.adapter.kind != "none"
    learns = 0 if adapted else own
    frozen: list[tuple[float, float]] = [(own, size)] if adapted else []
    critic = getattr(config, "critic", None)
    if critic is not None and critic.share != "trunk":
        found = _counted(critic.path or config.model.path, config.model, scores=True)
        if not adapted:
            learns += found
        elif critic.path and not _same_base(critic.path, config.model):
            frozen.append((found, size))
    frozen += _references(config, own, size, adapted)
    for args in _learned(getattr(config, "reward", None)):
        path, asked = str(args.get("path", "")), args.get("dtype")
        compute = str(dtype).removeprefix("torch.")
        if not (adapted and asked in (None, compute) and _same_base(path, config.model)):
            count = _counted(path, ModelConfig(path=path), scores=True)
            frozen.append((count, 2 if asked == "bfloat16" else 4))
    if getattr(getattr(config, "options", None), "overlap", False) and not adapted:
        frozen.append((own, size))
    return Held(learns, tuple(frozen))


def _references(config: Any, own: int, size: int, adapted: bool) -> list[tuple[float, float]]:
    """What stays in memory to be compared with; over an adapter's base it is the base itself."""
    labels = next((getattr(config, name) for name in ("kto", "mixed") if hasattr(config, name)), None)
    if labels is not None:
        if getattr(labels, "labels", labels).kl != "batch":
            return []
        if labels.reference:
            return [(_counted(labels.reference, config.model), size)]
        return [] if adapted else [(own, size)]
    options = getattr(config, "options", None)
    if options is None or adapted:
        return []
    if not (hasattr(config, "critic") or hasattr(config, "online_dpo") or hasattr(options, "log_kl")):
        return []
    if hasattr(options, "log_kl") and not (options.beta or options.log_kl):
        return []
    averaged = getattr(options, "reference_average", 1.0) < 1
    return [(own, size + max(4, size) if averaged else size)]


def _learned(reward: Any) -> Iterator[dict[str, Any]]:
    """The args of each term of a reward that is a model."""
    for term in [] if reward is None else reward.terms:
        if term.name in TERMS:
            yield term.args
        elif term.name == "judge" and term.args.get("kind") == "reward_model":
            yield {"dtype": "float32", **dict(term.args.get("args", {}))}


def _counted(path: str, like: ModelConfig, *, scores: bool = False) -> int:
    """Parameters of what is at ``path``; what is wrong with it, its loading says."""
    try:
        return count_parameters(like.model_copy(update={"path": path}), scores=scores) or 0
    except InputError:
        return 0


def _same_base(path: str, policy: ModelConfig) -> bool:
    """What is at ``path`` is an adapter on the base that the policy's adapter stands on."""
    try:
        saved, base = resolve(ModelConfig(path=path))
        _, ours = resolve(policy)
    except InputError:
        return False
    if saved is None:
        return False
    if Path(base.path).is_dir() or Path(ours.path).is_dir():
        return Path(base.path).resolve() == Path(ours.path).resolve()
    return base.path == ours.path
