"""Reward model (Christiano et al., 2017; Stiennon et al., 2020): scores that explain people's judgements.

    pairs        ℓ = −log σ(r(x, y_w) − r(x, y_l) − m)      mean over a group's ordered pairs
    soft labels  ℓ = −p·log σ(r_w − r_l) − (1 − p)·log σ(r_l − r_w)            p: agreement of the annotators
    listwise     ℓ = −Σ_k log softmax_k(r of those not yet placed)             (Plackett–Luce)
    regression   ℓ = (r_a − rating_a)²                      mean over the known ratings of the batch
    centre       + c·(r_w + r_l)²                           (for K responses c·(2·their mean)²)

Departures from the papers: the score is read at the end token in fp32; a group is one tree, its prompt
computed once; the loss of a ranking of K is divided by its number of pairs, so that long rankings do not
outweigh short ones. Ties: see ``plackett_luce_loss``; they form no pair.

Feedback: pairs, rankings or ratings. The run's ``model/`` loads with ``AutoModelForSequenceClassification``;
its ``reward.json`` says what the scores are, and holds the temperature of ``calibrate``.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.data.convert import as_comparisons
from trimtab.data.ratings import OVERALL, as_rated
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.rankings import (
    RankingOptions,
    check_ties,
    group_weights,
    lay_out,
    pair_metrics,
    ranking_loss,
)
from trimtab.methods.shared.ratings import (
    FeedbackOptions,
    known_ratings,
    margins_of,
    rating_losses,
    settle_outputs,
    targets_of,
)
from trimtab.methods.shared.setup import (
    Data,
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
from trimtab.rewards.calibration import calibrate, calibration_line, halves, ordered_margins
from trimtab.rewards.scores import group_scores
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.state import State
from trimtab.training.update import within_memory

CENTRE = 0.01


class RewardModelConfig(RankingOptions, FeedbackOptions):
    """The reward model."""

    loss: Literal["pairs", "listwise", "regression"] = Field(
        "pairs",
        description="Bradley–Terry over ordered pairs, Plackett–Luce over the whole ranking, or ratings",
    )
    centre: float = Field(
        CENTRE,
        ge=0,
        description="weight of the squared mean score, which holds scores around 0; 0 leaves it out",
    )
    calibrate: bool = Field(
        False, description="fit a temperature on half of the held-out comparisons, after training"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RewardModelConfig:
        self.check_feedback(self.loss)
        if self.loss == "regression":
            odd = [name for name in ("top", "calibrate") if getattr(self, name)]
            odd += ["ties"] * (self.ties != "exact") + ["centre"] * (self.centre != CENTRE)
            if odd:
                raise ValueError(f'{odd[0]} has no effect with loss = "regression"; remove it')
        return self


class Config(MethodConfig):
    """Options of ``trimtab reward``."""

    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)

    @model_validator(mode="after")
    def _held_out(self) -> Config:
        if self.reward_model.calibrate and not self.data.heldout and not self.data.heldout_fraction:
            raise ValueError(
                "reward_model.calibrate needs held-out rows: set data.heldout_fraction or data.heldout"
            )
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Train a reward model. Raises InputError for anything that the user can mend."""
    options, sizes = config.reward_model, config.train
    names = names_of(options)
    with Run("reward", config, config.run, sizes) as run:
        rm = load_scalar_model(
            config.model,
            **how_to_load(config, run),
            new_head="normal",
            outputs=len(names) or 1,
            seed=sizes.seed,
        )
        settle_adapter(config, run, rm)
        if names:
            settle_outputs(rm, names, config.model.path)
        elif rm.outputs != 1:
            raise InputError(
                f"model.path: {config.model.path} gives {rm.outputs} scores; a reward model is trained on one"
            )
        run.say(settle_scalar_layout(rm, config.model.layout))
        data = read(config, rm)
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
        rm.about = about(options, names)
        facts: dict[str, Any] = {"model": config.model.path, "models_in_memory": 1, "data": data.fingerprints}
        if options.calibrate:
            rm.about["calibration"] = facts["calibration"] = calibrated(config, rm, data, run, state)
        run.finish(rm, state, {**facts, "feedback_items": len(data.groups)})
        return Result(run.out, rm, state)


