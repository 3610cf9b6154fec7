"""Proximal Policy Optimization (Schulman et al., 2017) for language models (Ziegler et al., 2019).

    r_t  = −β·(log π_old(y_t) − log π_ref(y_t)),  and the response's reward at its last token
    Â_t  = Σ_l (γλ)^l·δ_{t+l},   δ_t = r_t + γ·V(s_{t+1}) − V(s_t);     returns = Â + V_old
    ℓ_π  = −min(ρ_t·Â_t, clip(ρ_t, 1−ε, 1+ε)·Â_t) − c·entropy
    ℓ_V  = ½·max((V − R)², (V_old + clip(V − V_old, ±ε_V) − R)²)

Departures from the papers: the critic has a trunk and an optimiser of its own, so no coefficient couples the
two losses; advantages are whitened over the whole rollout, not over a mini-batch, so that micro-batches
cannot change them; everything is taken at the sampling temperature.

Feedback: a reward function or a learned reward model (``[reward]``) on what was sampled. With γ = λ = 1,
without whitening, the optimum is π_ref·exp(r/β)/Z: KL inside the reward acts on whole responses.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.data.chat import end_tokens
from trimtab.data.collate import collate
from trimtab.data.convert import as_prompts
from trimtab.groups import Group
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.critic import CriticConfig, load_critic, value_losses
from trimtab.methods.shared.online import (
    OnlineConfig,
    RolloutOptions,
    accumulate,
    attach_logps,
    next_groups,
    rollout_metrics,
    say_bases,
    say_reward,
    stored,
)
from trimtab.methods.shared.setup import (
    OnEval,
    Result,
    attach,
    held_out,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    settle_scalar_layout,
    tokens_of,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import load_model
from trimtab.models.roles import reference_of
from trimtab.models.scalar_model import ScalarModel
from trimtab.objectives.kl import kl_estimate
from trimtab.objectives.policy import clipped_policy_loss
from trimtab.objectives.reduce import Reduction
from trimtab.objectives.value import gae, token_rewards, whiten
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.training.kl_control import Kind, next_beta
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import update, within_memory


class PPOConfig(RolloutOptions):
    """Proximal Policy Optimization."""

    samples: int = Field(1, ge=1, description="responses sampled for each prompt")
    epochs_per_rollout: int = Field(4, ge=1, description="passes over each rollout")
    beta: float = Field(0.05, ge=0, description="weight of the KL in the token rewards; where it starts")
    kl_control: Kind = Field("fixed", description="how beta follows the measured KL after each rollout")
    kl_target: float = Field(0.1, gt=0, description="KL that the controller aims at, in nats per token")
    kl_horizon: int = Field(
        10_000, ge=1, description="responses over which adaptive control moves beta by about a fifth at most"
    )
    kl_slope: float = Field(1.0, gt=0, description="linear control: rise of beta per excess over the target")
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later token rewards")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's λ: 1 has no bias, lower has less variance")
    value_clip: float = Field(0.2, ge=0, description="how far a value may move in one rollout; 0 no clip")
    whiten: bool = Field(True, description="advantages to mean 0 and variance 1 over the rollout's tokens")
    missing_end_penalty: float = Field(
        1.0, ge=0, description="taken from the reward of a response cut off before its end token"
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="weight of the policy's entropy, which keeps it varied"
    )
    reduction: Reduction = Field("token_mean", description="how token losses become one number")

    @model_validator(mode="after")
    def _consistent(self) -> PPOConfig:
        given = self.model_fields_set
        unused = {
            "fixed": ("kl_target", "kl_horizon", "kl_slope"),
            "adaptive": ("kl_slope",),
            "linear": ("kl_horizon",),
        }[self.kl_control]
        for name in unused:
            if name in given and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} has no effect with kl_control = "{self.kl_control}"')
        if self.kl_control != "fixed" and not self.beta:
            raise ValueError(f'kl_control = "{self.kl_control}" needs beta above 0, where it starts')
        return self


class Config(OnlineConfig):
    """Options of ``trimtab ppo``."""

    section: ClassVar[str] = "ppo"
    critic: CriticConfig = Field(default_factory=CriticConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)

    @model_validator(mode="after")
    def _temperature(self) -> Config:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0 explores nothing: the policy gradient would be 0")
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run PPO. Raises InputError for anything that the user can mend."""
    options, sizes = config.ppo, config.train
    with Run("ppo", config, config.run, sizes) as run, ExitStack() as closing:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        critic = load_critic(config.critic, config.model, lm, seed=sizes.seed + 1)
        run.say(settle_scalar_layout(critic, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(config.data, lm, as_prompts, "a prompt", sizes.seed, response_room=room)
        for line in data.lines:
            run.say(line)
        mixture = build_mixture(config.reward, lm)
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        reference = reference_of(lm)
        state = run.new_state(lm)
        critic_sizes = sizes.model_copy(update={"lr": config.critic.lr or sizes.lr})
        run.add_role(state, "critic", critic, critic_sizes)
        reference.cast(lm.dtype)
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        say_reward(run, mixture, lm)
        held = say_bases(run, {"policy": lm, "reference": reference, "critic": critic}, mixture)
        state.controllers["beta"] = options.beta
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups) * options.epochs_per_rollout)
        rollouts = closing.enter_context(
            Rollouts(
                lm, sampler, mixture, data.stream, config, samples=options.samples, ends=ends, total=total
            )
        )

        def step() -> dict[str, Any]:
            began = time.perf_counter()
            if not state.pending:
                # Stage 1: the policy answers, the reward scores.
                groups = rollouts.take(state)
                # Stage 2: with all networks fixed, token rewards, advantages and the critic's targets.
                within_memory(
                    run,
                    state,
                    lambda tokens: evaluate_rollout(lm, critic, reference, groups, config, tokens),
                    times=forward_times(lm, sizes),
                )
                assess(groups, config, state)
                state.pending, state.controllers["cursor"] = groups, 0
                state.controllers["rollouts"] = state.controllers.get("rollouts", 0) + 1
            sampled_s = time.perf_counter() - began

            # Stage 3: policy and critic learn from the rollout, in mini-batches, for some epochs.
            groups = next_groups(
                state, batch_groups=sizes.batch_groups, rollout=config.rollout, seed=sizes.seed
            )
            metrics = learn(lm, critic, groups, config, run, state, total)
            state.controllers["cursor"] += 1
            if state.controllers["cursor"] >= config.steps_per_rollout:
                state.pending = []
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
            "critic": config.critic.path or config.model.path,
            "models_in_memory": held + rollouts.models,
            "beta": state.controllers["beta"],
            "rewards": [term.name for term in config.reward.terms],
            "generated_tokens": int(state.controllers.get("generated_tokens", 0)),
            "feedback_items": len(data.groups),
            "skipped_groups": int(state.controllers.get("skipped_groups", 0)),
            "data": data.fingerprints,
        }
        run.finish(lm, state, facts)
        return Result(run.out, lm, state)


