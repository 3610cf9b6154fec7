"""What methods that make their own preference pairs share: two players, couples from rewards, the step.

A couple is (better, worse), two places among a group's responses. All couples of a group are compared on one
tree: a response is computed once, in however many of them it stands.

Axis suffixes as in batch.py; ``_C`` couples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch

from trimtab.batch import TreeBatch
from trimtab.groups import Group, Response, stable_hash
from trimtab.methods.shared.online import stored
from trimtab.methods.shared.setup import tokens_of
from trimtab.models.language_model import LanguageModel
from trimtab.objectives.reduce import reduce_items, response_sums
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.spread.deal import Sums, parts
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.state import State
from trimtab.training.update import update

Couple = tuple[int, int]
"""Better, worse: places among a group's responses."""
Opponents = Literal["self", "reference", "both"]
Pairing = Literal["best_worst", "all"]
CoupleLoss = Callable[..., torch.Tensor]
"""``loss(better_C, worse_C, beta=…)`` on log π − log π_ref of whole responses: objectives/preference.py."""


class TwoPlayers:
    """A sampler whose groups hold the policy's responses, then ``challengers`` of the reference's."""

    def __init__(self, sampler: Sampler, reference: LanguageModel, challengers: int) -> None:
        self.sampler, self.reference, self.challengers = sampler, reference, challengers

    def sample(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        *,
        seed: int,
        step: int = 0,
        end_tokens: list[int],
        on_group: Callable[[int, Group], None] | None = None,
        limits: list[int] | None = None,
    ) -> list[Group]:
        """See :class:`trimtab.rollouts.sampling.Sampler`; n counts both players' responses."""
        own = n - self.challengers
        joined = self.sampler.sample(
            lm, groups, own, config, seed=seed, step=step, end_tokens=end_tokens, limits=limits
        )

        def join(index: int, theirs: Group) -> None:
            joined[index].responses += theirs.responses
            if on_group is not None:
                on_group(index, joined[index])

        self.sampler.sample(
            self.reference,
            groups,
            self.challengers,
            config,
            # With the policy's noise it would say what the policy says, as long as they are alike.
            seed=stable_hash("reference", seed),
            step=step,
            end_tokens=end_tokens,
            on_group=join,
            limits=limits,
        )
        return joined


def meetings(samples: int, challengers: int, opponents: Opponents) -> list[Couple]:
    """Which of a group's responses meet, ``i < j``; the last ``challengers`` are the reference's."""
    own = samples - challengers
    every = list(combinations(range(samples), 2))
    return [(i, j) for i, j in every if i < own <= j] if opponents == "reference" else every


def couples_of(group: Group, meets: Sequence[Couple], pairing: Pairing) -> list[Couple]:
    """The couples that a group's rewards give, best_worst: the one of the widest gap, the first of equals.

    Equal rewards give none, and neither do equal tokens, which teach nothing whichever is preferred.
    """
    rewards = [float(r.reward or 0.0) for r in group.responses]
    found = []
    for i, j in meets:
        if rewards[i] != rewards[j] and group.responses[i].tokens != group.responses[j].tokens:
            found.append((i, j) if rewards[i] > rewards[j] else (j, i))
    if pairing == "best_worst" and found:
        return [max(found, key=lambda couple: rewards[couple[0]] - rewards[couple[1]])]
    return found


def compared(group: Group, couples: Sequence[Couple]) -> tuple[Group, list[Couple]]:
    """The group with those responses alone that stand in a couple (the very objects), and its couples."""
    places = sorted({place for couple in couples for place in couple})
    moved = [(places.index(better), places.index(worse)) for better, worse in couples]
    return dataclasses.replace(group, responses=[group.responses[place] for place in places]), moved


def own_responses(groups: Sequence[Group], challengers: int) -> tuple[list[Group], list[Response]]:
    """The groups with the policy's responses alone, and all responses of the reference's."""
    if not challengers:
        return list(groups), []
    own = [dataclasses.replace(group, responses=group.responses[:-challengers]) for group in groups]
    return own, [response for group in groups for response in group.responses[-challengers:]]


