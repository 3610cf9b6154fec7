"""From the rewards of a rollout's groups to what multiplies each token's policy gradient."""

from __future__ import annotations

import torch

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.objectives.advantages import group_advantages, overlong_punishment, process_advantages
from trimtab.objectives.judgements import bradley_terry_shares, dcg_gains, listwise_gains
from trimtab.rewards.base import Mixture
from trimtab.rewards.step_rewards import StepScorer


def check_rewards(mixture: Mixture, config: RelativeConfig) -> None:
    """Raises InputError where steps are to be learned from and a term of the reward judges none."""
    if config.options.supervision != "process":
        return
    process = f'{config.section}.supervision = "process"'
    others = [term for term in mixture.terms if not isinstance(term.function, StepScorer)]
    if len(others) == len(mixture.terms):
        raise InputError(
            f'{process} needs a reward for steps: add a term called "steps" or "process_reward_model" to '
            "reward.terms"
        )
    for term in others:
        if any(term.weights.values()):
            raise InputError(
                f"{process} learns from the rewards of steps alone, and the reward {term.name!r} judges "
                "none: give it weight = 0, which records it, or leave it out"
            )


def fill_advantages(groups: list[Group], config: RelativeConfig) -> None:
    """Fill ``advantage`` of every response, or under process supervision ``token_advantages``.

    With the KL in the reward ``old_logps`` and ``ref_logps`` have to be there. Raises InputError for a
    response without step rewards where steps are rewarded.
    """
    options = config.options
    if options.supervision == "process":
        for group in groups:
            _fill_process(group, options)
        return
    values_PG = _values(shaped_rewards(groups, config), options)
    advantages_PG = group_advantages(values_PG, baseline=options.baseline, scale=options.scale)
    for group, row in zip(groups, advantages_PG.tolist(), strict=True):
        for response, advantage in zip(group.responses, row, strict=True):
            response.advantage = advantage


def shaped_rewards(groups: list[Group], config: RelativeConfig) -> torch.Tensor:
    """The rewards less the punishment of length and less β·KL where it is in the reward: fp64 ``[P, G]``."""
    options = config.options
    rewards_PG = torch.tensor([[r.reward for r in g.responses] for g in groups], dtype=torch.float64)
    if config.overlong_buffer:
        rewards_PG = rewards_PG + punishments(groups, config)
    if options.beta and options.kl_in == "reward":
        # k1 of a response is the sum of its tokens'.
        kl_PG = torch.tensor([[_sum_of_gaps(r) for r in g.responses] for g in groups], dtype=torch.float64)
        rewards_PG = rewards_PG - options.beta * kl_PG
    return rewards_PG


def punishments(groups: list[Group], config: RelativeConfig) -> torch.Tensor:
    """What each response's length takes from its reward, 0 or less, ``[P, G]``."""
    lengths_PG = torch.tensor([[len(r.tokens or ()) for r in g.responses] for g in groups]).double()
    limit = config.sampling.max_new_tokens
    return config.options.overlong_penalty * overlong_punishment(lengths_PG, limit, config.overlong_buffer)


def has_contrast(group: Group, options: RelativeOptions) -> bool:
    """The group's rewards, or under process supervision its steps', are not all equal."""
    if options.supervision == "process":
        rewards = {reward for response in group.responses for reward in response.step_rewards or ()}
        return len(rewards) > 1
    return len({response.reward for response in group.responses}) > 1


def _values(rewards_PG: torch.Tensor, options: RelativeOptions) -> torch.Tensor:
    if options.advantage_from == "winner":
        return listwise_gains(rewards_PG, [1.0, 0.0])
    if options.advantage_from == "gains":
        return listwise_gains(rewards_PG, options.gains)
    if options.advantage_from == "dcg":
        return listwise_gains(rewards_PG, dcg_gains(rewards_PG.shape[-1]))
    if options.advantage_from == "bradley_terry":
        return bradley_terry_shares(rewards_PG, options.label_temperature)
    return rewards_PG


def _sum_of_gaps(response: Response) -> float:
    old, ref = response.old_logps, response.ref_logps
    assert old is not None
    assert ref is not None
    return sum(o - r for o, r in zip(old, ref, strict=True))


def _fill_process(group: Group, options: RelativeOptions) -> None:
    responses = group.responses
    for response in responses:
        rewards, ends = response.step_rewards, response.step_ends
        if not rewards or not ends:
            raise InputError(
                f'{group.id}: a response has no step rewards, which supervision = "process" learns from'
            )
        if len(rewards) != len(ends) or not 0 <= min(ends) <= max(ends) < len(response.tokens or ()):
            raise InputError(
                f"{group.id}: a response of {len(response.tokens or ())} tokens has {len(rewards)} step "
                f"rewards for steps that end at tokens {ends[:5]}: give one reward a step of the response"
            )
    most = max(len(r.step_rewards or ()) for r in responses)
    table_GK = torch.zeros(len(responses), most, dtype=torch.float64)
    ends_GK, steps_GK = table_GK.long(), table_GK.bool()
    for g, response in enumerate(responses):
        count = len(response.step_rewards or ())
        table_GK[g, :count] = torch.tensor(response.step_rewards, dtype=torch.float64)
        ends_GK[g, :count] = torch.tensor(response.step_ends)
        steps_GK[g, :count] = True
    length = max(len(r.tokens or ()) for r in responses)
    advantages_GT = process_advantages(table_GK, ends_GK, steps_GK, length, scale=options.scale)
    for response, row in zip(responses, advantages_GT.tolist(), strict=True):
        response.token_advantages = row[: len(response.tokens or ())]
