"""KTO, Kahneman-Tversky optimisation (Ethayarajh et al., 2024), on responses with a label: good or bad.

    h(y)  = log π(y|x) − log π_ref(y|x)
    z_ref = max(0, mean_i h(y_{i+1}|x_i))                   each prompt with the next one's response
    ℓ     = λ_D·(1 − σ(β·(h(y) − z_ref)))                   y good;   mean over responses
            λ_U·(1 − σ(β·(z_ref − h(y))))                   y bad

Feedback: labels (thumbs, allow/deny), one or several responses a prompt; of a pair the chosen is good and the
rejected bad. Log-probabilities are summed over a response's tokens, end token included.

z_ref is estimated on the whole optimiser batch, not on a micro-batch, so that how a batch is cut changes
nothing; it carries no gradient. The reference's log-probabilities of the data are computed once, before the
first step. Those of the mismatched responses change with the batch, so that a reference stays in memory
(with an adapter: the base alone); ``kl = "none"`` needs none.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from trimtab.data.convert import as_labelled
from trimtab.groups import Group
from trimtab.methods.shared.anchor import keep_reference
from trimtab.methods.shared.labels import LabelOptions, baseline, learn_labels, mismatched, weigh
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
from trimtab.models.load import load_model
from trimtab.models.roles import bases, reference_of
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run


class KTOConfig(LabelOptions):
    """Kahneman-Tversky optimisation."""

    reference: str = Field("", description="folder or hub name of the reference; empty takes model.path")


class Config(MethodConfig):
    """Options of ``trimtab kto``."""

    kto: KTOConfig = Field(default_factory=KTOConfig)

    @model_validator(mode="after")
    def _mismatches(self) -> Config:
        if self.kto.kl == "batch" and self.train.batch_groups < 2:
            raise ValueError(
                'kto.kl = "batch" needs train.batch_groups of 2 or more: one alone has no mismatched prompt'
            )
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run KTO. Raises InputError for anything that the user can mend."""
    options, sizes = config.kto, config.train
    with Run("kto", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        data = prepare_data(config.data, lm, as_labelled, "a labelled response", sizes.seed)
        weighed = weigh(options, data.groups, data.stream.shares())
        for line in (*data.lines, str(weighed)):
            run.say(line)
        state = run.new_state(lm)
        reference = keep_reference(config, "kto.reference", options.reference, lm, data, run, state)
        if options.kl == "none":
            reference = lm  # not used again; one that was named is dropped
        elif not options.reference:
            reference = reference_of(lm)
            reference.cast(lm.dtype)
        held, shared = bases({"policy": lm} if reference is lm else {"policy": lm, "reference": reference})
        run.say(shared)
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups))
        longest = min(config.data.max_tokens or lm.context, lm.context)
        times = forward_times(lm, sizes)

        def gradient(groups: list[Group], tokens: int) -> tuple[float, dict[str, float]]:
            z_ref = torch.zeros((), dtype=torch.float64)
            if options.kl == "batch":
                z_ref = baseline(lm, reference, mismatched(groups, longest), times * tokens)
            beta = options.beta_at(sizes, state.step, total, state.tokens)
            found = learn_labels(lm, state.optimiser, groups, weighed, tokens, beta=beta, z_ref=z_ref)
            return found[0], found[1] | ({"beta": beta} if options.beta_end is not None else {})

        learn_from(data, lm, run, state, total, gradient, on_eval)
        facts = {
            "model": config.model.path,
            "reference": options.reference or config.model.path,
            "models_in_memory": 2 if options.reference and options.kl == "none" else held,
            "feedback_items": len(data.groups),
        }
        run.finish(lm, state, {**facts, "beta": options.beta, "data": data.fingerprints})
        return Result(run.out, lm, state)
