"""Roles beside the policy: a reference, a snapshot, a critic or a reward model on the policy's base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from trimtab.errors import InputError
from trimtab.models.adapter_files import HEAD, SavedAdapter
from trimtab.models.adapters import PREFIX, Adapter, AdapterConfig, adapt, fresh, options_of, shared_copy
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import padding_apart
from trimtab.models.scalar_model import ScalarModel, score_head
from trimtab.models.shards import reshard
from trimtab.models.tree_model import TreeModel, trunk_name

Role = TypeVar("Role", bound=TreeModel)


def frozen_copy(lm: LanguageModel) -> LanguageModel:
    """A model of its own that does not learn: the reference. A frozen base stays shared.

    Of a model whose weights are spread over processes it is spread too.
    """
    return _spread_as(lm, _frozen(lm, shared_copy(lm.model if lm.skeleton is None else lm.skeleton)))


def whole_copy(lm: LanguageModel) -> LanguageModel:
    """The same, but whole in this process whatever ``lm`` is: to be sampled from beside the training."""
    return frozen_copy(lm) if lm.holder is None else _frozen(lm, lm.holder.whole_copy(lm))


def reference_of(lm: LanguageModel, *, own: bool = False) -> LanguageModel:
    """The model that the run starts from, frozen: call it before the first step.

    Over a new adapter that is the base alone; over one that goes on, the base with a copy of that. ``own``:
    it will be refreshed from the policy, so that it needs an adapter in any case.
    """
    if lm.adapter is None or not lm.adapter.fresh or own:
        return frozen_copy(lm)
    model = shared_copy(lm.adapter.base)
    return _spread_as(lm, _frozen(lm, model))


def _spread_as(lm: TreeModel, twin: Role) -> Role:
    """The twin, spread over processes where ``lm`` is."""
    if lm.holder is not None:
        lm.holder.spread(twin)
        lm.holder.begin(twin)
    return twin


def _frozen(lm: LanguageModel, model: Any) -> LanguageModel:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    twin = LanguageModel(model, lm.tokenizer, lm.layout)
    twin.chunked_head = lm.chunked_head
    twin.requested_dtype = lm.requested_dtype
    twin.adapter = lm.adapter
    # Chosen after loading, when a skeleton and a base were made already.
    twin.config._attn_implementation = lm.config._attn_implementation
    return twin


def scalar_on(lm: TreeModel, saved: SavedAdapter | None = None, *, seed: int = 0) -> ScalarModel:
    """A critic or a reward model on the very base that ``lm`` and its adapter stand on.

    With the adapter and the head of ``saved``; else with a new adapter, of the options of ``lm``'s, and a
    head of zeros. Raises InputError for an architecture without a linear sequence classification head, and
    for an adapter that does not fit.
    """
    assert lm.adapter is not None
    if lm.spread and lm.adapter.config.kind == "dora":
        raise InputError(
            'adapter.kind = "dora": a second role\'s magnitudes are taken from whole weights; set '
            'parallel.weights = "replicate"'
        )
    tensors = None if saved is None else dict(saved.tensors)
    outputs = saved.outputs if saved is not None and saved.scores else 1
    shell = _with_score(lm.adapter.base, outputs)
    shell.config.pad_token_id = padding_apart(lm.tokenizer)
    if tensors is not None and not any(name.startswith(HEAD) for name in tensors):
        tensors |= {PREFIX + n: p.detach() for n, p in shell.named_parameters() if n.startswith("score.")}
    options = options_without_head(lm.adapter) if saved is None else options_of(saved.peft)
    peft = fresh(options, scores=True) if saved is None else saved.peft
    model = adapt(shell, peft, tensors, seed=seed)
    twin = ScalarModel(model, lm.tokenizer)
    twin.requested_dtype = lm.requested_dtype
    known = lm.adapter
    twin.adapter = Adapter(shell, known.name, known.revision, peft, options, saved is None)
    return _spread_as(lm, twin)


def options_without_head(adapter: Adapter) -> AdapterConfig:
    """The options for a tree that has no language model's head to adapt."""
    if isinstance(adapter.peft.target_modules, str):
        return adapter.config.model_copy(update={"targets": []})
    base: Any = adapter.base
    head = base.get_output_embeddings()
    name = next((name for name, module in base.named_modules() if module is head), None)
    targets = [target for target in adapter.config.targets if target != name]
    return adapter.config.model_copy(update={"targets": targets})


def _with_score(base: nn.Module, outputs: int) -> Any:
    """The architecture's sequence classification model, around the base's own trunk, its head zeros."""
    trunk: Any = shared_copy(getattr(base, trunk_name(base)))
    trunk.config.num_labels = outputs
    try:
        with torch.device("meta"):
            shell: Any = AutoModelForSequenceClassification.from_config(trunk.config)
        name = trunk_name(shell)
    except (ValueError, InputError):
        shell = None
    if shell is None or type(getattr(shell, name)) is not type(trunk):
        raise InputError(
            f"{type(base).__name__} has no sequence classification model over the same trunk, so that a "
            "critic or a reward model cannot share its base"
        )
    head = score_head(shell)
    first = next(trunk.parameters())
    # It learns: in fp32 over a base that computes in less, in fp64 where that does.
    wide = {"device": first.device, "dtype": torch.promote_types(first.dtype, torch.float32)}
    shell.score = nn.Linear(head.in_features, outputs, bias=head.bias is not None, **wide)
    for parameter in shell.score.parameters():
        nn.init.zeros_(parameter)
    setattr(shell, name, trunk)
    # The layers read the attention function from this very object.
    shell.config = trunk.config
    return shell.eval()


def same_base(adapter: Adapter, name: str, revision: str) -> bool:
    """The folder or hub name, at that revision, is the base that the adapter stands on."""
    if Path(name).is_dir() or Path(adapter.name).is_dir():
        return Path(name).resolve() == Path(adapter.name).resolve()
    return (name, revision) == (adapter.name, adapter.revision)


def bases(roles: Mapping[str, TreeModel]) -> tuple[int, str | None]:
    """How many bases these roles keep in memory, and a line on who shares one; None where nobody does."""
    held: dict[int, list[str]] = {}
    for role, lm in roles.items():
        reshard(lm.model)
        held.setdefault(id(next(lm.trunk.parameters())), []).append(role)
    lines = []
    for names in held.values():
        if len(names) < 2:
            continue
        trees = [{id(p): p for p in roles[name].model.parameters()} for name in names]
        common = set.intersection(*(set(tree) for tree in trees))
        base = sum(trees[0][key].numel() for key in common)
        own = sum(p.numel() for tree in trees for key, p in tree.items() if key not in common)
        who = ", ".join(names[:-1]) + f" and {names[-1]}"
        lines.append(f"{who} share one base of {_count(base)} parameters; adapters hold {_count(own)}")
    return len(held), "; ".join(lines) or None


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"
