"""What sampling methods share around their loops: options, log-probabilities, the step, the reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.setup import MethodConfig, attach
from trimtab.models.language_model import LanguageModel
from trimtab.models.roles import bases
from trimtab.models.shards import put, reshard
from trimtab.models.tree_model import TreeModel
from trimtab.objectives.policy import Ratio, truncated_importance_weights
from trimtab.objectives.reduce import Reduction, reduce_tokens
from trimtab.rewards.base import Mixture, RewardConfig
from trimtab.rollouts.strategies import RunSampling
from trimtab.spread.deal import Sums, global_count, parts, put_together
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.state import State


class SampleOptions(Section):
    """Options of every method that learns from its own samples."""

    rollout_groups: int = Field(
        0, ge=0, description="prompts sampled at once, a multiple of train.batch_groups; 0 takes that number"
    )
    epochs_per_rollout: int = Field(1, ge=1, description="passes over each rollout (µ)")
    overlap: bool = Field(
        False, description="sample the next rollout while this one is learned from: it is one rollout older"
    )


class RolloutOptions(SampleOptions):
    """Options of those that learn by a clipped ratio."""

    clip_low: float = Field(0.2, gt=0, le=1, description="the ratio's lower clip, 1 − this; 1 has none")
    clip_high: float = Field(0.2, gt=0, description="the ratio's upper clip, 1 + this")
    importance: Literal["auto", "always", "never"] = Field(
        "auto",
        description="weights min(old/sampler, cap): auto when sampling is truncated (top-p, …) or overlaps",
    )
    importance_cap: float = Field(2.0, gt=0, description="largest importance weight")

    @model_validator(mode="after")
    def _cap(self) -> RolloutOptions:
        if self.importance == "never" and self.importance_cap != 2.0:
            raise ValueError('importance_cap has no effect with importance = "never"')
        if self.overlap and self.importance == "never":
            raise ValueError(
                'importance = "never" with overlap = true biases every ratio, the samples being a rollout '
                'old; use "auto"'
            )
        return self


class SampledConfig(MethodConfig):
    """What the configurations of these methods share. A method adds its own section, called ``section``."""

    section: ClassVar[str]
    sampling: RunSampling = Field(default_factory=RunSampling)
    reward: RewardConfig

    @model_validator(mode="after")
    def _rollouts(self) -> SampledConfig:
        name, options = self.section, self.options
        if options.overlap and not self.reward.workers and any(t.name == "math" for t in self.reward.terms):
            raise ValueError(
                f"{name}.overlap scores in a thread, and the reward 'math' runs in a main thread only: give "
                "it a process with reward.workers = 1"
            )
        if self.rollout % self.train.batch_groups:
            raise ValueError(f"{name}.rollout_groups must be a multiple of train.batch_groups")
        return self

    @property
    def options(self) -> SampleOptions:
        """The method's own section."""
        return getattr(self, self.section)

    @property
    def rollout(self) -> int:
        """Prompts sampled at once."""
        return self.options.rollout_groups or self.train.batch_groups

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps taken on one rollout."""
        return self.options.epochs_per_rollout * self.rollout // self.train.batch_groups


class OnlineConfig(SampledConfig):
    """Of those that learn by a clipped ratio."""

    @model_validator(mode="after")
    def _sampling(self) -> OnlineConfig:
        name, options = self.section, self.options
        if self.sampling.truncated and options.importance == "never":
            raise ValueError(
                f'{name}.importance = "never" with top_k, top_p, min_p or min_new_tokens biases every ratio; '
                'use "auto"'
            )
        if options.importance_cap != 2.0 and not self.corrected:
            raise ValueError(
                f'{name}.importance_cap has no effect with importance = "auto" and untruncated sampling '
                "without overlap"
            )
        return self

    @property
    def options(self) -> RolloutOptions:
        """The method's own section."""
        return getattr(self, self.section)

    @property
    def corrected(self) -> bool:
        """What is sampled is not the policy's own distribution, or is treated so: weights are used."""
        options = self.options
        return options.importance == "always" or (
            options.importance == "auto" and (self.sampling.truncated or options.overlap)
        )

    def importance_weights(
        self,
        old_logps_NT: torch.Tensor,
        sampler_logps_NT: torch.Tensor,
        *,
        mask_NT: torch.Tensor | None = None,
        level: Ratio = "token",
    ) -> torch.Tensor | None:
        """What corrects for a sampler that is not the policy, ``[N, T]``; None where nothing is to be.

        ``level`` as the ratio's; one that is not of a token needs the mask.
        """
        if not self.corrected:
            return None
        cap = self.options.importance_cap
        return truncated_importance_weights(old_logps_NT, sampler_logps_NT, cap, mask_NT=mask_NT, level=level)


def count(state: State, name: str, more: float) -> None:
    """Add to a number that the checkpoint keeps."""
    state.controllers[name] = state.controllers.get(name, 0) + more


def attach_logps(
    lm: LanguageModel, groups: list[Group], field: str, *, temperature: float, max_tokens: int
) -> None:
    """Store each response's log-probabilities under ``lm`` in ``field``, at what it was drawn at.

    ``temperature`` is the run's own, of responses that do not say.
    """

    def logps(batch: TreeBatch) -> torch.Tensor:
        return lm.token_logprobs(batch, temperature=batch.temperature(temperature))[0]

    attach(lm, groups, field, logps, max_tokens=max_tokens, divisible=True)


def stored(batch: TreeBatch, groups: Sequence[Group], field: str, like: torch.Tensor) -> torch.Tensor:
    """The inverse: a per-token list of the groups' responses as ``[N, T]``, in the dtype of ``like``."""
    rows = [getattr(response, field) for group in groups for response in group.responses]
    if any(row is None for row in rows):
        raise ValueError(f"a response has no {field}")
    return batch.padded(rows).to(like.dtype)


