"""A frozen base in 4 or 8 bits, by bitsandbytes through transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from trimtab.errors import InputError


def quantisation(kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for a base in ``kind`` that computes in ``dtype``; {} for "none".

    Raises InputError where bitsandbytes is not installed.
    """
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f'adapter.quantise = "{kind}" needs bitsandbytes: pip install "trimtab[quantised]"')
    from transformers import BitsAndBytesConfig

    made = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": made, "device_map": {"": device}}
