"""Supervised fine-tuning: maximise the likelihood of demonstrations.

    ℓ = −Σ_t log π(y_t | x, y_<t) / number of tokens        over the responses' tokens of the whole batch

Feedback: demonstrations; from a pair the chosen answer, from a ranking the best.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trimtab.config import Section
from trimtab.data.convert import as_demonstrations
from trimtab.groups import Group
from trimtab.methods.shared.offline import learn_from
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
from trimtab.objectives.reduce import Reduction, reduce_tokens
from trimtab.objectives.supervised import sft_loss
from trimtab.spread.deal import Sums, global_count, parts
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run


class SFTConfig(Section):
    """Supervised fine-tuning."""

    loss_on: Literal["response", "all"] = Field(
        "response", description="count the response's tokens only, or the prompt's too"
    )
    reduction: Literal["token_mean", "response_mean"] = Field(
        "token_mean", description="every token weighs the same, or every response"
    )


class Config(MethodConfig):
    """Options of ``trimtab sft``."""

    sft: SFTConfig = Field(default_factory=SFTConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run supervised fine-tuning. Raises InputError for anything that the user can mend."""
    options, sizes = config.sft, config.train
    with Run("sft", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        data = prepare_data(
            config.data,
            lm,
            as_demonstrations,
            "a demonstration",
            sizes.seed,
            completion_only=options.loss_on == "response",
        )
        for line in data.lines:
            run.say(line)
        state = run.resume(run.new_state(lm))
        total = total_steps(sizes, len(data.groups))
        learn_from(
            data,
            lm,
            run,
            state,
            total,
            lambda groups, tokens: likelihood(lm, state.optimiser, groups, options.reduction, tokens),
            on_eval,
        )
        facts = {"model": config.model.path, "models_in_memory": 1, "data": data.fingerprints}
        run.finish(lm, state, {**facts, "feedback_items": len(data.groups)})
        return Result(run.out, lm, state)


def likelihood(
    lm: LanguageModel, optimiser: Optimiser, groups: list[Group], reduction: Reduction, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss, and how long responses are."""
    count = global_count(groups, reduction)
    sums = Sums()
    for part in parts(lm, groups, max_tokens):
        policy_logps_NT, _ = lm.token_logprobs(part.batch)
        mask_NT, weights_N = part.batch.mask_NT, part.batch.weights_N
        share = reduce_tokens(sft_loss(policy_logps_NT), mask_NT, count, reduction, weights_N=weights_N)
        sums.backward(optimiser, share, part)
    loss, _ = sums.total(1)
    return loss, {"response_tokens": global_count(groups, "token_mean") / len(groups)}
