"""Loading: a hub name, a folder, or new weights. safetensors only, no remote code unless asked.

``requested_dtype`` stays with the model: weights load in fp32 (they become the masters) and are rounded by
the optimiser if the run computes in bf16.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from trimtab.batch import Layout
from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.models.language_model import LanguageModel


class ModelConfig(Section):
    """Which model is trained."""

    path: str = Field("", description="hub name or folder of the model to tune")
    revision: str = Field("main", description="hub revision")
    tokenizer: str = Field("", description="hub name or folder of the tokenizer; empty takes the model's")
    chat_template: str = Field("", description="file with a Jinja chat template, instead of the tokenizer's")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="what the forward pass computes in; auto measures; masters are fp32 in any case"
    )
    layout: Literal["auto", "tree", "plain"] = Field(
        "auto", description="auto takes the tree where a check shows that it is exact"
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="attention kernel of transformers"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    trust_remote_code: bool = Field(False, description="run code that comes with the model: your own risk")

    @model_validator(mode="after")
    def _path(self) -> ModelConfig:
        if not self.path:
            raise ValueError("path is required: a hub name or a folder")
        return self


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a padding id and the user's chat template. Raises InputError."""
    name = config.tokenizer or config.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises many types here; all mean "not loadable"
        raise InputError(f"model.tokenizer: cannot load a tokenizer from {name!r}: {_short(error)}") from None
    if config.chat_template:
        file = Path(config.chat_template)
        if not file.is_file():
            raise InputError(f"model.chat_template: {file}: no such file")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def load_model(config: ModelConfig) -> LanguageModel:
    """The model in fp32 (or fp64 if configured), in evaluation mode: no dropout in any forward pass.

    Raises InputError for a missing folder, a folder without config.json or safetensors, an architecture
    that is no causal LM, or weights that lack some of the model's tensors.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    folder = Path(config.path)
    if folder.is_dir():
        _check_folder(folder)
    elif config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise InputError(f"model.path: {config.path}: no such folder")
    extra: dict[str, Any] = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    tokenizer = load_tokenizer(config)
    try:
        AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=torch.float64 if config.dtype == "float64" else torch.float32,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:
        raise InputError(f"model.path: cannot load {config.path!r}: {_short(error)}") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers draws them at random and only warns.
        raise InputError(
            f"model.path: {config.path} has no weights for {len(missing)} of the model's tensors "
            f"(first {missing[0]}); is it a whole causal language model, with its head?"
        )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device: {device!r} is not usable here: {_short(error)}") from None
    return wrap(model, tokenizer, requested_dtype=config.dtype, layout=config.layout)


def wrap(model: Any, tokenizer: Any, *, requested_dtype: str = "auto", layout: str = "auto") -> LanguageModel:
    """A LanguageModel around a transformers model that the caller built."""
    model.eval()
    # Families without biases, windows or experts share this one switch; none may keep a cache in training.
    model.config.use_cache = False
    given: Layout = "plain" if layout == "plain" else "tree"
    lm = LanguageModel(model, tokenizer, given)
    lm.requested_dtype = requested_dtype
    return lm


def frozen_copy(lm: LanguageModel) -> LanguageModel:
    """An independent copy that does not learn: the reference."""
    model = copy.deepcopy(lm.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    twin = LanguageModel(model, lm.tokenizer, lm.layout)
    twin.chunked_head = lm.chunked_head
    twin.requested_dtype = lm.requested_dtype
    return twin


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"model.path: {folder} has no config.json; is it a saved model?")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.path: {folder} has no .safetensors file; pickles are not loaded, convert them first"
        )


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if os.environ.get("HF_HUB_OFFLINE") and "offline" not in text:
        text += " (HF_HUB_OFFLINE is set)"
    return text[:300]
