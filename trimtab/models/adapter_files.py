"""An adapter's folder, as PEFT writes it: adapter_config.json and adapter_model.safetensors.

Read by hand, and strictly: PEFT's own reader takes a pickle where there are no safetensors, draws missing
weights at random, and knows variants that change the base.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.errors import InputError
from trimtab.models.adapters import (
    PREFIX,
    Adapter,
    AdapterConfig,
    adapt,
    continued,
    fresh,
    inject,
    merge,
    put_weights,
    saved_name,
)

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = f"{PREFIX}score."
"""Before the names of a reward model's head."""

USED: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "fan_in_fan_out": (bool,),
    "task_type": (str,),
}
"""Of adapter_config.json; what an adapter computes."""
MEANINGLESS = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # no forward pass here drops anything
    "init_lora_weights",
    "modules_to_save",
    "bias",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
"""Of adapter_config.json; what says nothing of it, or is looked at on its own."""
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Ways to start an adapter that change the base: weights saved with one are no difference to the base."""
HEADS = {"score", "classifier"}


@dataclass
class SavedAdapter:
    """What an adapter's folder holds."""

    path: str
    folder: Path
    """Where its files are; for a hub name in the cache."""
    peft: LoraConfig
    tensors: dict[str, torch.Tensor]
    """By the names that PEFT gives them."""
    base: str
    """Folder or hub name of the model that it is for."""
    revision: str

    @property
    def scores(self) -> bool:
        """It is a reward model's: it has a head of its own."""
        return any(name.startswith(HEAD) for name in self.tensors)

    @property
    def outputs(self) -> int:
        """How many numbers that head gives."""
        return len(self.tensors[f"{HEAD}weight"])


def read_adapter(path: str, revision: str = "main") -> SavedAdapter | None:
    """The adapter at a folder or a hub name; None for anything else.

    Raises InputError for one that cannot be read, that has no safetensors, or of a kind unknown here.
    """
    file = _config_file(path, revision)
    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a table of settings")
    peft = _settings(file, values)
    if not (0 < peft.lora_alpha < float("inf")):
        raise InputError(f"{file}: lora_alpha is {peft.lora_alpha!r}; it is a number above 0")
    targets = peft.target_modules
    if not isinstance(targets, str) and not all(isinstance(t, str) for t in targets or ()):
        raise InputError(f"{file}: target_modules are names of layers, as text")
    tensors = _weights(path, file.parent, revision)
    head = tensors.get(f"{HEAD}weight")
    if any(name.startswith(HEAD) for name in tensors) and (head is None or head.dim() != 2):
        raise InputError(f"{path}: {WEIGHTS} has no score head as a whole ({HEAD}weight)")
    if bad := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise InputError(f"{path}: {bad[0]} in {WEIGHTS} holds numbers that are not finite")
    ranks = [len(t) for name, t in tensors.items() if ".lora_A" in name and t.dim() == 2]
    named = [peft.r, *(peft.rank_pattern or {}).values()]
    if not ranks or not all(isinstance(r, int) and 1 <= r <= max(ranks) for r in named):
        raise InputError(
            f"{path}: the rank {peft.r!r} of {CONFIG} is not that of {WEIGHTS} ({max(ranks, default='none')})"
        )
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{file} names no base: set base_model_name_or_path to its folder or hub name")
    base = _base(base, file.parent, path)
    if Path(base).is_dir() and (Path(base) / CONFIG).is_file():
        raise InputError(f"{path}: its base {base} is itself an adapter: merge that one with trimtab export")
    return SavedAdapter(path, file.parent, peft, tensors, base, values.get("revision") or "main")


