"""Where a policy and a critic learn from a rollout whose advantages are fixed: PPO's third stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.batch import TreeBatch
from trimtab.groups import Group
from trimtab.methods.shared.critic import Critic, value_losses
from trimtab.methods.shared.online import accumulate, rollout_metrics, stored
from trimtab.methods.shared.ppo_options import Config
from trimtab.methods.shared.returns import returns_metrics
from trimtab.methods.shared.setup import tokens_of
from trimtab.models.language_model import LanguageModel
from trimtab.models.scalar_model import ScalarModel
from trimtab.models.value_head import ValueHead, logprobs_and_values
from trimtab.objectives.kl import kl_estimate, kl_loss
from trimtab.objectives.policy import clipped_policy_loss
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate, ramp, run_progress
from trimtab.training.state import State
from trimtab.training.update import Update, update

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""An unreduced loss ``[N, T]``, and what is shown of it, each ``[N, T]``."""


@dataclass(frozen=True)
class Now:
    """What moves over a run, as it is at one step."""

    beta: float
    """Weight of a KL in the loss: the rollout's."""
    clips: float = 1.0
    """Multiplies both clips of the ratio."""
    warming: bool = False
    """Only the critic learns."""


def begin(config: Config, run: Run, lm: LanguageModel, critic: Critic) -> State:
    """The state of a new run: one optimiser for the policy and a head on its trunk, or one for each model."""
    if isinstance(critic, ValueHead):
        return run.new_state(lm, beside={"value_head": critic.weight}, beside_lr=config.critic.lr)
    state = run.new_state(lm)
    sizes = config.train.model_copy(update={"lr": config.critic.lr or config.train.lr})
    run.add_role(state, "critic", critic, sizes)
    return state


def learn(
    lm: LanguageModel,
    critic: Critic,
    groups: list[Group],
    config: Config,
    run: Run,
    state: State,
    total: int,
) -> dict[str, float]:
    """One optimiser step of the policy and of the critic on these groups; returns the metrics.

    While the critic warms up alone, what is the policy's (loss, kl, entropy, …) is not there to be shown.
    """
    options = config.ppo
    progress = run_progress(config.train, state.step, total, state.tokens)
    now = Now(
        state.controllers["beta_used"],
        ramp(1.0, options.clip_end, progress, options.clip_shape),
        state.controllers["rollouts"] <= config.critic.warmup_rollouts,
    )
    lr = learning_rate(run.train, state.step, total, state.tokens)
    if isinstance(critic, ValueHead):
        done = _together(lm, critic, groups, config, run, state, lr, now)
        metrics = done.metrics()
        if now.warming and done.done:
            metrics["critic_grad_norm"] = metrics.pop("grad_norm")
            del metrics["loss"]
    else:
        critic_lr = learning_rate(state.others["critic"].config, state.step, total, state.tokens)
        done = _critic_alone(critic, groups, config, run, state, critic_lr)
        names = {"loss": "value_loss", "grad_norm": "critic_grad_norm"}
        metrics = {names.get(key, key): value for key, value in done.metrics().items()}
        if not now.warming:
            done = _policy_alone(lm, groups, config, run, state, lr, now)
            metrics = {**done.metrics(), **metrics}
    if not now.warming:
        lm.version += 1
        metrics["lr"] = lr
        state.tokens += tokens_of(groups) if done.done else 0
    state.step += 1
    if options.clip_end is not None:
        metrics |= {"clip_low": now.clips * options.clip_low, "clip_high": now.clips * options.clip_high}
    return {**metrics, **rollout_metrics(groups, state), **returns_metrics(options, groups, state)}


def _critic_alone(
    critic: ScalarModel, groups: list[Group], config: Config, run: Run, state: State, lr: float
) -> Update:
    """A step of a critic that is a model of its own."""

    def losses(part: list[Group], batch: TreeBatch) -> Losses:
        return value_losses(critic.values(batch), part, batch, clip=config.ppo.value_clip)

    def gradient(tokens: int) -> tuple[float, dict[str, float]]:
        own = state.others["critic"]
        return accumulate(critic, own, groups, losses, max_tokens=tokens, **_reduced(config))

    done = update(run, state, groups, gradient, lr, role="critic")
    critic.version += 1
    return done