def evaluate_rollout(
    lm: LanguageModel,
    critic: ScalarModel,
    reference: LanguageModel,
    groups: list[Group],
    config: Config,
    max_tokens: int,
) -> None:
    """Fill old_ and ref_ log-probabilities and old values: what needs a model."""
    how: dict[str, Any] = {"temperature": config.sampling.temperature, "max_tokens": max_tokens}
    attach_logps(lm, groups, "old_logps", **how)
    attach_logps(reference, groups, "ref_logps", **how)
    attach(critic, groups, "old_values", critic.values, max_tokens=max_tokens, divisible=True)


def assess(groups: list[Group], config: Config, state: State) -> None:
    """Fill advantages and returns from what :func:`evaluate_rollout` filled; then the next rollout's β."""
    options = config.ppo
    # One table of the whole rollout, in fp64: whitening needs all of it.
    batch = collate(groups, layout="plain")
    like = torch.zeros((), dtype=torch.float64)
    old_logps_NT, ref_logps_NT, values_NT = (
        stored(batch, groups, field, like) for field in ("old_logps", "ref_logps", "old_values")
    )
    responses = [r for group in groups for r in group.responses]
    penalty = options.missing_end_penalty
    rewards_N = torch.tensor(
        [(r.reward or 0.0) - penalty * (r.finish == "length") for r in responses], dtype=torch.float64
    )
    beta = state.controllers["beta"]
    rewards_NT, kl_NT = token_rewards(rewards_N, old_logps_NT, ref_logps_NT, batch.mask_NT, beta=beta)
    advantages_NT, returns_NT = gae(
        rewards_NT, values_NT, batch.mask_NT, gamma=options.gamma, lam=options.lam
    )
    if options.whiten:
        advantages_NT = whiten(advantages_NT, batch.mask_NT)
    for response, advantages, returns in zip(
        responses, batch.ragged(advantages_NT), batch.ragged(returns_NT), strict=True
    ):
        response.token_advantages, response.returns = advantages, returns
    left = (returns_NT - values_NT)[batch.mask_NT].var(correction=0)
    spread = returns_NT[batch.mask_NT].var(correction=0)
    state.controllers["explained_variance"] = float(1 - left / spread) if spread > 0 else 0.0
    state.controllers["beta_used"] = beta
    state.controllers["rollout_kl"] = float(kl_NT[batch.mask_NT].mean())
    state.controllers["beta"] = next_beta(
        beta,
        state.controllers["rollout_kl"],
        kind=options.kl_control,
        start=options.beta,
        target=options.kl_target,
        horizon=options.kl_horizon,
        items=len(responses),
        slope=options.kl_slope,
    )


