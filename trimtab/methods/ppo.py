"""Proximal Policy Optimization (Schulman et al., 2017) for language models (Ziegler et al., 2019).

    r_t  = −β·(log π_old(y_t) − log π_ref(y_t)),  and the response's reward at its last token
    Â_t  = Σ_l (γλ)^l·δ_{t+l},   δ_t = r_t + γ·V(s_{t+1}) − V(s_t);     returns = Â + V_old
    ℓ_π  = −min(ρ_t·Â_t, clip(ρ_t, 1−ε, 1+ε)·Â_t) − c·entropy
    ℓ_V  = ½·max((V − R)², (V_old + clip(V − V_old, ±ε_V) − R)²)

``kl_in = "loss"`` leaves the KL out of r_t and adds β·kl to ℓ_π. ``critic.share = "trunk"`` makes V a head on
the policy's trunk and minimises ℓ_π + coefficient·ℓ_V by one optimiser.

Departures from the papers: by default the critic has a trunk and an optimiser of its own, so no coefficient
couples the two losses; advantages are whitened over the whole rollout, not over a mini-batch, so that
micro-batches cannot change them; everything is taken at the sampling temperature.

Feedback: a reward function or a learned reward model (``[reward]``) on what was sampled. With γ = λ = 1,
without whitening, the optimum is π_ref·exp(r/β)/Z: KL inside the reward acts on whole responses.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_prompts
from trimtab.groups import Group
from trimtab.methods.shared.actor_critic import begin, learn
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.critic import Critic, attach_old, load_critic, save_critic
from trimtab.methods.shared.online import attach_logps, say_bases, say_reward
from trimtab.methods.shared.ppo_options import Config
from trimtab.methods.shared.returns import fill_returns, running_moments, set_beta
from trimtab.methods.shared.setup import (
    OnEval,
    Result,
    held_out,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    settle_scalar_layout,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import load_model
from trimtab.models.roles import reference_of
from trimtab.models.scalar_model import ScalarModel
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.state import State
from trimtab.training.update import within_memory


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run PPO. Raises InputError for anything that the user can mend."""
    options, sizes = config.ppo, config.train
    with Run("ppo", config, config.run, sizes) as run, ExitStack() as closing:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        critic = load_critic(config.critic, config.model, lm, seed=sizes.seed + 1)
        if isinstance(critic, ScalarModel):
            run.say(settle_scalar_layout(critic, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(config.data, lm, as_prompts, "a prompt", sizes.seed, response_room=room)
        for line in data.lines:
            run.say(line)
        mixture = build_mixture(config.reward, lm, spread=not options.overlap)
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        reference = reference_of(lm)
        state = begin(config, run, lm, critic)
        reference.cast(lm.dtype)
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        say_reward(run, mixture, lm)
        own = {"critic": critic} if isinstance(critic, ScalarModel) else {}
        held = say_bases(run, {"policy": lm, "reference": reference, **own}, mixture)
        state.controllers["beta"] = options.beta
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups) * options.epochs_per_rollout)
        rollouts = closing.enter_context(
            Rollouts(
                lm, sampler, mixture, data.stream, config, samples=options.samples, ends=ends, total=total
            )
        )

        def ready(groups: list[Group]) -> None:
            # Stage 2: with all networks fixed, token rewards, advantages and the critic's targets.
            within_memory(
                run,
                state,
                lambda tokens: evaluate_rollout(lm, critic, reference, groups, config, tokens),
                times=forward_times(lm, sizes),
            )
            set_beta(options, config, state, total)
            assess(groups, config, state)
            state.controllers["rollouts"] = state.controllers.get("rollouts", 0) + 1

        def learn_from(groups: list[Group]) -> dict[str, float]:
            # Stage 3: policy and critic learn from the rollout, in mini-batches, for some epochs.
            return learn(lm, critic, groups, config, run, state, total)

        def step() -> dict[str, Any]:
            # Stage 1: the policy answers, the reward scores; then the other two.
            return rollouts.step(state, ready, learn_from)

        evaluate = held_out(on_eval, lm, data, state)
        loop(run, state, total, step, evaluate=evaluate, settle=lambda: rollouts.settle(state))
        facts = {
            "model": config.model.path,
            "critic": config.critic.path or config.model.path,
            "critic_share": config.critic.share,
            "models_in_memory": held + rollouts.models,
            "beta": state.controllers["beta"],
            **rollouts.facts(state),
            "feedback_items": len(data.groups),
            "data": data.fingerprints,
        }
        if options.reward_normalise == "running":
            seen = running_moments(state)
            facts |= {"reward_running_mean": seen.mean, "reward_running_std": seen.std}
        leave = functools.partial(save_critic, critic, state, dtype=config.run.save_dtype)
        run.finish(lm, state, facts, beside={"critic": leave} if config.critic.save else None)
        return Result(run.out, lm, state)


def evaluate_rollout(
    lm: LanguageModel,
    critic: Critic,
    reference: LanguageModel,
    groups: list[Group],
    config: Config,
    max_tokens: int,
) -> None:
    """Fill old_ and ref_ log-probabilities and old values: what needs a model."""
    how: dict[str, Any] = {"temperature": config.sampling.temperature, "max_tokens": max_tokens}
    attach_old(lm, critic, groups, **how)
    attach_logps(reference, groups, "ref_logps", **how)


def assess(groups: list[Group], config: Config, state: State) -> None:
    """Fill advantages and returns from what :func:`evaluate_rollout` filled; then the next rollout's β."""
    fill_returns(groups, config.ppo, state)