def _policy_alone(
    lm: LanguageModel, groups: list[Group], config: Config, run: Run, state: State, lr: float, now: Now
) -> Update:
    """A step of a policy that shares nothing that learns with the critic."""

    def losses(part: list[Group], batch: TreeBatch) -> Losses:
        temperature = batch.temperature(config.sampling.temperature)
        logps_NT, entropy_NT = lm.token_logprobs(batch, temperature=temperature, entropy=True)
        return policy_losses(logps_NT, entropy_NT, part, batch, config, now)

    def gradient(tokens: int) -> tuple[float, dict[str, float]]:
        return accumulate(lm, state.optimiser, groups, losses, max_tokens=tokens, **_reduced(config))

    return update(run, state, groups, gradient, lr)


def _together(
    lm: LanguageModel,
    head: ValueHead,
    groups: list[Group],
    config: Config,
    run: Run,
    state: State,
    lr: float,
    now: Now,
) -> Update:
    """A step of the policy and of a head on its trunk by ℓ_π + coefficient·ℓ_V; warming up, of the head."""

    def losses(part: list[Group], batch: TreeBatch) -> Losses:
        logps_NT, entropy_NT, values_NT = logprobs_and_values(
            lm,
            head,
            batch,
            temperature=batch.temperature(config.sampling.temperature),
            entropy=not now.warming,
            detach=now.warming or config.critic.detach,
        )
        value_loss_NT, shown = value_losses(values_NT, part, batch, clip=config.ppo.value_clip)
        shown["value_loss"] = value_loss_NT.detach()
        loss_NT = config.critic.coefficient * value_loss_NT
        if now.warming:
            return loss_NT, shown
        policy_loss_NT, more = policy_losses(logps_NT, entropy_NT, part, batch, config, now)
        return policy_loss_NT + loss_NT, shown | more

    def gradient(tokens: int) -> tuple[float, dict[str, float]]:
        return accumulate(lm, state.optimiser, groups, losses, max_tokens=tokens, **_reduced(config))

    return update(run, state, groups, gradient, lr)


def _reduced(config: Config) -> dict[str, Any]:
    return {"reduction": config.ppo.reduction, "constant": config.sampling.max_new_tokens}


def policy_losses(
    policy_logps_NT: torch.Tensor,
    entropy_NT: torch.Tensor,
    groups: list[Group],
    batch: TreeBatch,
    config: Config,
    now: Now,
) -> Losses:
    """The policy's loss and what is shown of it.

    An importance weight multiplies all of it: surrogate, KL and bonus are expectations under the policy.
    """
    options = config.ppo
    old_logps_NT, ref_logps_NT, sampler_logps_NT, advantages_NT = (
        stored(batch, groups, field, policy_logps_NT)
        for field in ("old_logps", "ref_logps", "sampler_logps", "token_advantages")
    )
    loss_NT, clipped_NT = clipped_policy_loss(
        policy_logps_NT,
        old_logps_NT,
        advantages_NT,
        clip_low=now.clips * options.clip_low,
        clip_high=now.clips * options.clip_high,
        dual_clip=options.dual_clip,
    )
    if options.kl_in == "loss" and now.beta:
        how: dict[str, Any] = {"estimator": options.estimator, "level": options.kl_level}
        loss_NT = loss_NT + now.beta * kl_loss(policy_logps_NT, ref_logps_NT, batch.mask_NT, **how)
    if options.entropy_bonus:
        loss_NT = loss_NT - options.entropy_bonus * entropy_NT
    importance_NT = config.importance_weights(old_logps_NT, sampler_logps_NT)
    if importance_NT is not None:
        loss_NT = loss_NT * importance_NT
    return loss_NT, {
        "kl": kl_estimate(policy_logps_NT.detach(), ref_logps_NT, "k3"),
        "entropy": entropy_NT.detach(),
        "clip_fraction": clipped_NT.float(),
        "sampler_gap": (old_logps_NT - sampler_logps_NT).abs(),
    }
