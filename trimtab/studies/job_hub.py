"""The tokenizer of a run that is planned: what is on this machine, else the hub's if it answers at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from trimtab.errors import InputError
from trimtab.models.load import ModelConfig, load_tokenizer, resolve
from trimtab.planning import models
from trimtab.studies.job_roles import adapter_base

LOGGERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")
"""Of the hub's client and of what it sends requests with."""


def tokenizer_at_hand(config: ModelConfig) -> Any:
    """As the run loads it. A plan must not wait for a hub that is away, whose client tries for minutes.

    Files of this machine, the hub's cache among them, come first; only where they do not do is the hub asked,
    once and briefly. Raises InputError where there is no tokenizer so.
    """
    with quiet():
        try:
            with closed_hub():
                return _loaded(config)
        except InputError:
            if constants.HF_HUB_OFFLINE or not _of_hub(config):
                raise
        if not models.hub_answers():
            name = config.tokenizer or config.path
            raise InputError(f"the tokenizer of {name} is not on this machine, and the hub gave no answer")
        return _loaded(config)


@contextmanager
def closed_hub() -> Iterator[None]:
    """No request leaves this process: what is not on this machine is not there."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet() -> Iterator[None]:
    """The lines of HTTP clients are no lines of a plan."""
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _loaded(config: ModelConfig) -> Any:
    _, base = resolve(config)
    return load_tokenizer(base)


def _of_hub(config: ModelConfig) -> bool:
    """Something of the model is a name, which the hub may know."""
    places = (config.path, config.tokenizer, adapter_base(config.path))
    return any(place and not Path(place).exists() for place in places)
