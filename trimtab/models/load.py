"""Loading: a hub name or a folder, of a model or an adapter. safetensors only, no remote code unless asked.

``requested_dtype`` stays with the model: weights load in fp32 (they become the masters) and are rounded by
the optimiser if the run computes in bf16. A base that an adapter learns over is no master: it loads in what
the run computes in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from trimtab.batch import Layout
from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.models.adapter_files import SavedAdapter, blamed, read_adapter, with_adapter
from trimtab.models.adapters import AdapterConfig
from trimtab.models.language_model import LanguageModel
from trimtab.models.quantised import quantisation, settle
from trimtab.models.scalar_model import ScalarModel, score_head
from trimtab.models.tree_model import Holder, TreeModel
from trimtab.models.vetting import vet_folder


class ModelConfig(Section):
    """Which model is trained."""

    path: str = Field("", description="hub name or folder of the model, or of an adapter, to tune")
    revision: str = Field("main", description="hub revision")
    tokenizer: str = Field("", description="hub name or folder of the tokenizer; empty takes the model's")
    chat_template: str = Field("", description="file with a Jinja chat template, instead of the tokenizer's")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="what the forward pass computes in; auto measures; masters are fp32 in any case"
    )
    layout: Literal["auto", "packed", "tree", "plain"] = Field(
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


def device_of(config: ModelConfig) -> str:
    """The device that the model is for; whether it is usable here, loading says."""
    if config.device not in ("auto", "cuda"):
        return config.device
    if not torch.cuda.is_available():
        return "cpu" if config.device == "auto" else "cuda"
    # By number, since the current device is one of each thread; of many processes each has its own.
    return f"cuda:{torch.cuda.current_device()}" if torch.distributed.is_initialized() else "cuda"


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
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"model.chat_template: {file}: cannot be read as UTF-8 text: {error}") from None
    return tokenizer


def load_model(
    config: ModelConfig,
    adapter: AdapterConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
    seed: int = 0,
    holder: Holder | None = None,
) -> LanguageModel:
    """The model in fp32 (or fp64 if configured), in evaluation mode: no dropout in any forward pass.

    With an ``adapter`` the model is a frozen base in ``dtype`` and the adapter that learns: a new one drawn
    by ``seed``, or the one at ``config.path``. Without, an adapter at that path is merged into its base.
    ``frozen``: it never learns, so that no weight takes a gradient, and it computes in ``dtype`` and is read
    in it. ``holder`` spreads its weights over processes; each process of a machine reads them in its turn.

    Raises InputError for a missing folder, a folder without config.json or safetensors, an architecture
    that is no causal LM, weights that lack some of the model's tensors, an adapter that does not fit.
    """
    if holder is not None:
        with holder.turn():
            lm = load_model(_on_cpu(config), adapter, dtype=dtype, frozen=frozen, seed=seed)
            holder.spread(lm)
        holder.begin(lm)
        return lm
    saved, base = resolve(config)
    tokenizer = load_tokenizer(base)
    if saved is not None and saved.scores:
        raise InputError(f"model.path: {saved.path} is a reward model's adapter, not a language model's")
    own = _read_in(saved, dtype) if frozen else None
    model, missing = _load_weights(base, AutoModelForCausalLM, adapter, dtype, own=own)
    if missing:
        # transformers draws them at random and only warns.
        raise InputError(
            f"model.path: {base.path} has no weights for {len(missing)} of the model's tensors "
            f"(first {missing[0]}); is it a whole causal language model, with its head?"
        )
    model, made, notes = with_adapter(model, (base.path, base.revision), saved, adapter, seed, scores=False)
    lm = wrap(model, tokenizer, requested_dtype=config.dtype, layout=config.layout)
    lm.adapter, lm.notes = made, notes
    if frozen:
        _freeze(lm, dtype)
    return lm


def load_scalar_model(
    config: ModelConfig,
    adapter: AdapterConfig | None = None,
    *,
    new_head: Literal["refuse", "zeros", "normal"] = "refuse",
    outputs: int = 1,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
    seed: int = 0,
    holder: Holder | None = None,
) -> ScalarModel:
    """A sequence classification model: a reward model, or a critic.

    ``adapter``, ``dtype``, ``frozen`` and ``holder``: as in :func:`load_model`.

    ``new_head``: what a folder without a head (a causal language model) gets, of ``outputs`` scores. "normal"
    draws from N(0, 1/(D+1)) by ``seed`` (Stiennon et al., 2020, appendix C.1); "refuse" is an InputError, as
    are the cases of :func:`load_model` and an architecture without a linear sequence classification head.
    """
    if holder is not None:
        with holder.turn():
            rm = load_scalar_model(
                _on_cpu(config),
                adapter,
                new_head=new_head,
                outputs=outputs,
                dtype=dtype,
                frozen=frozen,
                seed=seed,
            )
            holder.spread(rm)
        holder.begin(rm)
        return rm
    saved, base = resolve(config)
    tokenizer = load_tokenizer(base)
    extra = {} if _has_score_head(base) else {"num_labels": outputs}
    if saved is not None and saved.scores:
        extra = {"num_labels": saved.outputs}
    own = _read_in(saved, dtype) if frozen else None
    model, missing = _load_weights(base, AutoModelForSequenceClassification, adapter, dtype, own=own, **extra)
    head = score_head(model)
    headless = [name for name in missing if name.startswith("score.")]
    if others := sorted(set(missing) - set(headless)):
        raise InputError(
            f"model.path: {base.path} has no weights for {len(others)} of the model's tensors "
            f"(first {others[0]})"
        )
    if headless:
        if new_head == "refuse" and not (saved is not None and saved.scores):
            raise InputError(
                f"model.path: {config.path} has no reward head (score.weight): train one with trimtab reward"
            )
        draw = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.weight.copy_(draw * (0.0 if new_head == "zeros" else (head.in_features + 1) ** -0.5))
            if head.bias is not None:
                head.bias.zero_()
        model.config.pad_token_id = padding_apart(tokenizer)
    model, made, notes = with_adapter(model, (base.path, base.revision), saved, adapter, seed, scores=True)
    lm = ScalarModel(model, tokenizer, "plain" if config.layout == "plain" else "tree")
    lm.requested_dtype, lm.adapter, lm.notes = config.dtype, made, notes
    if frozen:
        _freeze(lm, dtype)
    return lm


def _freeze(lm: TreeModel, dtype: torch.dtype | None) -> None:
    lm.model.requires_grad_(False)
    if dtype is not None:
        lm.cast(dtype)


def _on_cpu(config: ModelConfig) -> ModelConfig:
    """To be read there whole: what is spread comes to its device a layer at a time."""
    return config.model_copy(update={"device": "cpu"})


def load_classifier(config: ModelConfig, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Any sequence classification model, encoders included, as it was saved, and its tokenizer.

    In ``dtype``, where one is given. Raises InputError for a folder that lacks weights, and otherwise as
    :func:`load_model` does.
    """
    saved, base = resolve(config)
    tokenizer = load_tokenizer(base)
    extra = {"num_labels": saved.outputs} if saved is not None and saved.scores else {}
    own = _read_in(saved, dtype)
    model, missing = _load_weights(base, AutoModelForSequenceClassification, None, None, own=own, **extra)
    if extra:
        missing = [name for name in missing if not name.startswith("score.")]
        model.config.pad_token_id = padding_apart(tokenizer)
    if missing:
        raise InputError(
            f"model.path: {config.path} has no weights for {missing[0]}: it is no reward model; "
            "train one with trimtab reward"
        )
    model, _, _ = with_adapter(model, (base.path, base.revision), saved, None, 0, scores=True)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model, tokenizer


