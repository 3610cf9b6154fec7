"""What a policy is worth on held-out prompts: gold reward, win rate against a reference, drift, length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.evaluation.answering import answered
from trimtab.evaluation.stats.intervals import WinRate, mean_interval, paired_win_rate
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.objectives.kl import kl_estimate
from trimtab.rewards.base import Mixture
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.spread.deal import Part, numbers


@dataclass
class Evaluation:
    """Sampled and scored responses of one policy, prompt by prompt."""

    groups: list[Group]
    kl_nats_per_token: float | None = None
    """k3 estimate against the reference over the sampled tokens; never negative."""

    @property
    def by_place(self) -> dict[tuple[str, int], float]:
        """Gold reward by (prompt, sample), in order. An answer that the reward could not score is not in it.

        Prompts are counted apart even where two sources gave them one id.
        """
        return {
            (f"{p}:{group.id}", k): float(response.reward)
            for p, group in enumerate(self.groups)
            for k, response in enumerate(group.responses)
            if response.reward is not None
        }

    @property
    def scores(self) -> list[float]:
        """The gold reward of every response that has one, in order."""
        return list(self.by_place.values())

    @property
    def clusters(self) -> list[str]:
        """Which prompt each score belongs to."""
        return [prompt for prompt, _ in self.by_place]

    @property
    def unscored(self) -> int:
        """Answers without a gold reward (the judge abstained, ``on_error`` is "skip")."""
        return sum(r.reward is None for g in self.groups for r in g.responses)

    @property
    def response_tokens(self) -> float:
        """Mean length of a response, in tokens."""
        lengths = [len(r.tokens or ()) for g in self.groups for r in g.responses]
        return sum(lengths) / len(lengths)


def evaluate_policy(
    lm: LanguageModel,
    sampler: Sampler,
    mixture: Mixture | None,
    prompts: list[Group],
    config: SamplingConfig,
    *,
    samples: int,
    seed: int,
    end_tokens: list[int],
    reference: LanguageModel | None = None,
    max_tokens: int = 16384,
) -> Evaluation:
    """Sample ``samples`` responses a prompt and score them, if there is a reward (None: they stay unscored).

    The noise is the same for every policy.
    """
    groups = answered(
        lm, sampler, prompts, samples, config, seed=seed, end_tokens=end_tokens, mixture=mixture
    )
    result = Evaluation(groups)
    if reference is not None:
        result.kl_nats_per_token = _drift(lm, reference, groups, config, max_tokens)
    return result


def _drift(
    lm: LanguageModel, reference: LanguageModel, groups: list[Group], config: SamplingConfig, max_tokens: int
) -> float:
    temperature = config.temperature or 1.0

    def estimates(part: Part) -> list[list[float]]:
        policy_NT, _ = lm.token_logprobs(part.batch, temperature=temperature)
        other = collate(part.groups, layout=reference.layout, device=reference.device)
        ref_NT, _ = reference.token_logprobs(other, temperature=temperature)
        return part.batch.ragged(kl_estimate(policy_NT.double(), ref_NT.to(lm.device).double(), "k3"))

    found = numbers(lm, groups, max_tokens, estimates, divisible=True, beside=reference)
    return sum(map(sum, found)) / max(sum(map(len, found)), 1)


def comparison_row(ours: Evaluation, reference: Evaluation | None, *, seed: int = 0) -> dict[str, Any]:
    """The evaluated part of a row of ``summary.json``; no win rate for the reference itself."""
    if not ours.by_place:
        raise InputError(f"none of {ours.unscored} answers could be scored, so nothing can be compared")
    mean, low, high = mean_interval(ours.scores, ours.clusters)
    row: dict[str, Any] = {
        "gold_reward": mean,
        "gold_reward_ci95": [low, high],
        "win_rate": None,
        "win_rate_ci95": None,
        "kl_nats_per_token": 0.0 if reference is None else ours.kl_nats_per_token,
        "response_tokens": ours.response_tokens,
    }
    if ours.unscored:
        row["unscored"] = ours.unscored
    if reference is not None:
        rate = win_rate_against(ours, reference, seed=seed)
        row |= {"win_rate": rate.rate, "win_rate_ci95": list(rate.ci95)}
    return row


def win_rate_against(ours: Evaluation, theirs: Evaluation, *, seed: int = 0) -> WinRate:
    """Answer by answer, on the places that both have a score for."""
    a, b = ours.by_place, theirs.by_place
    places = [place for place in a if place in b]
    return paired_win_rate(
        [a[place] for place in places],
        [b[place] for place in places],
        clusters=[prompt for prompt, _ in places],
        seed=seed,
    )