def write_adapter(
    peft: LoraConfig, base: str, revision: str, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """``weights`` by the names of their parameters, as files that PEFT alone loads."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = any(name.startswith("score.") for name in weights)
    values = peft.to_dict() | {
        "base_model_name_or_path": base,
        "revision": None if revision == "main" else revision,
        "inference_mode": True,
        "modules_to_save": ["score"] if scores else None,
    }
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    named = {
        PREFIX + name if name.startswith("score.") else saved_name(name): tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
    }
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def _config_file(path: str, revision: str) -> Path | None:
    folder = Path(path)
    if folder.is_dir():
        return folder / CONFIG if (folder / CONFIG).is_file() else None
    if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
        return None
    from huggingface_hub import constants

    return _hub_config_file(path, revision, constants.HF_HUB_OFFLINE)


@functools.cache
def _hub_config_file(name: str, revision: str, offline: bool) -> Path | None:
    """Asked of the hub once in a process: a start looks at the model several times.

    ``offline``: answered from its cache alone, which says nothing of what the hub has.
    """
    from transformers.utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name, revision=revision)
    except Exception:  # the loading that follows says what is wrong
        return None
    return None if found is None else Path(found)


def _settings(file: Path, values: dict[str, Any]) -> LoraConfig:
    from peft import LoraConfig

    if values.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type {values.get('peft_type')!r}; LoRA, rsLoRA and DoRA are known here"
        )
    start = str(values.get("init_lora_weights") or "").lower()
    kept = values.get("modules_to_save") or []
    for name, value in values.items():
        default = name not in USED and name not in MEANINGLESS and value
        default = default and value != getattr(LoraConfig, name, None)
        unknown = name == "bias" and value not in (None, "none")
        unknown |= name == "modules_to_save" and not (isinstance(kept, list) and set(map(str, kept)) <= HEADS)
        unknown |= name == "init_lora_weights" and start.startswith(REBASED)
        unknown |= name in USED and value is not None and not isinstance(value, USED[name])
        if default or unknown:
            raise InputError(
                f"{file}: {name} = {json.dumps(value)[:80]} is not known here: merge the adapter with PEFT "
                "and give the merged model"
            )
    try:
        return LoraConfig(**{name: values[name] for name in USED if values.get(name) is not None})
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: {error}") from None


def _weights(path: str, folder: Path, revision: str) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    if not file.is_file() and not Path(path).is_dir():
        from transformers.utils import cached_file

        with contextlib.suppress(OSError):
            file = Path(cached_file(path, WEIGHTS, revision=revision) or file)
    if not file.is_file():
        pickled = any(folder.glob("*.bin"))
        how = "; pickles are not loaded, convert it first" if pickled else ""
        raise InputError(f"{path} has no {WEIGHTS}{how}")
    try:
        found = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    # Written without the last part since the time when it was a bare parameter.
    return {
        n.removesuffix(".weight") if ".lora_magnitude_vector" in n else n: tensor
        for n, tensor in found.items()
    }


def _base(name: str, folder: Path, path: str) -> str:
    """The base's folder, as given or from the adapter's own; else a hub name."""
    if Path(name).is_dir():
        return name
    if (folder / name).is_dir():
        return os.path.normpath(folder / name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{path}: there is no base at {name}: set base_model_name_or_path in its {CONFIG}")
    return name


def with_adapter(
    model: Any,
    base: tuple[str, str],
    saved: SavedAdapter | None,
    adapter: AdapterConfig | None,
    seed: int,
    *,
    scores: bool,
) -> tuple[Any, Adapter | None, list[str]]:
    """The model with an adapter that learns, what is known of it, and lines; or with a saved one merged.

    ``base`` is the model's folder or hub name and its revision; ``seed`` draws a new adapter. Raises
    InputError where the saved adapter does not fit the model, or is another than ``adapter`` asks for.
    """
    tensors = None if saved is None else dict(saved.tensors)
    if tensors is not None and scores and not saved.scores:  # type: ignore[union-attr]
        tensors |= {PREFIX + n: p.detach() for n, p in model.named_parameters() if n.startswith("score.")}
    if adapter is None or adapter.kind == "none":
        if saved is None or tensors is None:
            return model, None, []
        with blamed(f"model.path: {saved.path}"):
            inject(model, saved.peft)
            put_weights(model, tensors)
        try:
            merge(model)
        except ValueError as error:  # a scale that overflows
            raise InputError(f"model.path: {saved.path}: {error}") from None
        return model, None, [f"{saved.path} is an adapter: merged into its base {saved.base}"]
    if saved is None:
        settled, peft = adapter, fresh(adapter, scores=scores)
        adapted = adapt(model, peft, seed=seed)
        said = f"a new {adapter.kind} adapter"
    else:
        settled, peft = continued(adapter, saved.peft, saved.path), saved.peft
        with blamed(f"model.path: {saved.path}"):
            adapted = adapt(model, peft, tensors)
        said = f"the {settled.kind} adapter {saved.path} goes on"
    made = Adapter(model, *base, peft, settled, saved is None)
    learns = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    line = f"{said}: {learns:,} parameters learn over the frozen {base[0]}"
    return adapted, made, [line]


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Says in front of an error where the fault lies."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