def names_of(options: RewardModelConfig) -> list[str]:
    """The attributes that are learned; none where responses are compared."""
    return (options.attributes or [OVERALL]) if options.loss == "regression" else []


def about(options: RewardModelConfig, names: list[str]) -> dict[str, Any]:
    """What ``reward.json`` says of the scores."""
    if not names:
        return {"kind": "comparisons"}
    unit = {"rating_origin": options.rating_origin, "rating_unit": options.rating_unit}
    return {"kind": "ratings", "outputs": names, **unit}


def read(config: Config, rm: ScalarModel) -> Data:
    """The comparisons or ratings, refused at once where a row lacks what the options read."""
    options = config.reward_model
    if names := names_of(options):
        to = functools.partial(as_rated, attributes=names)
        data = prepare_data(config.data, rm, to, "a rating", config.train.seed)
        rated = {name for g in data.groups for r in g.responses for name in r.ratings or ()}
        if unrated := [name for name in names if name not in rated]:
            raise InputError(
                f"reward_model.attributes: no training row rates {', '.join(unrated)}, so that nothing would "
                "be learned of it: correct the name, or leave it out"
            )
        return data
    what = "a pair, a ranking or ratings"
    data = prepare_data(config.data, rm, as_comparisons, what, config.train.seed)
    groups = [*data.groups, *data.heldout]
    check_ties(groups, options, options.loss, "reward_model")
    for group in groups:
        like_PK = torch.zeros(1, len(group.responses))
        margins_of([group], options, like_PK)
        targets_of([group], options, like_PK)
    if options.calibrate:
        halves(data.heldout, config.train.seed)
    return data


def calibrated(config: Config, rm: ScalarModel, data: Data, run: Run, state: State) -> dict[str, Any]:
    """The temperature that the first half of the held-out prompts gives, measured on the second."""
    sides = halves(data.heldout, config.train.seed)
    margins, targets = [], []
    for side in sides:
        scores = within_memory(run, state, functools.partial(group_scores, rm, side))
        margins.append(ordered_margins(side, [found[:, 0] for found in scores]))
        target_PKK = targets_of(side, config.reward_model, torch.zeros(1, dtype=torch.float64))
        targets.append(None if target_PKK is None else target_PKK[:, 0, 0].numpy())
    found = calibrate(*margins, *targets)
    run.say(calibration_line(found))
    return found


def compare(
    rm: ScalarModel, optimiser: Optimiser, groups: list[Group], options: RewardModelConfig, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means of what is shown of the groups."""

    names = names_of(options)
    share = len(groups) / known_ratings(groups) if names else 0.0

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if names:
            loss_P, shown = rating_losses(rm, part, batch, names, options, share=share)
        else:
            loss_P, shown = comparison_losses(rm, part, batch, options)
        return loss_P, group_weights(part).to(loss_P), shown

    loss, seen = accumulate_items(rm, optimiser, groups, losses, max_tokens)
    lengths = [len(r.tokens or ()) for group in groups for r in group.responses]
    return loss, seen | {"response_tokens": sum(lengths) / len(lengths)}


def comparison_losses(
    rm: ScalarModel, groups: list[Group], batch: TreeBatch, options: RewardModelConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the groups' metrics ``[P]``."""
    found = lay_out(groups, rm.scores(batch)[:, 0], options.top)
    loss_P = ranking_loss(
        found,
        options.loss,
        margin_PKK=margins_of(groups, options, found.scores_PK),
        target_PKK=targets_of(groups, options, found.scores_PK),
    )
    # Of a pair 2·mean is r_w + r_l, so that this is the published penalty where K = 2.
    mean_P = found.scores_PK.sum(-1) / found.mask_PK.sum(-1)
    loss_P = loss_P + options.centre * (2 * mean_P).square()
    return loss_P, pair_metrics(found.scores_PK.detach(), found.ranks_PK, found.mask_PK)
