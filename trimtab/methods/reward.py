"""Reward model (Christiano et al., 2017; Stiennon et al., 2020): scores that explain people's choices.

    pairs      ℓ = −log σ(r(x, y_w) − r(x, y_l))      mean over a group's ordered pairs, then over groups
    listwise   ℓ = −Σ_k log softmax_k(r of those not yet placed)                  (Plackett–Luce)
    centre     + c·(r_w + r_l)²                               (for K responses c·(2·their mean)²)

Departures from the papers: the score is read at the end token in fp32; a group is one tree, its prompt
computed once; the loss of a ranking of K is divided by its number of pairs, so that long rankings do not
outweigh short ones.

Feedback: pairs, rankings or ratings. The run's ``model/`` loads with ``AutoModelForSequenceClassification``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.convert import as_comparisons
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.setup import (
    MethodConfig,
    OnEval,
    Result,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_scalar_layout,
    total_steps,
)
from trimtab.models.load import load_scalar_model
from trimtab.models.scalar_model import ScalarModel
from trimtab.objectives.ranking import pairwise_ranking_loss, plackett_luce_loss
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run


class RewardModelConfig(Section):
    """The reward model."""

    loss: Literal["pairs", "listwise"] = Field(
        "pairs", description="Bradley–Terry over ordered pairs, or Plackett–Luce over the whole ranking"
    )
    centre: float = Field(
        0.01,
        ge=0,
        description="weight of the squared mean score, which holds scores around 0; 0 leaves it out",
    )


class Config(MethodConfig):
    """Options of ``trimtab reward``."""

    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Train a reward model. Raises InputError for anything that the user can mend."""
    options, sizes = config.reward_model, config.train
    with Run("reward", config, config.run, sizes) as run:
        rm = load_scalar_model(config.model, **how_to_load(config, run), new_head="normal", seed=sizes.seed)
        settle_adapter(config, run, rm)
        if rm.outputs != 1:
            raise InputError(
                f"model.path: {config.model.path} gives {rm.outputs} scores; a reward model is trained on one"
            )
        run.say(settle_scalar_layout(rm, config.model.layout))
        data = prepare_data(config.data, rm, as_comparisons, "a pair, a ranking or ratings", sizes.seed)
        if options.loss == "listwise":
            refuse_ties([*data.groups, *data.heldout])
        for line in data.lines:
            run.say(line)
        state = run.resume(run.new_state(rm))
        total = total_steps(sizes, len(data.groups))
        learn_from(
            data,
            rm,
            run,
            state,
            total,
            lambda groups, tokens: compare(rm, state.optimiser, groups, options, tokens),
            on_eval,
        )
        facts = {"model": config.model.path, "models_in_memory": 1, "data": data.fingerprints}
        run.finish(rm, state, {**facts, "feedback_items": len(data.groups)})
        return Result(run.out, rm, state)


def compare(
    rm: ScalarModel, optimiser: Optimiser, groups: list[Group], options: RewardModelConfig, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means of what is shown of the groups."""

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_P, shown = comparison_losses(rm, part, batch, options)
        return loss_P, group_weights(part).to(loss_P), shown

    loss, seen = accumulate_items(rm, optimiser, groups, losses, max_tokens)
    lengths = [len(r.tokens or ()) for group in groups for r in group.responses]
    return loss, seen | {"response_tokens": sum(lengths) / len(lengths)}


def comparison_losses(
    rm: ScalarModel, groups: list[Group], batch: TreeBatch, options: RewardModelConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the groups' metrics ``[P]``."""
    scores_N = rm.scores(batch)[:, 0]
    mask_PK = torch.zeros(len(groups), max(len(g.responses) for g in groups), dtype=torch.bool)
    ranks_PK = torch.zeros(mask_PK.shape, dtype=scores_N.dtype)
    for p, group in enumerate(groups):
        mask_PK[p, : len(group.responses)] = True
        ranks_PK[p, : len(group.responses)] = torch.tensor([float(r.rank or 0) for r in group.responses])
    mask_PK, ranks_PK = mask_PK.to(rm.device), ranks_PK.to(rm.device)
    scores_PK = scores_N.new_zeros(mask_PK.shape).masked_scatter(mask_PK, scores_N)
    count_P = mask_PK.sum(-1)
    mean_P = scores_PK.sum(-1) / count_P
    pair_loss_P, pairs_P = pairwise_ranking_loss(scores_PK, ranks_PK, mask_PK)
    if options.loss == "pairs":
        loss_P = pair_loss_P / pairs_P
    else:
        loss_P = plackett_luce_loss(scores_PK, ranks_PK, mask_PK)
    # Of a pair 2·mean is r_w + r_l, so that this is the published penalty where K = 2.
    loss_P = loss_P + options.centre * (2 * mean_P).square()
    return loss_P, pair_metrics(scores_PK.detach(), ranks_PK, mask_PK)


def pair_metrics(
    scores_PK: torch.Tensor, ranks_PK: torch.Tensor, mask_PK: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Means over each group's ordered pairs, ``[P]``: accuracy (equal scores ½), rewards, margin."""
    ordered_PKK = (ranks_PK[:, :, None] < ranks_PK[:, None, :]) & mask_PK[:, :, None] & mask_PK[:, None, :]
    margin_PKK = scores_PK[:, :, None] - scores_PK[:, None, :]
    pairs_P = ordered_PKK.sum((1, 2))
    right_PKK = (margin_PKK > 0).to(margin_PKK.dtype) + 0.5 * (margin_PKK == 0)

    def mean(values_PKK: torch.Tensor) -> torch.Tensor:
        return (values_PKK * ordered_PKK).sum((1, 2)) / pairs_P

    chosen_P = mean(scores_PK[:, :, None].expand_as(margin_PKK))
    rejected_P = mean(scores_PK[:, None, :].expand_as(margin_PKK))
    return {
        "accuracy": mean(right_PKK),
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "reward_margin": chosen_P - rejected_P,
        "reward_mean": scores_PK.sum(-1) / mask_PK.sum(-1),
    }


def group_weights(groups: list[Group]) -> torch.Tensor:
    """The groups' weights ``[P]``."""
    return torch.tensor([group.weight for group in groups])


def refuse_ties(groups: list[Group]) -> None:
    """Plackett–Luce orders all responses; a tie has no place in it."""
    for group in groups:
        ranks = [r.rank for r in group.responses]
        if len(set(ranks)) < len(ranks):
            raise InputError(
                f'{group.id}: two responses have one rank, which reward_model.loss = "listwise" cannot use; '
                'use "pairs", which leaves ties out'
            )