def _read_in(saved: SavedAdapter | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """What weights are read in that are computed with in ``dtype``; None for as usual.

    An adapter that is merged is added to its base before the sum is rounded.
    """
    return dtype if saved is None else None


def resolve(config: ModelConfig) -> tuple[SavedAdapter | None, ModelConfig]:
    """The adapter at ``config.path``, None where there is none, and where the model itself is.

    Raises InputError for an adapter that cannot be read, and for a folder that is no model.
    """
    _check_local(config.path)
    with blamed("model.path"):
        saved = read_adapter(config.path, config.revision)
    base = config
    if saved is not None:
        named = config.tokenizer
        if not named and (saved.folder / "tokenizer_config.json").is_file():
            named = str(saved.folder)
        base = config.model_copy(update={"path": saved.base, "revision": saved.revision, "tokenizer": named})
    _check_path(base)
    return saved, base


def architecture(config: ModelConfig) -> Any:
    """The configuration of the model that would be loaded; nothing of its weights is read."""
    _, base = resolve(config)
    try:
        return AutoConfig.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except Exception as error:
        raise InputError(f"model.path: cannot load {base.path!r}: {_short(error)}") from None


def count_parameters(config: ModelConfig, *, scores: bool = False) -> int | None:
    """How many parameters the model has that would be loaded; None where that cannot be told without it.

    ``scores``: with a head of scores.
    """
    kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        found = architecture(config)
        if scores and not _has_score_head(config):
            found.num_labels = 1
        with torch.device("meta"):
            model: Any = kind.from_config(found)
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return None
    return sum(p.numel() for p in model.parameters())


def scores(config: ModelConfig) -> bool:
    """What ``config.path`` holds gives scores and no text."""
    saved, base = resolve(config)
    return _has_score_head(base) if saved is None else saved.scores


def _has_score_head(config: ModelConfig) -> bool:
    """The folder was saved as a sequence classification model, whose number of outputs counts."""
    try:
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception:  # the loading that follows says what is wrong
        return False
    return any("SequenceClassification" in name for name in found.architectures or [])


def padding_apart(tokenizer: Any) -> int | None:
    """A padding id that ends no response.

    transformers reads a sequence classification at the last token that is not padding. With padding = end
    token, as many tokenizers have it, that is the token before the end. None makes it refuse batches of
    several sequences, rather than read elsewhere than this reward was trained.
    """
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if token is not None and token != tokenizer.eos_token_id:
            return token
    return None


def _load_weights(
    config: ModelConfig,
    auto_class: Any,
    adapter: AdapterConfig | None,
    dtype: torch.dtype | None,
    own: torch.dtype | None = None,
    **keywords: Any,
) -> tuple[Any, list[str]]:
    """The module on its device, and the names of the tensors that the folder does not have.

    In ``own``, left out fp32 (fp64 if configured); as the frozen base of an ``adapter`` in ``dtype``, if one
    is given.
    """
    extra: dict[str, Any] = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    own = own or (torch.float64 if config.dtype == "float64" else torch.float32)
    if adapter is not None and adapter.kind != "none":
        own = dtype or own
        extra |= quantisation(adapter.quantise, own, device_of(config))
    try:
        loaded: Any = auto_class.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=own,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **extra,
            **keywords,
        )
    except Exception as error:
        raise InputError(f"model.path: cannot load {config.path!r}: {_short(error)}") from None
    model, report = loaded
    device = device_of(config)
    try:
        if "quantization_config" in extra:
            settle(model)  # put on its device while it was loaded
        else:
            model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device: {device!r} is not usable here: {_short(error)}") from None
    model.eval()
    # Families without biases, windows or experts share this one switch; none may keep a cache in training.
    model.config.use_cache = False
    return model, sorted(report["missing_keys"])


