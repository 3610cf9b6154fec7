"""From the rewards of a rollout to advantages and the critic's targets (PPO): all networks fixed.

The order, each step left out where its option says so:

    1. r ← (r − mean)/std                     reward_normalise: of this rollout, or of all rewards so far
    2. r ← clip(r, ±c)                        reward_clip
    3. r ← r − penalty                        missing_end_penalty, of a response that was cut off
    4. r_t = −β·kl_t, and + r at the end      kl_in = "reward"
    5. r_t ← r_t / std, the mean kept         whiten_rewards, over the rollout's tokens
    6. Â_t and R_t by GAE
    7. Â_t ← (Â_t − mean)/std                 whiten, over the rollout's tokens; R_t stays as it is

The penalty comes after the clip, which would hide it. The KL is in nats and the reward in the unit that 1
leaves it in: β stands between the two.
"""

from __future__ import annotations

import torch

from trimtab.data.collate import collate
from trimtab.groups import Group, Response
from trimtab.methods.shared.online import OnlineConfig, stored
from trimtab.methods.shared.ppo_options import PPOConfig
from trimtab.objectives.value import Moments, gae, token_rewards, whiten
from trimtab.training.kl_control import next_beta
from trimtab.training.schedule import ramp, run_progress
from trimtab.training.state import State

SEEN = "rewards_seen/"
"""Prefix, in a checkpoint's controllers, of the moments of all rewards so far."""


def set_beta(options: PPOConfig, config: OnlineConfig, state: State, total: int) -> None:
    """β of the rollout that is taken up now, where it follows the course of the run."""
    if options.beta_end is not None:
        progress = run_progress(config.train, state.step, total, state.tokens)
        state.controllers["beta"] = ramp(options.beta, options.beta_end, progress, options.beta_shape)


def fill_returns(groups: list[Group], options: PPOConfig, state: State) -> None:
    """Fill ``token_advantages`` and ``returns`` from rewards, log-probabilities and values; the next β."""
    # One table of the whole rollout, in fp64: whitening needs all of it.
    batch = collate(groups, layout="plain")
    like = torch.zeros((), dtype=torch.float64)
    old_logps_NT, ref_logps_NT, values_NT = (
        stored(batch, groups, field, like) for field in ("old_logps", "ref_logps", "old_values")
    )
    responses = [r for group in groups for r in group.responses]
    beta = state.controllers["beta"]
    rewards_NT, _ = token_rewards(
        shaped_rewards(responses, options, state),
        old_logps_NT,
        ref_logps_NT,
        batch.mask_NT,
        beta=beta if options.kl_in == "reward" else 0.0,
        estimator=options.estimator if options.kl_in == "reward" else "k1",
    )
    if options.whiten_rewards:
        rewards_NT = whiten(rewards_NT, batch.mask_NT, shift_mean=False)
    advantages_NT, returns_NT = gae(
        rewards_NT, values_NT, batch.mask_NT, gamma=options.gamma, lam=options.lam
    )
    if options.whiten != "none":
        advantages_NT = whiten(advantages_NT, batch.mask_NT, shift_mean=options.whiten == "full")
    for response, advantages, returns in zip(
        responses, batch.ragged(advantages_NT), batch.ragged(returns_NT), strict=True
    ):
        response.token_advantages, response.returns = advantages, returns
    left = (returns_NT - values_NT)[batch.mask_NT].var(correction=0)
    spread = returns_NT[batch.mask_NT].var(correction=0)
    state.controllers["explained_variance"] = float(1 - left / spread) if spread > 0 else 0.0
    state.controllers["beta_used"] = beta
    # Whatever estimator is charged, control follows the plain mean of log π − log π_ref.
    state.controllers["rollout_kl"] = float((old_logps_NT - ref_logps_NT)[batch.mask_NT].mean())
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


def shaped_rewards(responses: list[Response], options: PPOConfig, state: State) -> torch.Tensor:
    """The rewards as they enter the token rewards, fp64 ``[N]``: normalised, clipped, less the penalty.

    Running moments take in this rollout first, so that the first one is not divided by nothing.
    """
    rewards = [response.reward or 0.0 for response in responses]
    rewards_N = torch.tensor(rewards, dtype=torch.float64)
    if options.reward_normalise != "none":
        before = running_moments(state) if options.reward_normalise == "running" else Moments()
        moments = before.seeing(rewards)
        rewards_N = moments.scaled(rewards_N)
        if options.reward_normalise == "running":
            for name in ("count", "mean", "squares"):
                state.controllers[SEEN + name] = getattr(moments, name)
    if options.reward_clip:
        clipped_N = rewards_N.clamp(-options.reward_clip, options.reward_clip)
        state.controllers["reward_clip_fraction"] = float((clipped_N != rewards_N).double().mean())
        rewards_N = clipped_N
    cut_off_N = torch.tensor([response.finish == "length" for response in responses])
    return rewards_N - options.missing_end_penalty * cut_off_N.double()


def running_moments(state: State) -> Moments:
    """Of all rewards that the run has seen, under ``reward_normalise = "running"``."""
    return Moments(*(state.controllers.get(SEEN + name, 0.0) for name in ("count", "mean", "squares")))


def returns_metrics(options: PPOConfig, groups: list[Group], state: State) -> dict[str, float]:
    """What is shown of the rollout that a step learns from."""
    advantages = [a for group in groups for r in group.responses for a in r.token_advantages or []]
    shown = {
        "advantage_mean": sum(advantages) / max(len(advantages), 1),
        "beta": state.controllers["beta_used"],
        "rollout_kl": state.controllers["rollout_kl"],
        "explained_variance": state.controllers["explained_variance"],
    }
    if options.reward_clip:
        shown["reward_clip_fraction"] = state.controllers["reward_clip_fraction"]
    if options.reward_normalise == "running":
        shown["reward_running_std"] = running_moments(state).std
    return shown
