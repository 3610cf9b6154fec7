"""Adapters (LoRA and its kin, by PEFT) on one frozen base that several roles share.

No adapter is ever switched on or off. A role (policy, reference, critic, reward model) is a tree of modules
of its own with an adapter of its own; the base's parameters, which never learn, are the same tensors in every
tree. So the reference is a model like any other, may be computed between the policy's forward and backward
passes or beside them in a thread, and costs what its adapter weighs.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.models.fused import fuse, unfuse
from trimtab.models.quantised import held
from trimtab.models.shards import put, reshard

if TYPE_CHECKING:  # peft takes a second to import, and a run without adapters needs none of it
    from peft import LoraConfig

NAME = "default"
"""PEFT's name of the one adapter in a tree."""
Kind = Literal["none", "lora", "rslora", "dora"]


class AdapterConfig(Section):
    """What learns in place of the whole model."""

    kind: Kind = Field(
        "none",
        description="adapter that learns over a frozen base: lora, rslora (scale alpha/√rank), dora; none "
        "trains every weight",
    )
    rank: int = Field(16, ge=1, description="rank of each layer's update")
    alpha: float = Field(32.0, gt=0, description="the update's scale is alpha/rank; there is no dropout")
    targets: list[str] = Field(
        [], description="names of the linear layers that get one, as in PEFT; empty: all but the head"
    )
    quantise: Literal["none", "nf4", "int8"] = Field(
        "none", description="keep the frozen base in 4 or 8 bits; needs bitsandbytes"
    )

    @model_validator(mode="after")
    def _in_use(self) -> AdapterConfig:
        if self.kind == "none":
            for name, info in type(self).model_fields.items():
                if getattr(self, name) != info.get_default(call_default_factory=True):
                    raise ValueError(f'{name} has no effect with kind = "none"')
        if self.kind == "dora" and self.quantise == "int8":
            raise ValueError(
                'kind = "dora" reads the base\'s weights, which int8 does not give back; use "nf4"'
            )
        return self


@dataclass
class Adapter:
    """What a model with an adapter knows of it."""

    base: nn.Module
    """The frozen base without adapter: a tree of its own, of the same tensors."""
    name: str
    """Folder or hub name of the base."""
    revision: str
    peft: LoraConfig
    config: AdapterConfig
    """The options as they are in effect."""
    fresh: bool
    """It started with no effect: the base alone is what the run started from."""


def shared_copy(model: nn.Module) -> Any:
    """A tree of its own: what learns is copied, frozen parameters and buffers are the same tensors."""
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    return copy.deepcopy(model, {id(shared): shared for shared in (*frozen, *held(model))})


def adapt(
    base: nn.Module, peft: LoraConfig, tensors: Mapping[str, torch.Tensor] | None = None, *, seed: int = 0
) -> Any:
    """A tree on the base (frozen from here on) with an adapter: of ``tensors``, or drawn by ``seed``.

    A linear ``score`` on top of the trunk learns too and is not shared. What learns is in fp32 (fp64 on a
    base in fp64). Raises InputError as :func:`inject` and :func:`put_weights` do.
    """
    for key, parameter in base.named_parameters():
        parameter.requires_grad_(_in_head(key))
    model = shared_copy(base)
    inject(model, peft, seed=seed)
    for key, parameter in model.named_parameters():
        if _in_head(key):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if tensors is not None:
        put_weights(model, tensors)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return model