def wrap(model: Any, tokenizer: Any, *, requested_dtype: str = "auto", layout: str = "auto") -> LanguageModel:
    """A LanguageModel around a transformers model that the caller built."""
    model.eval()
    model.config.use_cache = False
    given: Layout = "plain" if layout == "plain" else "tree"
    lm = LanguageModel(model, tokenizer, given)
    lm.requested_dtype = requested_dtype
    return lm


def _check_local(path: str) -> None:
    """Raises InputError for a folder that is not there; a name with one slash may be the hub's instead."""
    if Path(path).exists():
        return
    owner, slash, _ = path.partition("/")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"model.path: {path}: no such folder")
    if slash and Path(owner).is_dir():
        raise InputError(
            f"model.path: {path}: no such folder, though there is a folder {owner} here; if it is a name on "
            "the hub, run from another folder"
        )


def _check_path(config: ModelConfig) -> None:
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    folder = Path(config.path)
    if not folder.is_dir():
        _check_local(config.path)
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"model.path: {folder} has no config.json; is it a saved model?")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model.path: {folder} has no .safetensors file; pickles are not loaded, convert them first"
        )
    vet_folder(folder, trust_remote_code=config.trust_remote_code)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if os.environ.get("HF_HUB_OFFLINE") and "offline" not in text:
        text += " (HF_HUB_OFFLINE is set)"
    return text[:300]
