"""The critic: what it starts from, what it says of a rollout, and what it learns."""

from __future__ import annotations

import torch
from pydantic import Field

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.online import stored
from trimtab.models.adapters import options_of
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_scalar_model, load_tokenizer, resolve
from trimtab.models.roles import options_without_head, same_base, scalar_on
from trimtab.models.scalar_model import ScalarModel
from trimtab.objectives.value import clipped_value_loss


class CriticConfig(Section):
    """The critic: a trunk and a value head of its own; with adapters, an adapter and a head."""

    path: str = Field("", description="folder or hub name it starts from (a reward model); empty: the policy")
    lr: float = Field(0.0, ge=0, description="peak learning rate; 0 takes train.lr")
    warmup_rollouts: int = Field(0, ge=0, description="first rollouts on which only the critic learns")


def load_critic(
    config: CriticConfig, policy: ModelConfig, lm: LanguageModel, *, seed: int = 0
) -> ScalarModel:
    """The critic; from the policy it starts with a head of zeros, from a reward model with that model's.

    Where the policy learns by an adapter the critic does: on the policy's base, unless ``path`` names a model
    on another. Raises InputError for what cannot be loaded, another tokenizer than the policy's, or several
    outputs.
    """
    named = policy
    if config.path:
        own = {"path": config.path, "tokenizer": "", "chat_template": "", "revision": "main"}
        named = policy.model_copy(update=own)
    try:
        critic = _critic(config, named, lm, seed)
    except InputError as error:
        if not config.path:
            raise
        raise InputError(f"critic.path: {str(error).removeprefix('model.path: ')}") from None
    if critic.tokenizer.get_vocab() != lm.tokenizer.get_vocab() or critic.vocab_size != lm.vocab_size:
        raise InputError(
            f"critic.path: {named.path} has another tokenizer than the policy; a critic reads the policy's "
            "tokens: start it from the policy (empty) or from a reward model trained from it"
        )
    if critic.outputs != 1:
        raise InputError(f"critic.path: {named.path} gives {critic.outputs} scores; a critic has one value")
    return critic


def _critic(config: CriticConfig, named: ModelConfig, lm: LanguageModel, seed: int) -> ScalarModel:
    if lm.adapter is None:
        return load_scalar_model(named, new_head="zeros")
    if not config.path:
        return scalar_on(lm, seed=seed)
    saved, base = resolve(named)
    if saved is not None and same_base(lm.adapter, base.path, base.revision):
        critic = scalar_on(lm, saved)
        critic.tokenizer = load_tokenizer(base)
        return critic
    options = options_without_head(lm.adapter)
    if saved is not None:  # which goes on as it is, whatever the policy's is like
        options = options_of(saved.peft).model_copy(update={"quantise": options.quantise})
    return load_scalar_model(named, options, new_head="zeros", dtype=lm.dtype, seed=seed)


def value_losses(
    critic: ScalarModel, groups: list[Group], batch: TreeBatch, *, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The critic's unreduced loss ``[N, T]`` and what is shown of it; ``clip`` 0 does not clip."""
    values_NT = critic.values(batch)
    old_values_NT = stored(batch, groups, "old_values", values_NT)
    returns_NT = stored(batch, groups, "returns", values_NT)
    loss_NT, clipped_NT = clipped_value_loss(values_NT, old_values_NT, returns_NT, clip=clip or float("inf"))
    return loss_NT, {"value_mean": values_NT.detach(), "value_clip_fraction": clipped_NT.float()}
