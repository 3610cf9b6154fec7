"""A frozen base in 4 or 8 bits, by bitsandbytes through transformers.

Its layers keep what they need beside their weights, and rearrange it while they compute: what the first tree
on a base does would leave the others with wrong numbers, so it is brought into its last form at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

from trimtab.errors import InputError


def quantisation(kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for a base in ``kind`` that computes in ``dtype``; {} for "none".

    Raises InputError where bitsandbytes is not installed or does not load.
    """
    if kind == "none":
        return {}
    _import(kind)
    from transformers import BitsAndBytesConfig

    made = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": made, "device_map": {"": device}}


def _import(kind: str) -> None:
    """Load bitsandbytes, which on a CPU would take kernels from a hub: code, and nothing used here."""
    before = sys.modules.get("kernels", _ABSENT)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(
            f'adapter.quantise = "{kind}" needs bitsandbytes: pip install "trimtab[quantised]"'
        ) from None
    except Exception as error:
        raise InputError(f'adapter.quantise = "{kind}": bitsandbytes does not load: {error}') from None
    finally:
        del sys.modules["kernels"]
        if before is not _ABSENT:
            sys.modules["kernels"] = before


_ABSENT: Any = object()


def settle(model: nn.Module) -> None:
    """Before the base is shared: nothing that a forward pass does changes a weight any more."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a pass without gradient packs the weights anew, in a form that has no backward pass.
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state") and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()


def held(model: nn.Module) -> list[Any]:
    """What quantised layers keep beside their weights, which trees on one base share too."""
    kept: list[Any] = []
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            kept.append(module.quant_state)
        elif hasattr(module, "init_8bit_state"):
            kept += [module.state.CB, module.state.SCB]
    return [thing for thing in kept if thing is not None]
