"""Supervised fine-tuning: maximise the likelihood of demonstrations.

    ℓ = −Σ_t log π(y_t | x, y_<t) / number of tokens        over the responses' tokens of the whole batch

Feedback: demonstrations; from a pair the chosen answer, from a ranking the best.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from trimtab.config import Section
from trimtab.data.collate import collate, microbatches
from trimtab.data.convert import as_demonstrations
from trimtab.methods.setup import (
    MethodConfig,
    OnEval,
    Result,
    evaluation_due,
    prepare_data,
    settle_layout,
    tokens_of,
    total_steps,
)
from trimtab.models.load import load_model
from trimtab.objectives.reduce import global_count, reduce_tokens
from trimtab.objectives.supervised import sft_loss
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate


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
        lm = load_model(config.model)
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
        run.start(total, state.step)
        if on_eval and state.step == 0:
            run.log(state, on_eval(lm, data.heldout, 0))

        while state.step < total and not run.spent(state):
            began = time.perf_counter()
            groups = data.stream.batch(state.position, sizes.batch_groups)
            parts = [
                collate(part, layout=lm.layout, device=lm.device)
                for part in microbatches(groups, sizes.micro_batch_tokens, layout=lm.layout)
            ]
            count = global_count((part.mask_NT for part in parts), options.reduction)
            loss = 0.0
            for part in parts:
                policy_logps_NT, _ = lm.token_logprobs(part)
                loss += state.optimiser.backward(
                    reduce_tokens(
                        sft_loss(policy_logps_NT),
                        part.mask_NT,
                        count,
                        options.reduction,
                        weights_N=part.weights_N,
                    ),
                    state.step,
                )
            lr = learning_rate(sizes, state.step, total, state.tokens)
            grad_norm = state.optimiser.step(lr, state.step)
            lm.version += 1
            state.step, state.position = state.step + 1, state.position + len(groups)
            state.tokens += tokens_of(groups)

            tokens = sum(int(part.mask_NT.sum()) for part in parts)
            seconds = time.perf_counter() - began
            metrics = {
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": lr,
                "response_tokens": tokens / len(groups),
                "tokens_per_s": sum(part.tokens for part in parts) / seconds,
                "epoch": data.stream.epoch(state.position),
                "seconds": run.elapsed(state),
            }
            if on_eval and evaluation_due(run, state, total):
                metrics |= on_eval(lm, data.heldout, state.step)
            run.log(state, metrics)
            if run.due(sizes.save_every, state):
                run.checkpoint(state)
        facts = {"model": config.model.path, "models_in_memory": 1, "data": data.fingerprints}
        run.finish(lm, state, {**facts, "feedback_items": len(data.groups)})
        return Result(run.out, lm, state)
