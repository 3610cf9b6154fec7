"""The critic: what it starts from, what it says of a rollout, what it learns, and what is left of it.

share = "none"     a model of its own: trunk and head; with [adapter] an adapter and a head on the policy's
                   base. It has an optimiser of its own
share = "trunk"    a value head on the policy's trunk: one forward pass, one optimiser
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.online import attach_logps, stored
from trimtab.methods.shared.setup import attach
from trimtab.models.adapters import options_of
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_scalar_model, load_tokenizer, resolve
from trimtab.models.roles import options_without_head, same_base, scalar_on
from trimtab.models.scalar_model import ScalarModel
from trimtab.models.value_head import ValueHead, logprobs_and_values, value_head_of
from trimtab.objectives.value import clipped_value_loss
from trimtab.parallel.world import world
from trimtab.spread.deal import parts, put_together
from trimtab.training.export import save_model
from trimtab.training.state import State

Critic = ScalarModel | ValueHead
"""A model of its own, or a head on the policy's trunk."""
OF_TRUNK = ("coefficient", "detach")
"""Options that only a shared trunk has a use for."""


class CriticConfig(Section):
    """The critic: a trunk and a value head of its own; with adapters, an adapter and a head."""

    share: Literal["none", "trunk"] = Field(
        "none", description="trunk: a value head on the policy's own trunk, one forward pass for both"
    )
    path: str = Field("", description="folder or hub name it starts from (a reward model); empty: the policy")
    lr: float = Field(
        0.0, ge=0, description="peak learning rate, of the head alone with share = trunk; 0 takes train.lr"
    )
    warmup_rollouts: int = Field(0, ge=0, description="first rollouts on which only the critic learns")
    coefficient: float = Field(
        0.1, gt=0, description="weight of the critic's loss beside the policy's, with share = trunk"
    )
    detach: bool = Field(
        False, description="with share = trunk: the critic's loss moves the head and not the trunk"
    )
    save: bool = Field(True, description="leave the critic in critic/ beside model/, for trimtab diagnose")

    @model_validator(mode="after")
    def _consistent(self) -> CriticConfig:
        if self.share == "trunk" and self.path:
            raise ValueError('path has no effect with share = "trunk": the head is on the policy\'s trunk')
        for name in OF_TRUNK if self.share == "none" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f'{name} has no effect with share = "none": a critic of its own has its own optimiser; '
                    "its rate is critic.lr"
                )
        return self


def load_critic(config: CriticConfig, policy: ModelConfig, lm: LanguageModel, *, seed: int = 0) -> Critic:
    """The critic; from the policy it starts with a head of zeros, from a reward model with that model's.

    Where the policy learns by an adapter the critic does: on the policy's base, unless ``path`` names a model
    on another. Raises InputError for what cannot be loaded, another tokenizer than the policy's, or several
    outputs.
    """
    if config.share == "trunk":
        return value_head_of(lm)
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
        return load_scalar_model(named, new_head="zeros", holder=lm.holder)
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
    return load_scalar_model(named, options, new_head="zeros", dtype=lm.dtype, seed=seed, holder=lm.holder)


def attach_old(
    lm: LanguageModel, critic: Critic, groups: list[Group], *, temperature: float, max_tokens: int
) -> None:
    """Store ``old_logps`` and ``old_values``, of one forward pass where the trunk is shared."""
    if isinstance(critic, ScalarModel):
        attach_logps(lm, groups, "old_logps", temperature=temperature, max_tokens=max_tokens)
        attach(critic, groups, "old_values", critic.values, max_tokens=max_tokens, divisible=True)
        return
    done = []
    for part in parts(lm, groups, max_tokens, divisible=True):
        batch = part.batch
        with torch.no_grad():
            logps_NT, _, values_NT = logprobs_and_values(
                lm, critic, batch, temperature=batch.temperature(temperature)
            )
        done.append(part)
        responses = [r for group in part.groups for r in group.responses]
        for response, logps, values in zip(
            responses, batch.ragged(logps_NT), batch.ragged(values_NT), strict=True
        ):
            response.old_logps, response.old_values = logps, values
    put_together(done, groups, "old_logps", "old_values")


def value_losses(
    values_NT: torch.Tensor, groups: list[Group], batch: TreeBatch, *, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The critic's unreduced loss ``[N, T]`` and what is shown of it; ``clip`` 0 does not clip."""
    old_values_NT = stored(batch, groups, "old_values", values_NT)
    returns_NT = stored(batch, groups, "returns", values_NT)
    loss_NT, clipped_NT = clipped_value_loss(values_NT, old_values_NT, returns_NT, clip=clip or float("inf"))
    return loss_NT, {"value_mean": values_NT.detach(), "value_clip_fraction": clipped_NT.float()}


def save_critic(critic: Critic, state: State, folder: Path, dtype: str) -> None:
    """What a run leaves of its critic: a model that transformers or PEFT loads, or the head's small file."""
    if isinstance(critic, ScalarModel):
        save_model(critic, state.others["critic"], folder, dtype)
    elif world().first:
        critic.save(folder)
