"""Weights spread over processes (FSDP2), and how passes are made on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.models.tree_model import TreeModel


@contextmanager
def local_passes(lm: TreeModel) -> Iterator[None]:
    """Within it each process passes its own groups through the model, as often as it likes; no gradients.

    A model that is not spread needs nothing for it.
    """
    if lm.spread:
        raise NotImplementedError
    yield
