"""Process reward model (Lightman et al., 2023; Wang et al., 2024, Math-Shepherd): is each step right?

    p_k = σ(r(x, y_≤k))                                     read at the last token of step k
    ℓ_k = −z_k·log p_k − (1 − z_k)·log(1 − p_k)             mean over the steps of the batch

z_k is a step's label: right or wrong, or the share of continuations from there that came out right.

Each step is its text, then the separator, tokenised apart and joined, so that a boundary is never inside a
token; the score is read at the separator's last token, in fp32. There is no end token, so the last step is
judged as any other.

Departures: one output and a sigmoid, where Lightman et al. train the language model's head to write a word,
and TRL a head of two outputs and a softmax (the difference of its two is our one). Steps without a clear
label ("neutral") have to be given one. ``steps = "last"`` learns the last step's label alone, as an outcome
reward model does.

Feedback: responses in labelled steps. The run's ``model/`` loads with ``AutoModelForSequenceClassification``;
its ``reward.json`` keeps the separator. As a reward: the term "process_reward_model".
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from pydantic import Field

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.steps import as_steps, divided
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.rankings import group_weights
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
from trimtab.objectives.scores import step_loss
from trimtab.rewards.scores import step_figures, step_labels
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run


class ProcessRewardConfig(Section):
    """The process reward model."""

    separator: str = Field(
        "\n",
        description="written behind every step, where it is judged (a line feed); empty: steps as they stand",
    )
    steps: Literal["all", "last"] = Field(
        "all", description="whose labels are learned; last: the outcome's alone"
    )


class Config(MethodConfig):
    """Options of ``trimtab process-reward``."""

    process_reward: ProcessRewardConfig = Field(default_factory=ProcessRewardConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Train a process reward model. Raises InputError for anything that the user can mend."""
    options, sizes = config.process_reward, config.train
    with Run("process-reward", config, config.run, sizes) as run:
        rm = load_scalar_model(config.model, **how_to_load(config, run), new_head="normal", seed=sizes.seed)
        settle_adapter(config, run, rm)
        if rm.outputs != 1:
            raise InputError(
                f"model.path: {config.model.path} gives {rm.outputs} scores; a process reward model has one"
            )
        run.say(settle_scalar_layout(rm, config.model.layout))
        to = functools.partial(
            as_steps, tokenizer=rm.tokenizer, separator=options.separator, last_only=options.steps == "last"
        )
        data = prepare_data(config.data, rm, to, "a response in labelled steps", sizes.seed)
        for line in data.lines:
            run.say(line)
        inside, steps = divided(data.groups, options.separator) if options.separator else (0, 0)
        if inside:
            run.say(
                f"{inside:,} of {steps:,} steps have the separator inside: each is learned as one step, and "
                "as a reward its text is several"
            )
        state = run.resume(run.new_state(rm))
        total = total_steps(sizes, len(data.groups))
        learn_from(
            data,
            rm,
            run,
            state,
            total,
            lambda groups, tokens: judge(rm, state.optimiser, groups, tokens),
            on_eval,
        )
        rm.about = {"kind": "steps", "separator": options.separator}
        facts = {"model": config.model.path, "models_in_memory": 1, "data": data.fingerprints}
        run.finish(rm, state, {**facts, "feedback_items": len(data.groups)})
        return Result(run.out, rm, state)


def judge(
    rm: ScalarModel, optimiser: Optimiser, groups: list[Group], max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means of what is shown of the steps."""
    # What is then divided by the number of groups is a mean over steps, however the batch is cut.
    share = len(groups) / sum(len(r.step_ends or ()) for group in groups for r in group.responses)

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_P, shown = step_losses(rm, part, batch, share=share)
        return loss_P, group_weights(part).to(loss_P), shown

    loss, seen = accumulate_items(rm, optimiser, groups, losses, max_tokens)
    lengths = [len(r.tokens or ()) for group in groups for r in group.responses]
    return loss, seen | {"response_tokens": sum(lengths) / len(lengths)}


def step_losses(
    rm: ScalarModel, groups: list[Group], batch: TreeBatch, *, share: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the groups' metrics ``[P]``: sums over steps times ``share``, means over responses."""
    responses = [response for group in groups for response in group.responses]
    sizes = [len(group.responses) for group in groups]
    logits_NS, mask_NS = rm.step_logits(batch, responses)
    labels_NS = step_labels(responses, logits_NS)
    loss_NS = step_loss(logits_NS, labels_NS, mask_NS)
    right_NS, found_N, _ = step_figures(logits_NS.detach(), labels_NS, mask_NS)
    chance_NS = logits_NS.detach().sigmoid().masked_fill(~mask_NS, 0.0)

    def by_group(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in values.split(sizes)])

    counts_P = torch.tensor(sizes, device=loss_NS.device)
    return share * by_group(loss_NS), {
        "step_accuracy": share * by_group(right_NS.double()),
        "first_error_accuracy": by_group(found_N) / counts_P,
        "step_probability": share * by_group(chance_NS),
        "steps": by_group(mask_NS.to(loss_NS)) / counts_P,
    }
