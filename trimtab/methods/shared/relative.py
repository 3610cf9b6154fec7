"""The loop of the group-relative family: sample groups, score them, learn from the contrast within each.

A method of the family is its named defaults (see ``relative_options``) on this loop. Departures from all of
the papers: ``π_old`` is the trainer's own forward pass, never the sampler's numbers; log-probabilities are
taken at the temperature sampled.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch

from trimtab.batch import TreeBatch
from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_prompts
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.online import (
    accumulate,
    attach_logps,
    rollout_metrics,
    say_bases,
    say_reward,
    stored,
)
from trimtab.methods.shared.refreshed import Reference
from trimtab.methods.shared.relative_advantages import (
    check_rewards,
    fill_advantages,
    has_contrast,
    punishments,
)
from trimtab.methods.shared.relative_options import RelativeConfig
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
from trimtab.objectives.policy import relative_loss
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import update, within_memory

IDLE = "steps_without_a_token"
"""Counted in a row: steps whose responses were all cut off and left out."""
IDLE_STEPS = 20
"""So many of them end the run: it would change nothing, and a token budget would never be spent."""


def train_relative(config: RelativeConfig, *, on_eval: OnEval | None = None) -> Result:
    """Run a method of the family. Raises InputError for anything that the user can mend."""
    options, sizes = config.options, config.train
    method = config.section.replace("_", "-")
    with Run(method, config, config.run, sizes) as run, ExitStack() as closing:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(config.data, lm, as_prompts, "a prompt", sizes.seed, response_room=room)
        for line in data.lines:
            run.say(line)
        mixture = build_mixture(config.reward, lm, spread=not options.overlap)
        check_rewards(mixture, config)
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        reference = None
        if options.beta or options.log_kl:
            reference = Reference(lm, refreshed=options.refresh_reference_every > 0)
        state = run.new_state(lm)
        if reference is not None:
            reference.begin(lm, state, average=options.reference_average)
        anchor = None if reference is None else reference.lm
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        say_reward(run, mixture, lm)
        held = say_bases(run, {"policy": lm, "reference": anchor}, mixture)
        state = run.resume(state)
        if reference is not None:
            reference.restore(state)
        total = total_steps(sizes, len(data.groups) * options.epochs_per_rollout)
        rollouts = closing.enter_context(
            Rollouts(
                lm,
                sampler,
                mixture,
                data.stream,
                config,
                samples=options.group_size,
                ends=ends,
                total=total,
                teaches=(lambda group: has_contrast(group, options)) if options.dynamic_sampling else None,
                max_refills=options.max_refills,
            )
        )

        def ready(groups: list[Group]) -> None:
            within_memory(
                run,
                state,
                lambda tokens: assess(lm, anchor, groups, config, tokens),
                times=forward_times(lm, sizes),
            )

        def learn_from(groups: list[Group]) -> dict[str, float]:
            metrics = learn(lm, groups, config, run, state, total)
            if reference is not None and run.due(options.refresh_reference_every, state):
                reference.refresh(lm, state)
            return metrics

        def step() -> dict[str, Any]:
            return {**rollouts.step(state, ready, learn_from), **_refilled(config, state)}

        evaluate = held_out(on_eval, lm, data, state)
        loop(run, state, total, step, evaluate=evaluate, settle=lambda: rollouts.settle(state))
        facts = {
            "model": config.model.path,
            "models_in_memory": held + rollouts.models,
            "beta": options.beta,
            **rollouts.facts(state),
            "feedback_items": len(data.groups),
            **_refilled(config, state),
            "data": data.fingerprints,
        }
        run.finish(lm, state, facts)
        return Result(run.out, lm, state)


def _refilled(config: RelativeConfig, state: State) -> dict[str, int]:
    if not config.options.dynamic_sampling:
        return {}
    return {"refilled_groups": int(state.controllers.get("refilled_groups", 0))}


def assess(
    lm: LanguageModel,
    reference: LanguageModel | None,
    groups: list[Group],
    config: RelativeConfig,
    max_tokens: int,
) -> None:
    """Fill advantages, and what is needed of reference and old log-probabilities: ready to learn from."""
    options = config.options
    how: dict[str, Any] = {"temperature": config.sampling.temperature, "max_tokens": max_tokens}
    if reference is not None:
        attach_logps(reference, groups, "ref_logps", **how)
    # Groups of the first step are learned from before the policy moves: their old_ is policy_.detach().
    later = groups[len(groups) * config.train.batch_groups // config.rollout :]
    if options.beta and options.kl_in == "reward":
        later = groups
    if later:
        attach_logps(lm, later, "old_logps", **how)
    fill_advantages(groups, config)
    if options.mask_cut_off:
        # Last: what is masked has no log-probabilities, and the KL in the reward needs everybody's.
        for response in (r for group in groups for r in group.responses if r.finish == "length"):
            response.mask = [False] * len(response.tokens or ())


def counted(groups: list[Group]) -> list[Group]:
    """The groups with those responses alone of which a token counts."""
    kept = [
        dataclasses.replace(g, responses=[r for r in g.responses if r.mask is None or any(r.mask)])
        for g in groups
    ]
    return [group for group in kept if group.responses]


def learn(
    lm: LanguageModel, groups: list[Group], config: RelativeConfig, run: Run, state: State, total: int
) -> dict[str, float]:
    """One optimiser step on these groups; returns its metrics."""
    options = config.options
    taught = counted(groups)
    fresh = [r for group in taught for r in group.responses if r.old_logps is None]
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
            taught,
            lambda part, batch: surrogate(lm, part, batch, config, keep_old=keep_old),
            max_tokens=tokens,
            reduction=options.reduction,
            constant=config.constant_length,
            fills=("old_logps",) if keep_old and fresh else (),
        )

    lr = learning_rate(run.train, state.step, total, state.tokens)
    done = update(run, state, groups, gradient, lr)
    if fresh and not done.done:
        forget()
        if keep_old:  # the weights are still those that these groups were taken up with
            how = {"temperature": config.sampling.temperature}
            within_memory(run, state, lambda n: attach_logps(lm, taught, "old_logps", max_tokens=n, **how))
    lm.version += 1
    state.step += 1
    state.tokens += tokens_of(taught) if done.done else 0
    idle = 0 if taught else state.controllers.get(IDLE, 0) + 1
    if taught:
        state.controllers.pop(IDLE, None)
    else:
        state.controllers[IDLE] = idle
    if idle >= IDLE_STEPS:
        raise InputError(
            f"step {state.step}: in each of the last {IDLE_STEPS} steps every response was cut off, and "
            "mask_cut_off leaves those out: nothing is learned; raise sampling.max_new_tokens or set "
            "mask_cut_off to false"
        )
    metrics = {**done.metrics(), **rollout_metrics(groups, state), "advantage_mean": _advantage_mean(groups)}
    if options.supervision == "process":
        without = [not has_contrast(group, options) for group in groups]
        metrics["groups_without_contrast"] = sum(without) / len(without)
    if config.overlong_buffer:
        metrics["overlong_punishment"] = float(punishments(groups, config).mean())
    return {**metrics, "lr": lr}


def _advantage_mean(groups: list[Group]) -> float:
    """Over responses, of each its own advantage or the mean of its tokens'."""
    responses = [r for group in groups for r in group.responses]
    means = (
        r.advantage or 0.0
        if r.token_advantages is None
        else sum(r.token_advantages) / len(r.token_advantages)
        for r in responses
    )
    return sum(means) / len(responses)


