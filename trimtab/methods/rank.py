"""A policy trained on rankings or ratings of K responses, without a reward model.

    s_i = β·(log π(y_i|x) − log π_ref(y_i|x))              reference_free: s_i = β·log π(y_i|x)
    listwise   ℓ = −Σ_k (s_(k) − log Σ_{j ≥ k} exp s_(j))          DPO over rankings (Rafailov et al., 2023,
                                                                   appendix A.3); (k) = ranked k-th
    pairs      ℓ = mean over pairs with i ranked above j of −log σ(s_i − s_j)           RankNet's loss on s

Feedback: rankings, ratings or rewards of K responses; pairs, where both are DPO's loss.

Log-probabilities are summed over a response's tokens, end token included; ``logps = "mean"`` divides by their
number. Ties: see ``plackett_luce_loss``; they form no pair. The reference's log-probabilities are computed
once, before the first step. A group is one tree, its prompt computed once.

Departures: the pairwise loss is a mean over a group's pairs, so that long rankings do not outweigh short
ones; ``pair_reduction = "sum"`` is the plain sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.data.convert import as_comparisons
from trimtab.groups import Group
from trimtab.methods.shared.anchor import keep_reference
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.pairs import BetaOptions
from trimtab.methods.shared.rankings import (
    RankingOptions,
    check_ties,
    group_weights,
    lay_out,
    pair_metrics,
    ranking_loss,
)
from trimtab.methods.shared.setup import (
    MethodConfig,
    OnEval,
    Result,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import load_model
from trimtab.objectives.reduce import response_sums
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run


class RankConfig(RankingOptions, BetaOptions):
    """A policy from rankings."""

    loss: Literal["listwise", "pairs"] = Field(
        "listwise", description="Plackett–Luce over the whole ranking, or logistic over its ordered pairs"
    )
    pair_reduction: Literal["mean", "sum"] = Field(
        "mean", description="a group's pairs: their mean, or their sum, which gives long rankings more weight"
    )
    logps: Literal["sum", "mean"] = Field(
        "sum", description="of a response: the sum over its tokens, or their mean, which needs a larger beta"
    )
    reference_free: bool = Field(False, description="leave the reference out of the score")
    reference: str = Field("", description="folder or hub name of the reference; empty takes model.path")

    @model_validator(mode="after")
    def _consistent(self) -> RankConfig:
        if self.reference_free and self.reference:
            raise ValueError("reference has no effect with reference_free = true; remove one")
        if self.loss == "listwise" and self.pair_reduction != "mean":
            raise ValueError('pair_reduction has no effect with loss = "listwise"; remove it')
        return self


class Config(MethodConfig):
    """Options of ``trimtab rank``."""

    rank: RankConfig = Field(default_factory=RankConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Train a policy on rankings. Raises InputError for anything that the user can mend."""
    options, sizes = config.rank, config.train
    with Run("rank", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        data = prepare_data(config.data, lm, as_comparisons, "a ranking, ratings or a pair", sizes.seed)
        check_ties([*data.groups, *data.heldout], options, options.loss, "rank")
        for line in data.lines:
            run.say(line)
        state = run.new_state(lm)
        if not options.reference_free:
            keep_reference(config, "rank.reference", options.reference, lm, data, run, state)
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups))

        def gradient(groups: list[Group], tokens: int) -> tuple[float, dict[str, float]]:
            beta = options.beta_at(sizes, state.step, total, state.tokens)
            loss, shown = compare(lm, state.optimiser, groups, options, tokens, beta)
            return loss, shown if options.beta_end is None else shown | {"beta": beta}

        learn_from(data, lm, run, state, total, gradient, on_eval)
        facts = {
            "model": config.model.path,
            "reference": "none" if options.reference_free else options.reference or config.model.path,
            "models_in_memory": 2 if options.reference else 1,
            "feedback_items": len(data.groups),
        }
        run.finish(lm, state, {**facts, "beta": options.beta, "data": data.fingerprints})
        return Result(run.out, lm, state)


def compare(
    lm: LanguageModel,
    optimiser: Optimiser,
    groups: list[Group],
    options: RankConfig,
    max_tokens: int,
    beta: float,
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means of what is shown of the groups."""

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_P, shown = ranking_losses(lm, part, batch, options, beta=beta)
        return loss_P, group_weights(part).to(loss_P), shown

    loss, seen = accumulate_items(lm, optimiser, groups, losses, max_tokens)
    lengths = [len(r.tokens or ()) for group in groups for r in group.responses]
    return loss, seen | {"response_tokens": sum(lengths) / len(lengths)}


def ranking_losses(
    lm: LanguageModel, groups: list[Group], batch: TreeBatch, options: RankConfig, *, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the groups' metrics ``[P]``."""
    gain_NT, _ = lm.token_logprobs(batch)
    if not options.reference_free:
        ref_logps_NT = batch.padded([r.ref_logps or [] for group in groups for r in group.responses])
        gain_NT = gain_NT - ref_logps_NT.to(gain_NT.dtype)
    scores_N = beta * response_sums(gain_NT, batch.mask_NT)
    if options.logps == "mean":
        scores_N = scores_N / batch.mask_NT.sum(-1)
    found = lay_out(groups, scores_N, options.top)
    loss_P = ranking_loss(found, options.loss, reduction=options.pair_reduction)
    return loss_P, pair_metrics(found.scores_PK.detach(), found.ranks_PK, found.mask_PK)