def fresh(config: AdapterConfig, *, scores: bool) -> LoraConfig:
    """PEFT's configuration of a new adapter; ``scores``: of a reward model or a critic."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,  # type: ignore[arg-type]
        target_modules=config.targets or "all-linear",
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )


def options_of(peft: LoraConfig) -> AdapterConfig:
    """The options that a saved adapter was made with."""
    targets = peft.target_modules
    return AdapterConfig(
        kind="dora" if peft.use_dora else "rslora" if peft.use_rslora else "lora",
        rank=peft.r,
        alpha=peft.lora_alpha,
        targets=[targets] if isinstance(targets, str) else sorted(targets or ()),
    )


def continued(config: AdapterConfig, peft: LoraConfig, path: str) -> AdapterConfig:
    """The options as the saved adapter has them. Raises InputError where others were asked for."""
    saved = options_of(peft)
    for name in ("kind", "rank", "alpha", "targets"):
        asked, found = getattr(config, name), getattr(saved, name)
        same = sorted(asked) == found if name == "targets" else asked == found
        # A run's config.toml writes out every option: a default there was asked for by nobody.
        if asked != AdapterConfig.model_fields[name].get_default(call_default_factory=True) and not same:
            shown = f"{len(found)} others" if name == "targets" and len(found) > 8 else repr(found)
            raise InputError(
                f"adapter.{name} = {asked!r}, but the adapter {path} has {shown}: leave it out to go on "
                "with that adapter, or merge it with trimtab export and start a new one on the result"
            )
    return saved.model_copy(update={"quantise": config.quantise})


def inject(model: nn.Module, peft: LoraConfig, *, seed: int = 0) -> None:
    """Put a new adapter into the model, in place; everything else is frozen.

    Raises InputError where a target names no linear layer.
    """
    from peft import inject_adapter_in_model

    wanted = peft.target_modules
    unfuse(model)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # on tied heads and transposed layers, which are dealt with here
        torch.default_generator.manual_seed(seed)
        try:
            inject_adapter_in_model(peft, model, NAME)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, re.error):
            raise InputError(
                f"adapter.targets: {_shown(wanted)} names no linear layer of {type(model).__name__}; names "
                'are like "q_proj" or "lm_head", and none at all takes every layer but the head'
            ) from None
    _check_targets(model, wanted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if peft.use_dora:
        _restate_magnitudes(model)
    fuse(model)


@torch.no_grad()
def _restate_magnitudes(model: nn.Module) -> None:
    """In fp32: PEFT takes them in the base's dtype, and rounded to bf16 they would scale a merged model."""
    for _, layer in layers(model):
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling[NAME]
        )


def _check_targets(model: nn.Module, wanted: Any) -> None:
    names = [name for name, _ in layers(model)]
    for name, layer in layers(model):
        if not _is_linear(layer.get_base_layer()):
            raise InputError(
                f"adapter.targets: {name} is a {type(layer.get_base_layer()).__name__}; only linear layers "
                "can have an adapter"
            )
        if _in_head(name):
            raise InputError("adapter.targets: score learns as a whole; leave it out")
    for target in wanted if not isinstance(wanted, str) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"adapter.targets: {type(model).__name__} has no linear layer called {target!r}")


def put_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """A saved adapter's weights into the injected one. Raises InputError unless every tensor fits."""
    places = {saved_name(name): p for name, p in model.named_parameters() if is_adapter(name)}
    places |= {PREFIX + name: p for name, p in model.named_parameters() if _in_head(name)}
    if missing := sorted(places.keys() - tensors.keys()):
        raise InputError(f"the adapter has no weights for {len(missing)} of its tensors (first {missing[0]})")
    if extra := sorted(tensors.keys() - places.keys()):
        raise InputError(
            f"the adapter holds {len(extra)} tensors for which {type(model).__name__} has no place "
            f"(first {extra[0]}); was it made for another model?"
        )
    for key, parameter in places.items():
        if tensors[key].shape != parameter.shape:
            raise InputError(
                f"the adapter's {key} is {list(tensors[key].shape)}, not {list(parameter.shape)}: it was "
                "made for another base, or its rank is not that of its adapter_config.json"
            )
    reshard(model)
    for key, parameter in places.items():
        put(parameter, tensors[key])


def merge(model: Any) -> None:
    """Add the adapter to the weights and take it out, in place: a model as any other.

    An adapter on a head that is tied to the embeddings unties it, since it does not act on those.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "get_base_layer"):
        own = head.get_base_layer()
        if own.weight is model.get_input_embeddings().weight:
            own.weight = nn.Parameter(own.weight.detach().clone())
            model.config.tie_word_embeddings = False
    unfuse(model)
    for name, layer in list(layers(model)):
        layer.merge(safe_merge=True)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


PREFIX = "base_model.model."
"""Before every name that PEFT saves."""


def is_adapter(name: str) -> bool:
    """The parameter of that name is an adapter's."""
    return re.search(rf"\.lora_\w+\.{NAME}\b", name) is not None


def saved_name(name: str) -> str:
    """The name under which PEFT saves the adapter's parameter: without the adapter's own name."""
    name = re.sub(rf"(\.lora_\w+)\.{NAME}\b", r"\1", name)
    return PREFIX + (name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _in_head(name: str) -> bool:
    """The head of a sequence classification model, or a parameter of it."""
    return name == "score" or name.startswith("score.")


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else ", ".join(sorted(targets or ())) or "nothing"
