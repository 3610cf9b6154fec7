"""One file is one method: it holds ``Config`` and ``train``. Adding a file adds a method."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from trimtab.errors import InputError

NOT_METHODS = {"setup", "offline", "online", "ahead", "critic"}


def names() -> list[str]:
    """The methods there are, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_METHODS)


def find(name: str) -> ModuleType:
    """The method's module. Raises InputError that lists the methods."""
    if name not in names():
        raise InputError(f"unknown method {name!r}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
