"""Group Relative Policy Optimization (DeepSeekMath, 2024): sample a group, learn from its contrast.

    A_i  = (r_i − mean(r)) / (std(r) + ε)                        over the G responses to one prompt
    ρ_t  = exp(log π(y_t) − log π_old(y_t))
    ℓ_t  = −min(ρ_t·A_i, clip(ρ_t, 1−ε_low, 1+ε_high)·A_i) + β·KL_t

Departures from the paper: the standard deviation is the population's (÷G); ``π_old`` is the trainer's own
forward pass, never the sampler's numbers; everything is taken at the sampling temperature.

Feedback: a reward function on the text of what was sampled. What KL in the loss converges to depends on the
estimator; see ``objectives/kl.py`` and docs/methods/grpo.md.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_prompts
from trimtab.groups import Group
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.online import (
    OnlineConfig,
    RolloutOptions,
    accumulate,
    attach_logps,
    next_groups,
    refresh_reference,
    restore_reference,
    rollout_metrics,
    say_bases,
    say_reward,
    stored,
)
from trimtab.methods.shared.setup import (
    OnEval,
    Result,
    held_out,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    tokens_of,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import load_model
from trimtab.models.roles import reference_of
from trimtab.objectives.advantages import Baseline, Scale, group_advantages
from trimtab.objectives.kl import Estimator, Level
from trimtab.objectives.policy import grpo_loss
from trimtab.objectives.reduce import Reduction
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import update, within_memory


class GRPOConfig(RolloutOptions):
    """Group Relative Policy Optimization."""

    group_size: int = Field(8, ge=2, description="responses sampled for each prompt (G)")
    beta: float = Field(0.04, ge=0, description="weight of the KL term in the loss; 0 leaves it out")
    kl_estimator: Estimator = Field("k3", description="estimator of the KL term; decides the optimum")
    kl_level: Level = Field("token", description="KL of each token's distribution, or of the whole response")
    baseline: Baseline = Field("group_mean", description="what a reward is compared with")
    scale: Scale = Field("std", description="what an advantage is divided by")
    reduction: Reduction = Field("response_mean", description="how token losses become one number")
    constant_length: int = Field(
        0, ge=0, description="divisor of reduction = constant; 0 takes sampling.max_new_tokens"
    )
    refresh_reference_every: int = Field(
        0, ge=0, description="steps after which the policy becomes the reference; 0 never"
    )
    log_kl: bool = Field(True, description="keep a reference for the log even where beta is 0")

    @model_validator(mode="after")
    def _consistent(self) -> GRPOConfig:
        if self.constant_length and self.reduction != "constant":
            raise ValueError('constant_length has no effect without reduction = "constant"')
        if not self.beta and (self.kl_estimator != "k3" or self.kl_level != "token"):
            raise ValueError("kl_estimator and kl_level have no effect with beta = 0")
        if self.beta and self.kl_estimator == "k1":
            raise ValueError(
                'kl_estimator = "k1" has no gradient in expectation, so it anchors nothing: use "k2" or "k3"'
            )
        if self.beta and not self.log_kl:
            raise ValueError("log_kl = false has no effect with beta above 0")
        if self.refresh_reference_every and not (self.beta or self.log_kl):
            raise ValueError("refresh_reference_every has no effect with beta = 0 and log_kl = false")
        return self


class Config(OnlineConfig):
    """Options of ``trimtab grpo``."""

    section: ClassVar[str] = "grpo"
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)

    @model_validator(mode="after")
    def _temperature(self) -> Config:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0 gives a group of equal responses: nothing to compare")
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run GRPO. Raises InputError for anything that the user can mend."""
    options, sizes = config.grpo, config.train
    with Run("grpo", config, config.run, sizes) as run, ExitStack() as closing:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(config.data, lm, as_prompts, "a prompt", sizes.seed, response_room=room)
        for line in data.lines:
            run.say(line)
        mixture = build_mixture(config.reward, lm)
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        reference = None
        if options.beta or options.log_kl:
            reference = reference_of(lm, own=options.refresh_reference_every > 0)
        state = run.new_state(lm)
        if reference is not None:
            reference.cast(lm.dtype)
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        say_reward(run, mixture, lm)
        held = say_bases(run, {"policy": lm, "reference": reference}, mixture)
        state = run.resume(state)
        restore_reference(reference, state)
        total = total_steps(sizes, len(data.groups) * options.epochs_per_rollout)
        rollouts = closing.enter_context(
            Rollouts(
                lm, sampler, mixture, data.stream, config, samples=options.group_size, ends=ends, total=total
            )
        )

        def step() -> dict[str, Any]:
            began = time.perf_counter()
            if not state.pending:
                groups = rollouts.take(state)
                within_memory(
                    run,
                    state,
                    lambda tokens: assess(lm, reference, groups, config, tokens),
                    times=forward_times(lm, sizes),
                )
                state.pending, state.controllers["cursor"] = groups, 0
            sampled_s = time.perf_counter() - began

            groups = next_groups(
                state, batch_groups=sizes.batch_groups, rollout=config.rollout, seed=sizes.seed
            )
            metrics = learn(lm, groups, config, run, state, total)
            state.controllers["cursor"] += 1
            if state.controllers["cursor"] >= config.steps_per_rollout:
                state.pending = []
            if reference is not None and run.due(options.refresh_reference_every, state):
                refresh_reference(reference, lm, state)
            return {
                **metrics,
                "epoch": data.stream.epoch(state.position),
                "generated_tokens": int(state.controllers["generated_tokens"]),
                "sampling_s": sampled_s,
                "reward_wait_s": rollouts.reward_wait_s(),
                "step_s": time.perf_counter() - began,
            }

        evaluate = held_out(on_eval, lm, data, state)
        loop(run, state, total, step, evaluate=evaluate, settle=lambda: rollouts.settle(state))
        facts = {
            "model": config.model.path,
            "models_in_memory": held + rollouts.models,
            "beta": options.beta,
            "rewards": [term.name for term in config.reward.terms],
            "generated_tokens": int(state.controllers.get("generated_tokens", 0)),
            "feedback_items": len(data.groups),
            "skipped_groups": int(state.controllers.get("skipped_groups", 0)),
            "data": data.fingerprints,
        }
        run.finish(lm, state, facts)
        return Result(run.out, lm, state)


