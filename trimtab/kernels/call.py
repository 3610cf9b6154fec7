"""How a compiled kernel is called: which tensors it takes, and their addresses."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from trimtab.kernels.build import library

SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


def compiled(*tensors: torch.Tensor) -> bool:
    """There is a compiled kernel for these tensors: all of one dtype it knows, on CPU."""
    dtype = tensors[0].dtype
    if dtype not in SUFFIX or library() is None:
        return False
    # A loop and no generator: a decode step asks some fifty times.
    for tensor in tensors:  # noqa: SIM110
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            return False
    return True


_functions: dict[tuple[str, torch.dtype], Any] = {}


def call(name: str, *arguments: Any) -> None:
    """Run a kernel in the dtype of the first argument, a tensor; its signature fixes the others' dtypes.

    A tensor is passed as a pointer, an int as a C long.
    """
    key = (name, arguments[0].dtype)
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = getattr(library(), name + SUFFIX[arguments[0].dtype])
        function.restype = None
        # None, for an absent tensor, is a null pointer.
        function.argtypes = [_C_TYPES.get(type(a), ctypes.c_void_p) for a in arguments]
    function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])


_C_TYPES: dict[type, Any] = {int: ctypes.c_long, float: ctypes.c_float}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What plain forms compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def matrix_unit() -> bool:
    """This CPU has AMX for bf16, and the system lets this process use it."""
    built = library()
    return built is not None and bool(built.skinny_available())