def surrogate(
    lm: LanguageModel, groups: list[Group], batch: TreeBatch, config: RelativeConfig, *, keep_old: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective of one micro-batch, unreduced ``[N, T]``, and what is shown of it ``[N, T]``."""
    options = config.options
    responses = [r for group in groups for r in group.responses]
    policy_logps_NT, entropy_NT = lm.token_logprobs(
        batch, temperature=batch.temperature(config.sampling.temperature), entropy=True
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
    if options.supervision == "process":
        advantages = stored(batch, groups, "token_advantages", policy_logps_NT)
    else:
        advantages = torch.tensor([r.advantage for r in responses], dtype=policy_logps_NT.dtype)
    sampler_logps_NT = stored(batch, groups, "sampler_logps", policy_logps_NT)
    loss_NT, clipped_NT, kl_NT = relative_loss(
        policy_logps_NT,
        old_logps_NT,
        ref_logps_NT,
        advantages.to(lm.device),
        batch.mask_NT,
        surrogate=options.surrogate,
        ratio=options.ratio,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        beta=options.beta if options.kl_in == "loss" else 0.0,
        kl_estimator=options.kl_estimator,
        kl_level=options.kl_level,
        kl_unbiased=options.kl_unbiased,
        importance_NT=config.importance_weights(
            old_logps_NT, sampler_logps_NT, mask_NT=batch.mask_NT, level=options.ratio
        ),
    )
    if options.entropy_bonus:
        loss_NT = loss_NT - options.entropy_bonus * entropy_NT
    shown = {
        "kl": kl_NT,
        "entropy": entropy_NT.detach(),
        "clip_fraction": clipped_NT.float(),
        "sampler_gap": (old_logps_NT - sampler_logps_NT).abs(),
    }
    return loss_NT, shown