def win_rate(groups: Sequence[Group], challengers: int) -> float:
    """Share of the meetings of policy and reference that the policy wins, a tie counted one half."""
    points = []
    for group in groups:
        for i, j in meetings(len(group.responses), challengers, "reference"):
            ours, theirs = group.responses[i].reward or 0.0, group.responses[j].reward or 0.0
            points.append(0.5 if ours == theirs else float(ours > theirs))
    return sum(points) / len(points)


def learn_couples(
    lm: LanguageModel,
    run: Run,
    state: State,
    groups: list[Group],
    couples: Callable[[Group], Sequence[Couple]],
    loss: CoupleLoss,
    beta: float,
    lr: float,
) -> dict[str, float]:
    """One optimiser step on the couples of these groups, which have ``ref_logps``; its metrics."""

    def gradient(tokens: int) -> tuple[float, dict[str, float]]:
        return accumulate_couples(lm, state.optimiser, groups, couples, loss, beta, tokens)

    done = update(run, state, groups, gradient, lr)
    lm.version += 1
    state.step += 1
    state.tokens += tokens_of(groups) if done.done else 0
    return {**done.metrics(), "lr": lr}


def accumulate_couples(
    lm: LanguageModel,
    optimiser: Optimiser,
    groups: list[Group],
    couples: Callable[[Group], Sequence[Couple]],
    loss: CoupleLoss,
    beta: float,
    max_tokens: int,
) -> tuple[float, dict[str, float]]:
    """Add up a step's gradient; the mean loss over couples, and the means of what is shown of them."""
    count = sum(len(couples(group)) for group in groups)
    sums = Sums()
    for part in parts(lm, groups, max_tokens):
        better_C, worse_C = _rows(part.groups, couples, lm.device)
        loss_C, shown = couple_losses(lm, part.groups, part.batch, better_C, worse_C, loss, beta)
        share = reduce_items(loss_C, count, weights_P=part.batch.weights_N[better_C])
        sums.backward(optimiser, share, part, {key: float(value.sum()) for key, value in shown.items()})
    return sums.total(count)


def couple_losses(
    lm: LanguageModel,
    part: list[Group],
    batch: TreeBatch,
    better_C: torch.Tensor,
    worse_C: torch.Tensor,
    loss: CoupleLoss,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[C]`` and the couples' metrics ``[C]``; ``better_C`` and ``worse_C`` are rows of the batch."""
    policy_logps_NT, _ = lm.token_logprobs(batch)
    ref_logps_NT = stored(batch, part, "ref_logps", policy_logps_NT)
    ratio_N = response_sums(policy_logps_NT - ref_logps_NT, batch.mask_NT)
    loss_C = loss(ratio_N[better_C], ratio_N[worse_C], beta=beta)
    chosen_C, rejected_C = ((beta * ratio_N[row_C]).detach() for row_C in (better_C, worse_C))
    # Equal rewards (before the first update) are a coin's toss: they count one half.
    accuracy_C = (chosen_C > rejected_C).float() + 0.5 * (chosen_C == rejected_C).float()
    lengths_N = batch.mask_NT.sum(-1).float()
    return loss_C, {
        "accuracy": accuracy_C,
        "chosen_reward": chosen_C,
        "rejected_reward": rejected_C,
        "reward_margin": chosen_C - rejected_C,
        "chosen_tokens": lengths_N[better_C],
        "rejected_tokens": lengths_N[worse_C],
    }


def _rows(
    part: Sequence[Group], couples: Callable[[Group], Sequence[Couple]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a batch are compared: better ``[C]`` and worse ``[C]``."""
    rows, first = [], 0
    for group in part:
        rows += [(first + better, first + worse) for better, worse in couples(group)]
        first += len(group.responses)
    better_C, worse_C = torch.tensor(rows, device=device).T
    return better_C, worse_C
