"""What methods on labelled responses share: KTO's options, its baseline, the loss of a micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.data.collate import group_tokens
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.offline import accumulate_items
from trimtab.methods.shared.pairs import BetaOptions
from trimtab.methods.shared.setup import attach
from trimtab.models.language_model import LanguageModel
from trimtab.objectives.reduce import response_sums
from trimtab.objectives.unpaired import kto_loss, mismatched_kl
from trimtab.training.optimiser import Optimiser

ADVISED = (1.0, 4 / 3)
"""Where the paper wants λ_D·n_D / (λ_U·n_U), n the responses of a kind as they are drawn."""


class LabelOptions(BetaOptions):
    """All that KTO's loss can be told."""

    desirable_weight: float = Field(1.0, gt=0, description="λ_D, weight of good responses")
    undesirable_weight: float = Field(1.0, gt=0, description="λ_U, weight of bad responses")
    balance: bool = Field(
        False, description="raise the rarer class's weight until both weigh the same in total"
    )
    kl: Literal["batch", "none"] = Field(
        "batch",
        description="the baseline: estimated on each batch's mismatched responses, or none (APO-zero)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> LabelOptions:
        if self.balance and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                "balance sets desirable_weight and undesirable_weight itself: remove them, or set it to false"
            )
        return self


@dataclass(frozen=True, slots=True)
class Weighed:
    """How many labelled responses of each kind the data hold, and what each kind weighs."""

    desirable: int
    undesirable: int
    desirable_weight: float
    undesirable_weight: float
    odds: float
    """Good to bad among what is drawn: n_D / n_U, with the weights of sources and of rows."""

    def __str__(self) -> str:
        ratio = self.desirable_weight * self.odds / self.undesirable_weight
        weights = f"{self.desirable_weight:.4g} and {self.undesirable_weight:.4g}"
        line = (
            f"labels: {self.desirable:,} good and {self.undesirable:,} bad, weights {weights}: in total "
            f"{ratio:.3g} to 1"
        )
        if ADVISED[0] - 1e-9 <= ratio <= ADVISED[1] + 1e-9:
            return line
        return f"{line}; the paper advises 1 to 1.33: set desirable_weight, undesirable_weight or balance"


def weigh(
    options: LabelOptions, groups: Sequence[Group], shares: Mapping[str, float] | None = None
) -> Weighed:
    """Count the labels. Raises InputError where all are of one kind: nothing would be told apart.

    ``shares``: how often each group is drawn, by id (:meth:`Stream.shares`); left out, all alike. A small
    source comes up as often as a large one, so that the numbers of rows do not say what is learned from.
    """
    good = sum(bool(group.responses[0].label) for group in groups)
    bad = len(groups) - good
    if not (good and bad):
        raise InputError(
            f"all {len(groups)} labels are {'bad' if bad else 'good'}: KTO learns from good and bad "
            "responses; add the other kind, or train on the good ones with sft"
        )
    drawn = {True: 0.0, False: 0.0}
    for group in groups:
        share = 1.0 if shares is None else shares[group.id]
        drawn[bool(group.responses[0].label)] += group.weight * share
    for kind, name in ((True, "good"), (False, "bad")):
        if not drawn[kind]:
            raise InputError(
                f"all {name} responses have a group_weight of 0: KTO learns from good and bad ones"
            )
    odds = drawn[True] / drawn[False]
    if not options.balance:
        return Weighed(good, bad, options.desirable_weight, options.undesirable_weight, odds)
    return Weighed(good, bad, max(1.0, 1 / odds), max(1.0, odds), odds)


