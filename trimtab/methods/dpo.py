"""Direct Preference Optimization (Rafailov et al., 2023) on pairs.

    r̂(y) = β·(log π(y|x) − log π_ref(y|x))
    ℓ    = −log σ(r̂(y_w) − r̂(y_l))                        mean over pairs, weighted by the group's weight

Feedback: pairs; a ranking or ratings of K responses give every pair without a tie.

Log-probabilities are summed over a response's tokens, end token included, as in the paper. The
reference's are computed once, before the first step, and kept with the pairs; then the reference is dropped,
so one model is in memory while training. Chosen and rejected share their prompt in one tree.
"""

from __future__ import annotations

import functools

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.convert import as_pairs
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.setup import (
    MethodConfig,
    OnEval,
    Result,
    attach,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_model, resolve
from trimtab.objectives.preference import dpo_loss
from trimtab.objectives.reduce import response_sums
from trimtab.training.optimiser import Optimiser
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.update import within_memory


class DPOConfig(Section):
    """Direct Preference Optimization."""

    beta: float = Field(0.1, gt=0, description="strength of the anchor: higher stays closer to the reference")
    reference_free: bool = Field(False, description="leave the reference out of the loss (not the paper's)")
    reference: str = Field("", description="folder or hub name of the reference; empty takes model.path")

    @model_validator(mode="after")
    def _consistent(self) -> DPOConfig:
        if self.reference_free and self.reference:
            raise ValueError("reference has no effect with reference_free = true; remove one")
        return self


class Config(MethodConfig):
    """Options of ``trimtab dpo``."""

    dpo: DPOConfig = Field(default_factory=DPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run DPO. Raises InputError for anything that the user can mend."""
    options, sizes = config.dpo, config.train
    with Run("dpo", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        data = prepare_data(config.data, lm, as_pairs, "a preference pair", sizes.seed)
        for line in data.lines:
            run.say(line)
        state = run.new_state(lm)
        if not options.reference_free:
            # Before a checkpoint is taken up the policy still is the model that the run starts from, so
            # unless another reference is named no second copy is needed.
            reference = load_reference(config, lm) if options.reference else lm
            # Held-out pairs apart and cut as the evaluation cuts them: other neighbours in a row move the
            # last bits, and an untrained policy's held-out rewards would be noise and not 0. And cut as in
            # the first sitting, whatever memory has run out since.
            halved = state.micro_batch_tokens
            if run.environment.get("micro_batch_option") == sizes.micro_batch_tokens:
                state.micro_batch_tokens = run.environment.get("reference_tokens", halved)
            for groups, times in ((data.groups, forward_times(lm, sizes)), (data.heldout, 1)):
                work = functools.partial(attach_reference, reference, groups)
                within_memory(run, state, work, times=times)
            del reference, work
            state.environment["reference_tokens"] = state.micro_batch_tokens
            state.micro_batch_tokens = min(halved, state.micro_batch_tokens)
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups))
        learn_from(
            data,
            lm,
            run,
            state,
            total,
            lambda pairs, tokens: compare(lm, state.optimiser, pairs, options, tokens),
            on_eval,
        )
        facts = {
            "model": config.model.path,
            "reference": "none" if options.reference_free else options.reference or config.model.path,
            # The reference's numbers are computed first; a second model is loaded only if one is named.
            "models_in_memory": 2 if options.reference else 1,
            "feedback_items": len(data.groups),
        }
        run.finish(lm, state, {**facts, "beta": options.beta, "data": data.fingerprints})
        return Result(run.out, lm, state)


def compare(
    lm: LanguageModel, optimiser: Optimiser, pairs: list[Group], options: DPOConfig, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means of what is shown of the pairs."""

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss_P, shown = pair_losses(lm, part, batch, options)
        return loss_P, batch.weights_N[::2], shown

    return accumulate_items(lm, optimiser, pairs, losses, max_tokens)


def pair_losses(
    lm: LanguageModel, pairs: list[Group], batch: TreeBatch, options: DPOConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss ``[P]`` and the pairs' metrics ``[P]``; rows 2p and 2p+1 of the batch are chosen and rejected."""
    policy_logps_NT, _ = lm.token_logprobs(batch)
    policy_P2 = response_sums(policy_logps_NT, batch.mask_NT).view(-1, 2)
    ref_P2 = None
    if not options.reference_free:
        ref_logps_NT = batch.padded([r.ref_logps or [] for pair in pairs for r in pair.responses])
        ref_P2 = response_sums(ref_logps_NT.to(policy_P2.dtype), batch.mask_NT).view(-1, 2)
    loss_P, chosen_P, rejected_P = dpo_loss(
        policy_P2[:, 0],
        policy_P2[:, 1],
        None if ref_P2 is None else ref_P2[:, 0],
        None if ref_P2 is None else ref_P2[:, 1],
        beta=options.beta,
    )
    # Equal rewards (an untrained policy) are a coin's toss, not a failure: they count one half.
    accuracy_P = (chosen_P > rejected_P).float() + 0.5 * (chosen_P == rejected_P).float()
    lengths_P2 = batch.mask_NT.sum(-1).view(-1, 2).float()
    return loss_P, {
        "accuracy": accuracy_P,
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "reward_margin": chosen_P - rejected_P,
        "response_tokens": lengths_P2.mean(-1),
    }


def load_reference(config: Config, lm: LanguageModel) -> LanguageModel:
    """The reference that the configuration names, computing in the policy's dtype with its tokenizer."""
    named = ModelConfig(**{**config.model.model_dump(), "path": config.dpo.reference})
    _, base = resolve(config.model)
    named.tokenizer = base.tokenizer or base.path
    reference = load_model(named)
    if reference.vocab_size != lm.vocab_size:
        raise InputError(
            f"dpo.reference: {config.dpo.reference} has {reference.vocab_size} tokens, the policy "
            f"{lm.vocab_size}; the two must share a vocabulary"
        )
    settle_layout(reference, config.model.layout)
    reference.cast(lm.dtype)
    return reference


def attach_reference(reference: LanguageModel, pairs: list[Group], max_tokens: int) -> None:
    """Fill ``ref_logps`` of every response, in one fixed order, so that a resumed run repeats it exactly."""

    def logps(batch: TreeBatch) -> torch.Tensor:
        return reference.token_logprobs(batch)[0]

    attach(reference, pairs, "ref_logps", logps, max_tokens=max_tokens, divisible=False)
