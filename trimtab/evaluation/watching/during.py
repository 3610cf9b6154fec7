"""Evaluation while a method runs: what ``trimtab METHOD`` hands it as ``on_eval``."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.data.chat import end_tokens
from trimtab.evaluation.labels import label_auc
from trimtab.evaluation.policy import evaluate_policy
from trimtab.evaluation.preferences import preference_accuracy, summed_logps
from trimtab.evaluation.rankings import ranking_accuracy
from trimtab.evaluation.reward_scores import held_out_report, rating_report, step_report
from trimtab.evaluation.watching.static_prompts import StaticPrompts
from trimtab.evaluation.watching.static_suites import Suites
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.scalar_model import ScalarModel
from trimtab.rewards.base import Mixture
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.strategies import steady
from trimtab.spread.deal import global_count

SAMPLED_PROMPTS = 64
"""Prompts that are answered at each evaluation of a sampling method."""


def heldout_evaluation(config: Any) -> Evaluate:
    """The evaluation that fits a method's configuration: of its held-out rows, and what ``watch`` asks for.

    Raises InputError for a file of ``watch`` that is not there.
    """
    return Evaluate(config)


class Evaluate:
    """What a method is given as ``on_eval``; ``notes`` are lines that the run is to say."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.notes: list[str] = []
        self._mixture: Mixture | None = None
        watch = getattr(config, "watch", None)
        self._static = StaticPrompts(config, self.notes) if watch is not None and watch.answers else None
        self._suites = Suites(config, self.notes) if watch is not None and watch.safety else None

    def __call__(self, lm: Any, heldout: list[Group], step: int) -> dict[str, float]:
        """The metrics of the model after ``step`` steps."""
        found = self._held_out(lm, heldout) if heldout else {}
        if self._static is not None:
            found |= self._static.measure(lm, heldout, step)
        if self._suites is not None:
            found |= self._suites.measure(lm, step)
        return found

    def _held_out(self, lm: Any, heldout: list[Group]) -> dict[str, float]:
        """Reward, preference accuracy, or loss.

        A configuration with the section ``reward_model`` is a reward model's run, with ``process_reward`` a
        process reward model's; of rankings the pairs are measured.
        """
        config = self.config
        if hasattr(config, "reward_model"):
            return _reward_model(lm, heldout, config)
        if hasattr(config, "process_reward"):
            found = step_report(lm, heldout, config.train.micro_batch_tokens)
            return {f"eval_{name}": value for name, value in found.items()}
        if hasattr(config, "rank"):
            ordered = ranking_accuracy(lm, heldout, config.train.micro_batch_tokens)
            return {f"eval_accuracy_{name}": value for name, value in ordered.items()}
        if hasattr(config, "reward"):
            if self._static is not None:
                return {}  # they are prompts, and static prompts are measured in the same way and more
            # Once: a learned reward is a model to load.
            self._mixture = self._mixture or build_mixture(config.reward, lm)
            return _reward(lm, heldout, self._mixture, config)
        if hasattr(config, "kto") or hasattr(config, "mixed"):
            return _each_kind(lm, heldout, config.train.micro_batch_tokens)
        if all(len(group.responses) == 2 for group in heldout):
            return _preferences(lm, heldout, config.train.micro_batch_tokens)
        return {"eval_loss": heldout_loss(lm, heldout, config.train.micro_batch_tokens)}


def heldout_loss(lm: LanguageModel, groups: list[Group], max_tokens: int) -> float:
    """Mean negative log-likelihood per token, in nats."""
    return -sum(summed_logps(lm, groups, max_tokens)) / global_count(groups, "token_mean")


def _preferences(lm: LanguageModel, pairs: list[Group], max_tokens: int) -> dict[str, float]:
    ref_P2 = None
    if pairs[0].responses[0].ref_logps is not None:
        sums = [[sum(r.ref_logps or []) for r in pair.responses] for pair in pairs]
        ref_P2 = torch.tensor(sums, dtype=torch.float64)
    found = preference_accuracy(lm, pairs, ref_P2=ref_P2, max_tokens=max_tokens)
    silent = {"pairs"} if found["unscored"] else {"pairs", "unscored"}
    return {f"eval_accuracy_{k}": v for k, v in found.items() if k not in silent and not k.endswith("_ci95")}


def _each_kind(lm: LanguageModel, heldout: list[Group], max_tokens: int) -> dict[str, float]:
    """Pairs, labelled responses and demonstrations, each by its own figures."""
    pairs = [group for group in heldout if len(group.responses) == 2]
    single = [group for group in heldout if len(group.responses) == 1]
    # Without the reference, which a mixed run has only for kinds that it learns, there is nothing to rank by.
    labelled = [
        group
        for group in single
        if group.responses[0].label is not None and group.responses[0].ref_logps is not None
    ]
    shown = [group for group in single if group.responses[0].label is None]
    figures = _preferences(lm, pairs, max_tokens) if pairs else {}
    if labelled and (auc := label_auc(lm, labelled, max_tokens)) is not None:
        figures["eval_label_auc"] = auc
    return figures | ({"eval_loss": heldout_loss(lm, shown, max_tokens)} if shown else {})


def _reward_model(rm: ScalarModel, heldout: list[Group], config: Any) -> dict[str, float]:
    """Accuracy with its interval, calibration, how far the score follows length, and its scale.

    Of a regression on ratings their errors and correlations.
    """
    options = config.reward_model
    if options.loss == "regression":
        names = [rm.config.id2label[i] for i in range(rm.outputs)]
        scale = (options.rating_origin, options.rating_unit)
        ratings = rating_report(rm, heldout, names, *scale, config.train.micro_batch_tokens)
        return {f"eval_{name}": value for name, value in ratings.items()}
    found = held_out_report(rm, heldout, config.train.micro_batch_tokens, seed=config.train.seed)
    low, high = found["accuracy_ci95"]
    figures = {
        "eval_accuracy": found["accuracy"],
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_loss": found["nll"],
        "eval_ece": found["ece"],
        "eval_over_confidence": found["over_confidence"],
        "eval_length_correlation": found["length"]["spearman"],
        "eval_reward_mean": found["score_mean"],
        "eval_reward_std": found["score_std"],
        "eval_reward_margin": found["margin_mean"],
    }
    # A correlation without spread does not exist: the line then goes without it.
    return {key: value for key, value in figures.items() if value is not None}


def _reward(lm: LanguageModel, heldout: list[Group], mixture: Mixture, config: Any) -> dict[str, float]:
    sampling = steady(config.sampling)
    sampler, _ = choose_sampler(lm, sampling, probe_groups(lm.vocab_size))
    found = evaluate_policy(
        lm,
        sampler,
        mixture,
        heldout[:SAMPLED_PROMPTS],
        sampling,
        samples=1,
        seed=config.train.seed,
        end_tokens=end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None)),
    )
    figures = {"eval_response_tokens": found.response_tokens}
    if found.unscored:
        figures["eval_unscored"] = found.unscored
    if found.scores:
        figures["eval_reward"] = sum(found.scores) / len(found.scores)
    return figures