def assess(
    lm: LanguageModel,
    reference: LanguageModel | None,
    groups: list[Group],
    config: Config,
    max_tokens: int,
) -> None:
    """Fill advantages, and what is needed of reference and old log-probabilities: ready to learn from."""
    options = config.grpo
    rewards_PG = torch.tensor([[r.reward for r in g.responses] for g in groups], dtype=torch.float64)
    advantages_PG = group_advantages(rewards_PG, baseline=options.baseline, scale=options.scale)
    for group, row in zip(groups, advantages_PG.tolist(), strict=True):
        for response, advantage in zip(group.responses, row, strict=True):
            response.advantage = advantage
    how: dict[str, Any] = {"temperature": config.sampling.temperature, "max_tokens": max_tokens}
    if reference is not None:
        attach_logps(reference, groups, "ref_logps", **how)
    # Groups of the first step are learned from before the policy moves: their old_ is policy_.detach().
    later = groups[len(groups) * config.train.batch_groups // config.rollout :]
    if later:
        attach_logps(lm, later, "old_logps", **how)


def learn(
    lm: LanguageModel, groups: list[Group], config: Config, run: Run, state: State, total: int
) -> dict[str, float]:
    """One optimiser step on these groups; returns its metrics."""
    options = config.grpo
    responses = [r for group in groups for r in group.responses]
    fresh = [response for response in responses if response.old_logps is None]
    # Another optimiser step will have changed the policy before these groups come up again.
    keep_old = config.steps_per_rollout > 1

    def forget() -> None:
        for response in fresh:
            response.old_logps = None

    def gradient(tokens: int) -> tuple[float, dict[str, float]]:
        forget()  # what a pass kept that was broken off
        return accumulate(
            lm,
            state.optimiser,
            groups,
            lambda part, batch: surrogate(lm, part, batch, config, keep_old=keep_old),
            max_tokens=tokens,
            reduction=options.reduction,
            constant=options.constant_length or config.sampling.max_new_tokens,
        )

    lr = learning_rate(run.train, state.step, total, state.tokens)
    done = update(run, state, groups, gradient, lr)
    if fresh and not done.done:
        forget()
        if keep_old:  # the weights are still those that these groups were taken up with
            how = {"temperature": config.sampling.temperature}
            within_memory(run, state, lambda n: attach_logps(lm, groups, "old_logps", max_tokens=n, **how))
    lm.version += 1
    state.step += 1
    state.tokens += tokens_of(groups) if done.done else 0
    return {
        **done.metrics(),
        **rollout_metrics(groups, state),
        "advantage_mean": sum(r.advantage or 0.0 for r in responses) / len(responses),
        "lr": lr,
    }


def surrogate(
    lm: LanguageModel, groups: list[Group], batch: TreeBatch, config: Config, *, keep_old: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective of one micro-batch, unreduced ``[N, T]``, and what is shown of it ``[N, T]``."""
    options = config.grpo
    responses = [r for group in groups for r in group.responses]
    policy_logps_NT, entropy_NT = lm.token_logprobs(
        batch, temperature=config.sampling.temperature, entropy=True
    )
    if responses[0].old_logps is None:
        old_logps_NT = policy_logps_NT.detach()
        if keep_old:
            for response, row in zip(responses, batch.ragged(old_logps_NT), strict=True):
                response.old_logps = row
    else:
        old_logps_NT = stored(batch, groups, "old_logps", policy_logps_NT)
    ref_logps_NT = None
    if responses[0].ref_logps is not None:
        ref_logps_NT = stored(batch, groups, "ref_logps", policy_logps_NT)
    advantages_N = torch.tensor([r.advantage for r in responses], dtype=policy_logps_NT.dtype)
    sampler_logps_NT = stored(batch, groups, "sampler_logps", policy_logps_NT)
    loss_NT, clipped_NT, kl_NT = grpo_loss(
        policy_logps_NT,
        old_logps_NT,
        ref_logps_NT,
        advantages_N.to(lm.device),
        batch.mask_NT,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        beta=options.beta,
        kl_estimator=options.kl_estimator,
        kl_level=options.kl_level,
        importance_NT=config.importance_weights(old_logps_NT, sampler_logps_NT),
    )
    shown = {
        "kl": kl_NT,
        "entropy": entropy_NT.detach(),
        "clip_fraction": clipped_NT.float(),
        "sampler_gap": (old_logps_NT - sampler_logps_NT).abs(),
    }
    return loss_NT, shown
