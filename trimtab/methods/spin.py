"""Self-Play Fine-Tuning (SPIN; Chen et al., 2024): demonstrations against the model's own answers.

    y_w ~ people,  y_l ~ π_t(·|x)
    ℓ = −log σ(β·log(π(y_w|x)/π_t(y_w|x)) − β·log(π(y_l|x)/π_t(y_l|x)))        mean over pairs

Iteration t starts with the opponent π_t = the policy as it then is (at t = 0 the model that the run starts
from), which answers the prompts anew and is the reference of the iteration. From the second iteration on the
samples of the one before are learned from as well, as in the paper.

Feedback: demonstrations. At an iteration's start opponent, reference and policy are one model: samples and
reference log-probabilities are computed then, and kept with the pairs, so one model is in memory throughout.

Departures from the paper: AdamW in place of RMSProp; the prompts of every iteration are drawn from the data's
one endless order, all of them unless ``iteration_groups`` says fewer.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_demonstrations
from trimtab.data.sources import Stream
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.anchor import attach_reference
from trimtab.methods.shared.online import count
from trimtab.methods.shared.scored import draw
from trimtab.methods.shared.self_play import learn_couples
from trimtab.methods.shared.setup import (
    MethodConfig,
    OnEval,
    Result,
    held_out,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.models.load import load_model
from trimtab.objectives.preference import PAIR_LOSSES
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import Sampler, SamplingConfig
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import within_memory


class SPINConfig(Section):
    """Self-Play Fine-Tuning."""

    beta: float = Field(0.1, gt=0, description="strength of the anchor to the iteration's opponent (λ)")
    loss: Literal["sigmoid", "hinge"] = Field(
        "sigmoid", description="the convex loss of the margin: logistic, or max(0, 1 − margin)"
    )
    iterations: int = Field(4, ge=1, description="times that the policy becomes the opponent")
    iteration_groups: int = Field(
        0, ge=0, description="demonstrations drawn for each iteration; 0 takes as many as there are"
    )
    steps_per_iteration: int = Field(
        0, ge=0, description="optimiser steps in each iteration; 0 shares out train.steps, or counts epochs"
    )
    keep_previous: bool = Field(
        True, description="from the second iteration on, learn from the samples of the one before as well"
    )
    restart: bool = Field(
        True, description="begin every iteration with a new optimiser and learning rate schedule"
    )
    beta_by_iteration: list[float] = Field([], description="β of each iteration, in place of beta")
    lr_by_iteration: list[float] = Field([], description="peak rate of each iteration, in place of train.lr")

    @model_validator(mode="after")
    def _consistent(self) -> SPINConfig:
        for name in ("beta_by_iteration", "lr_by_iteration"):
            values = getattr(self, name)
            if values and len(values) != self.iterations:
                raise ValueError(f"{name} has {len(values)} values for {self.iterations} iterations")
            if any(value <= 0 for value in values):
                raise ValueError(f"{name}: every value must be above 0")
        if self.beta_by_iteration and self.beta != 0.1:
            raise ValueError("beta has no effect with beta_by_iteration; remove one")
        if self.iterations == 1 and not (self.keep_previous and self.restart):
            raise ValueError("keep_previous and restart have no effect with iterations = 1")
        return self


class Config(MethodConfig):
    """Options of ``trimtab spin``."""

    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    spin: SPINConfig = Field(default_factory=SPINConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        options, sizes = self.spin, self.train
        if options.steps_per_iteration and sizes.steps:
            raise ValueError("train.steps has no effect with spin.steps_per_iteration; remove one")
        if options.steps_per_iteration and sizes.epochs != 1.0:
            raise ValueError("train.epochs has no effect with spin.steps_per_iteration; remove one")
        if options.lr_by_iteration and sizes.lr != 1e-6:
            raise ValueError("train.lr has no effect with spin.lr_by_iteration; remove one")
        if 0 < sizes.steps < options.iterations:
            raise ValueError(f"train.steps = {sizes.steps} is fewer than spin.iterations")
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run SPIN. Raises InputError for anything that the user can mend."""
    options, sizes = config.spin, config.train
    with Run("spin", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(
            config.data, lm, as_demonstrations, "a demonstration", sizes.seed, response_room=room
        )
        for line in data.lines:
            run.say(line)
        run.say(longer_than_samples(data.groups, room))
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        lengths = iteration_lengths(config, len(data.groups))
        state = run.new_state(lm)
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        state = run.resume(state)

        def step() -> dict[str, Any]:
            began = time.perf_counter()
            t, at = place(lengths, state.step)
            if at == 0:
                new_iteration(t, lm, sampler, data.stream, len(data.groups), config, run, state, ends)
            sampled_s = time.perf_counter() - began
            pairs = pairs_of_step(state.pending, t, at, sizes.batch_groups, sizes.seed)
            beta = options.beta_by_iteration[t] if options.beta_by_iteration else options.beta
            metrics = learn_couples(
                lm,
                run,
                state,
                pairs,
                lambda pair: [(0, 1)],
                PAIR_LOSSES[options.loss],
                beta,
                rate_of_step(config, lengths, state),
            )
            return {
                **metrics,
                "iteration": t,
                "beta": beta,
                **sampled_metrics(pairs),
                "epoch": data.stream.epoch(state.position),
                "generated_tokens": int(state.controllers["generated_tokens"]),
                "sampling_s": sampled_s,
                "step_s": time.perf_counter() - began,
            }

        loop(run, state, sum(lengths), step, evaluate=held_out(on_eval, lm, data, state))
        facts = {
            "model": config.model.path,
            "models_in_memory": 1,
            "beta": options.beta_by_iteration or options.beta,
            "iterations": options.iterations,
            "generated_tokens": int(state.controllers.get("generated_tokens", 0)),
            "feedback_items": len(data.groups),
            "data": data.fingerprints,
        }
        run.finish(lm, state, facts)
        return Result(run.out, lm, state)


def iteration_lengths(config: Config, demonstrations: int) -> list[int]:
    """Optimiser steps of each iteration. Raises InputError for a warm-up that fills one."""
    options, sizes = config.spin, config.train
    drawn, times = options.iteration_groups or demonstrations, options.iterations
    if options.steps_per_iteration:
        lengths = [options.steps_per_iteration] * times
    elif sizes.steps:
        lengths = [sizes.steps * (t + 1) // times - sizes.steps * t // times for t in range(times)]
    else:
        both = [drawn * (2 if t and options.keep_previous else 1) for t in range(times)]
        lengths = [max(1, math.ceil(sizes.epochs * pairs / sizes.batch_groups)) for pairs in both]
    if options.restart and sizes.warmup_steps >= max(min(lengths), 2):
        raise InputError(
            f"train.warmup_steps = {sizes.warmup_steps} fills an iteration of {min(lengths)} steps, and "
            "each has a warm-up of its own: lower it, or set spin.restart = false"
        )
    return lengths


def place(lengths: list[int], step: int) -> tuple[int, int]:
    """The iteration of optimiser step ``step``, and which of its steps that is, both from 0."""
    for t, length in enumerate(lengths):
        if step < length:
            return t, step
        step -= length
    raise ValueError("the run has no such step")


def new_iteration(
    t: int,
    lm: LanguageModel,
    sampler: Sampler,
    stream: Stream,
    demonstrations: int,
    config: Config,
    run: Run,
    state: State,
    ends: list[int],
) -> None:
    """The policy becomes opponent and reference: its answers to the next prompts, paired and ready."""
    options = config.spin
    shown = stream.batch(state.position, options.iteration_groups or demonstrations)
    state.position += len(shown)
    how: dict[str, Any] = {"ends": ends, "seed": config.train.seed, "step": state.step}
    sampled = draw(lm, sampler, shown, 1, config.sampling, **how)
    fresh = [pair_of(one, other) for one, other in zip(shown, sampled, strict=True)]
    count(state, "generated_tokens", sum(len(pair.rejected.tokens or ()) for pair in fresh))
    last = state.pending[: int(state.controllers.get("fresh", 0))] if options.keep_previous else []
    pairs = fresh + last
    # Also of pairs kept from the last iteration: their reference is this iteration's opponent.
    within_memory(
        run, state, lambda tokens: attach_reference(lm, pairs, tokens), times=forward_times(lm, run.train)
    )
    state.pending, state.controllers["fresh"] = pairs, len(fresh)
    if options.restart:
        state.optimiser.adam.state.clear()


def pair_of(demonstration: Group, sampled: Group) -> Group:
    """The demonstration, chosen, and the opponent's answer, rejected."""
    [given], [answer] = demonstration.responses, sampled.responses
    return dataclasses.replace(
        demonstration,
        responses=[
            dataclasses.replace(given, preferred=True),
            dataclasses.replace(answer, preferred=False, sampler_logps=None),
        ],
    )


def pairs_of_step(pairs: list[Group], t: int, at: int, size: int, seed: int) -> list[Group]:
    """The pairs of an iteration's step ``at``: pass after pass, each in an order of its own."""
    chosen, orders = [], dict[int, list[int]]()
    for k in range(at * size, (at + 1) * size):
        turn, spot = divmod(k, len(pairs))
        if turn not in orders:
            orders[turn] = list(range(len(pairs)))
            random.Random(f"{seed}/{t}/{turn}").shuffle(orders[turn])
        chosen.append(pairs[orders[turn][spot]])
    return chosen


def rate_of_step(config: Config, lengths: list[int], state: State) -> float:
    """The learning rate: over the iteration with ``restart``, else over the run."""
    options, sizes = config.spin, config.train
    t, at = place(lengths, state.step)
    if options.lr_by_iteration:
        sizes = sizes.model_copy(update={"lr": options.lr_by_iteration[t]})
    if options.restart:
        # A token budget is the run's: it ends an iteration's schedule, and does not bend it.
        return learning_rate(sizes.model_copy(update={"token_budget": 0}), at, lengths[t])
    return learning_rate(sizes, state.step, sum(lengths), state.tokens)


def longer_than_samples(groups: list[Group], room: int) -> str | None:
    """A line on demonstrations that no sample could be as long as; None where there is none."""
    longer = sum(len(group.responses[0].tokens or ()) > room for group in groups)
    if not longer:
        return None
    return (
        f"{longer:,} of {len(groups):,} demonstrations are longer than sampling.max_new_tokens = {room}: "
        "their opponents are cut off, which alone tells the two apart"
    )


def sampled_metrics(pairs: list[Group]) -> dict[str, float]:
    """Shares of the step's samples: cut off, and equal to their demonstration (which teaches nothing)."""
    answers = [(pair.chosen, pair.rejected) for pair in pairs]
    return {
        "cut_off": sum(answer.finish == "length" for _, answer in answers) / len(answers),
        "copies": sum(given.tokens == answer.tokens for given, answer in answers) / len(answers),
    }