def learn(
    lm: LanguageModel,
    critic: ScalarModel,
    groups: list[Group],
    config: Config,
    run: Run,
    state: State,
    total: int,
) -> dict[str, float]:
    """One optimiser step of the policy and one of the critic on these groups; returns the metrics.

    While the critic warms up alone, what is the policy's (loss, kl, entropy, …) is not there to be shown.
    """
    options = config.ppo
    how: dict[str, Any] = {"reduction": options.reduction, "constant": config.sampling.max_new_tokens}
    theirs = state.others["critic"]

    def of_values(tokens: int) -> tuple[float, dict[str, float]]:
        def losses(part: list[Group], batch: TreeBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return value_losses(critic, part, batch, clip=options.value_clip)

        return accumulate(critic, theirs, groups, losses, max_tokens=tokens, **how)

    def of_policy(tokens: int) -> tuple[float, dict[str, float]]:
        def losses(part: list[Group], batch: TreeBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return policy_losses(lm, part, batch, config)

        return accumulate(lm, state.optimiser, groups, losses, max_tokens=tokens, **how)

    lr = learning_rate(theirs.config, state.step, total, state.tokens)
    done = update(run, state, groups, of_values, lr, role="critic")
    critic.version += 1
    names = {"loss": "value_loss", "grad_norm": "critic_grad_norm"}
    metrics = {names.get(key, key): value for key, value in done.metrics().items()}
    if state.controllers["rollouts"] > config.critic.warmup_rollouts:
        lr = learning_rate(run.train, state.step, total, state.tokens)
        done = update(run, state, groups, of_policy, lr)
        lm.version += 1
        metrics = {**done.metrics(), **metrics, "lr": lr}
        state.tokens += tokens_of(groups) if done.done else 0
    state.step += 1
    advantages = [a for group in groups for r in group.responses for a in r.token_advantages or []]
    return {
        **metrics,
        **rollout_metrics(groups, state),
        "advantage_mean": sum(advantages) / max(len(advantages), 1),
        "beta": state.controllers["beta_used"],
        "rollout_kl": state.controllers["rollout_kl"],
        "explained_variance": state.controllers["explained_variance"],
    }


def policy_losses(
    lm: LanguageModel, groups: list[Group], batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy's unreduced loss ``[N, T]`` and what is shown of it."""
    options = config.ppo
    policy_logps_NT, entropy_NT = lm.token_logprobs(
        batch, temperature=config.sampling.temperature, entropy=True
    )
    old_logps_NT, ref_logps_NT, sampler_logps_NT, advantages_NT = (
        stored(batch, groups, field, policy_logps_NT)
        for field in ("old_logps", "ref_logps", "sampler_logps", "token_advantages")
    )
    loss_NT, clipped_NT = clipped_policy_loss(
        policy_logps_NT, old_logps_NT, advantages_NT, clip_low=options.clip_low, clip_high=options.clip_high
    )
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