def accumulate(
    lm: TreeModel,
    optimiser: Optimiser,
    groups: list[Group],
    losses: Callable[[list[Group], TreeBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    *,
    max_tokens: int,
    reduction: Reduction,
    constant: int,
    fills: Sequence[str] = (),
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step, micro-batch by micro-batch.

    ``losses`` gives a micro-batch's unreduced loss ``[N, T]`` and what is shown of it, each ``[N, T]``; the
    per-token fields of the responses that it ``fills`` reach every process. Returns the loss and the mean
    over counted tokens of what is shown.
    """
    divisor = global_count(groups, reduction, constant=constant)
    sums, done = Sums(), []
    for part in parts(lm, groups, max_tokens, divisible=True):
        loss_NT, shown = losses(part.groups, part.batch)
        mask_NT = part.batch.mask_NT
        loss = reduce_tokens(loss_NT, mask_NT, divisor, reduction, weights_N=part.batch.weights_N)
        found = {key: float(value.masked_fill(~mask_NT, 0).sum()) for key, value in shown.items()}
        sums.backward(optimiser, loss, part, found)
        if fills:
            done.append(part)
    total = sums.total(max(global_count(groups, "token_mean"), 1.0))
    if fills:
        put_together(done, groups, *fills)
    return total


def next_groups(state: State, *, batch_groups: int, rollout: int, seed: int) -> list[Group]:
    """The groups of the next optimiser step: in order in the first pass, shuffled by (seed, step) after."""
    cursor = int(state.controllers["cursor"])
    per_pass = rollout // batch_groups
    epoch, place = divmod(cursor, per_pass)
    order = list(range(len(state.pending)))
    if epoch:
        random.Random(f"{seed}/{state.position}/{epoch}").shuffle(order)
    # Skipped groups make a rollout shorter; its steps then share what is left as evenly as they can.
    first, last = (len(order) * k // per_pass for k in (place, place + 1))
    if first == last:
        raise InputError(
            f"step {state.step + 1}: {len(order)} groups are left of a rollout for its {per_pass} optimiser "
            "steps, the others being skipped by the reward or without contrast: mend the reward, take other "
            "prompts, or lower rollout_groups"
        )
    return [state.pending[i] for i in order[first:last]]


def rollout_metrics(groups: list[Group], state: State) -> dict[str, float]:
    """What every sampling method logs of the responses that a step learns from."""
    responses = [r for group in groups for r in group.responses]
    compared = [group.responses for group in groups]
    if all(len(row) == 1 for row in compared):
        # A lone answer has no spread of its own: it is held against the answers to other prompts.
        compared = [responses]
    rewards_by_group = [torch.tensor([r.reward for r in row], dtype=torch.float64) for row in compared]
    spreads = torch.stack([row.std(correction=0) for row in rewards_by_group])
    # A response that is masked as a whole was said all the same.
    lengths = [sum(r.mask or ()) or len(r.tokens or ()) for r in responses]
    terms = responses[0].reward_terms
    out = {
        "reward_mean": float(torch.cat(rewards_by_group).mean()),
        "reward_std": float(spreads.mean()),
        **{f"reward/{k}": sum(r.reward_terms[k] for r in responses) / len(responses) for k in terms},
        "groups_without_contrast": float((spreads == 0).double().mean()),
        "response_tokens": sum(lengths) / len(responses),
        "cut_off": sum(r.finish == "length" for r in responses) / len(responses),
    }
    prefix = "reward_fact/"
    return out | {k.removeprefix(prefix): v for k, v in state.controllers.items() if k.startswith(prefix)}


@torch.no_grad()
def copy_weights(to: LanguageModel, lm: LanguageModel) -> None:
    """The compute weights of ``lm`` into those of a copy of it, in place: a new version of the copy."""
    reshard(to.model)
    reshard(lm.model)
    for mine, theirs in zip(to.model.parameters(), lm.model.parameters(), strict=True):
        if mine is not theirs and theirs.requires_grad:  # a frozen base is shared, or never changes
            put(mine, theirs)
    to.version += 1


def refresh_reference(reference: LanguageModel, lm: LanguageModel, state: State) -> None:
    """The policy becomes the reference, which from now on is part of the state."""
    copy_weights(reference, lm)
    shared = {id(p) for p in lm.model.parameters()}
    state.extra |= {
        f"reference.{name}": p.data for name, p in reference.model.named_parameters() if id(p) not in shared
    }


def restore_reference(reference: LanguageModel | None, state: State) -> None:
    """Put a refreshed reference back after a resume."""
    if reference is None:
        return
    reshard(reference.model)
    for name, parameter in reference.model.named_parameters():
        if (saved := state.extra.get(f"reference.{name}")) is not None:
            put(parameter, saved)
            state.extra[f"reference.{name}"] = parameter.data


def say_bases(run: Run, roles: Mapping[str, TreeModel | None], mixture: Mixture) -> int:
    """Say which roles share a base; the number of bases (a reward model with its own is not counted)."""
    held = {role: lm for role, lm in roles.items() if lm is not None}
    for term in mixture.terms:
        scorer: Any = term.function
        if getattr(scorer, "models", 1) == 0 and getattr(scorer, "scalar", None) is not None:
            held["reward model"] = scorer.scalar
    count, line = bases(held)
    run.say(line)
    return count


def say_reward(run: Run, mixture: Mixture, lm: LanguageModel) -> None:
    """What the reward has to say first, and where its models read text otherwise than the policy."""
    for line in mixture.notes:
        run.say(line)
    for term in mixture.terms:
        differs = getattr(term.function, "differs_from", None)
        if differs is not None:
            run.say(differs(lm.tokenizer))
