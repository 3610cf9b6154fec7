"""One file is one method: it holds ``Config`` and ``train``. Adding a file adds a method.

What methods share stands in ``shared/``. A file name's underscores are hyphens in the method's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from trimtab.errors import InputError


def names() -> list[str]:
    """The methods there are, by file name."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def find(name: str) -> ModuleType:
    """The method's module. Raises InputError that lists the methods."""
    if name not in names():
        raise InputError(f"unknown method {name!r}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