def mismatched(groups: Sequence[Group], longest: int, *, spare: Sequence[Group] = ()) -> list[Group]:
    """Each group's prompt with the next group's response, the last one's with the first; without labels.

    A response that would not fit into ``longest`` tokens is cut. A single group takes the prompt of one of
    ``spare``: with its own it would be no mismatch.
    """
    prompts = list(groups) if len(groups) > 1 else list(spare[:1])
    if not prompts:
        raise InputError(
            "a batch of one labelled response has no mismatched one for KTO's baseline; raise "
            'train.batch_groups, or set kl = "none"'
        )
    out = []
    for i, group in enumerate(prompts):
        response = groups[(i + 1) % len(groups)].responses[0]
        room = longest - len(group.prompt_tokens or ())
        cut = dataclasses.replace(
            response,
            tokens=(response.tokens or [])[:room],
            mask=None if response.mask is None else response.mask[:room],
            ref_logps=None,
        )
        out.append(dataclasses.replace(group, responses=[cut]))
    return out


def baseline(
    lm: LanguageModel, reference: LanguageModel, groups: list[Group], max_tokens: int
) -> torch.Tensor:
    """z_ref of these mismatched groups, from a pass of each model without gradient."""
    # One mismatched group may be larger than any that is learned from; it keeps no activations.
    room = max([max_tokens, *(group_tokens(group, lm.layout) for group in groups)])
    sums = []
    for model in (lm, reference):

        def logps(batch: TreeBatch, model: LanguageModel = model) -> torch.Tensor:
            return model.token_logprobs(batch)[0]

        attach(model, groups, "old_logps", logps, max_tokens=room, divisible=False)
        sums.append(torch.tensor([sum(g.responses[0].old_logps or []) for g in groups], dtype=torch.float64))
    return mismatched_kl(*sums)


def learn_labels(
    lm: LanguageModel,
    optimiser: Optimiser,
    groups: list[Group],
    weighed: Weighed,
    max_tokens: int,
    *,
    beta: float,
    z_ref: torch.Tensor,
    weight: float = 1.0,
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and what is shown of the batch."""

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_P, shown = label_losses(lm, part, batch, weighed, beta=beta, z_ref=z_ref)
        return weight * loss_P, batch.weights_N, shown

    loss, seen = accumulate_items(lm, optimiser, groups, losses, max_tokens)
    good = sum(bool(group.responses[0].label) for group in groups) / len(groups)
    # Means over the responses of the kind; a batch may hold one kind alone.
    for key, share in (("chosen_reward", good), ("rejected_reward", 1 - good)):
        if share > 0:
            seen[key] /= share
        else:
            del seen[key]
    if 0 < good < 1:
        seen["reward_margin"] = seen["chosen_reward"] - seen["rejected_reward"]
    return loss, seen | {"kl": float(z_ref)}


def label_losses(
    lm: LanguageModel,
    groups: list[Group],
    batch: TreeBatch,
    weighed: Weighed,
    *,
    beta: float,
    z_ref: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` of groups of one labelled response, and their metrics ``[P]``.

    ``chosen_reward`` is 0 for a bad response and ``rejected_reward`` for a good one.
    """
    policy_logps_NT, _ = lm.token_logprobs(batch)
    policy_P = response_sums(policy_logps_NT, batch.mask_NT)
    ref_logps_NT = batch.padded([group.responses[0].ref_logps or [] for group in groups])
    ref_P = response_sums(ref_logps_NT.to(policy_P.dtype), batch.mask_NT)
    good_P = torch.tensor([bool(group.responses[0].label) for group in groups], device=policy_P.device)
    loss_P, reward_P = kto_loss(
        policy_P,
        ref_P,
        good_P,
        z_ref,
        beta=beta,
        desirable_weight=weighed.desirable_weight,
        undesirable_weight=weighed.undesirable_weight,
    )
    ahead_P = reward_P - beta * z_ref.to(reward_P)
    right_P = ((ahead_P > 0) == good_P).float()
    return loss_P, {
        "accuracy": torch.where(ahead_P == 0, 0.5, right_P),
        "chosen_reward": reward_P * good_P,
        "rejected_reward": reward_P * ~good_P,
        "response_tokens": batch.mask_NT.sum(-1).to(reward_P),
    }
