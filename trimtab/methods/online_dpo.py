"""Online DPO (Guo et al., 2024, "Direct Language Model Alignment from Online AI Feedback"): sample, judge,
learn.

    y_1, y_2 ~ π(·|x)                                     drawn anew for every step; no gradient through them
    (y_w, y_l) = the judge's order of the two
    ℓ = −log σ(r̂(y_w) − r̂(y_l)),   r̂(y) = β·(log π(y|x) − log π_ref(y|x))            mean over pairs

Feedback: a reward or a judge on the text of what was sampled. Opponents are the policy's own answers, or
those of the reference: then a pair is the tuned model's answer against the model's that it started from.

Log-probabilities are taken at temperature 1 whatever the sampling temperature: the loss is no importance
ratio, π and π_ref are the models that are kept, and the sampling decides only which pairs are seen.

Departures from the paper: more than two samples are allowed; pairs with equal rewards, or of equal tokens,
are dropped, and the mean is over those that are left.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_prompts
from trimtab.groups import Group
from trimtab.methods.shared.ahead import Rollouts
from trimtab.methods.shared.anchor import attach_reference
from trimtab.methods.shared.online import (
    SampledConfig,
    SampleOptions,
    count,
    rollout_metrics,
    say_bases,
    say_reward,
)
from trimtab.methods.shared.pairs import BetaOptions
from trimtab.methods.shared.refreshed import Reference
from trimtab.methods.shared.self_play import (
    Couple,
    Opponents,
    Pairing,
    TwoPlayers,
    compared,
    couples_of,
    learn_couples,
    meetings,
    own_responses,
    win_rate,
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
from trimtab.objectives.preference import PAIR_LOSSES, SMOOTHED
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.training.loop import loop
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import within_memory


class OnlineDPOConfig(SampleOptions, BetaOptions):
    """Online DPO."""

    samples: int = Field(2, ge=2, description="responses to each prompt, of both players together")
    opponents: Opponents = Field(
        "self",
        description="who a response meets: the policy's others, the reference's (which gives half of the "
        "samples, rounded down), or both",
    )
    pairing: Pairing = Field(
        "best_worst", description="pairs of a prompt: the one of the widest gap in reward, or all"
    )
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "exo", "nca", "apo_zero", "apo_down", "sppo"] = Field(
        "sigmoid", description="the formula: see docs/methods/dpo.md"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the judge's labels taken to be wrong (sigmoid, robust, exo)"
    )
    missing_end_penalty: float = Field(
        0.0, ge=0, description="taken from the reward of a response that reached sampling.max_new_tokens"
    )
    refresh_reference_every: int = Field(
        0, ge=0, description="steps after which the policy becomes the reference; 0 never"
    )
    reference_average: float = Field(
        1.0, gt=0, le=1, description="share of the policy in a refreshed reference, the rest is the old one"
    )

    @property
    def challengers(self) -> int:
        """How many of a prompt's responses are the reference's; they come last."""
        return 0 if self.opponents == "self" else self.samples // 2

    @property
    def meets(self) -> list[Couple]:
        """Which places of a group's responses are compared."""
        return meetings(self.samples, self.challengers, self.opponents)

    @model_validator(mode="after")
    def _consistent(self) -> OnlineDPOConfig:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise ValueError(f'label_smoothing has no effect with loss = "{self.loss}"; set it to 0')
        if not self.label_smoothing and self.loss in ("robust", "exo"):
            raise ValueError(f'loss = "{self.loss}" needs a label_smoothing above 0')
        if self.reference_average != 1 and not self.refresh_reference_every:
            raise ValueError("reference_average has no effect without refresh_reference_every")
        if self.opponents == "both" and self.samples < 3:
            raise ValueError('opponents = "both" with two samples is "reference": raise samples')
        if self.pairing == "all" and len(self.meets) == 1:
            raise ValueError('pairing = "all" has no effect where one pair a prompt is all: raise samples')
        if self.overlap and self.opponents != "self":
            raise ValueError(
                f'overlap with opponents = "{self.opponents}" would sample from the reference while it is '
                "computed with: set overlap = false"
            )
        return self


class Config(SampledConfig):
    """Options of ``trimtab online-dpo``."""

    section: ClassVar[str] = "online_dpo"
    online_dpo: OnlineDPOConfig = Field(default_factory=OnlineDPOConfig)

    @model_validator(mode="after")
    def _temperature(self) -> Config:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0 gives a group of equal responses: nothing to compare")
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run online DPO. Raises InputError for anything that the user can mend."""
    options, sizes = config.online_dpo, config.train
    with Run("online-dpo", config, config.run, sizes) as run, ExitStack() as closing:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        room = config.sampling.max_new_tokens
        data = prepare_data(config.data, lm, as_prompts, "a prompt", sizes.seed, response_room=room)
        for line in data.lines:
            run.say(line)
        mixture = build_mixture(config.reward, lm, spread=not options.overlap)
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        reference = Reference(lm, refreshed=options.refresh_reference_every > 0)
        state = run.new_state(lm)
        reference.begin(lm, state, average=options.reference_average)
        sampler, fallback = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
        run.say(fallback)
        if options.challengers:
            sampler = TwoPlayers(sampler, reference.lm, options.challengers)
        say_reward(run, mixture, lm)
        held = say_bases(run, {"policy": lm, "reference": reference.lm}, mixture)
        state = run.resume(state)
        reference.restore(state)
        total = total_steps(sizes, len(data.groups) * options.epochs_per_rollout)
        rollouts = closing.enter_context(
            Rollouts(
                lm, sampler, mixture, data.stream, config, samples=options.samples, ends=ends, total=total
            )
        )

        def ready(groups: list[Group]) -> None:
            penalise(groups, options.missing_end_penalty)
            met = [compared(group, couples_of(group, options.meets, options.pairing))[0] for group in groups]
            trees = [group for group in met if group.responses]
            within_memory(
                run,
                state,
                lambda tokens: attach_reference(reference.lm, trees, tokens),
                times=forward_times(lm, sizes),
            )

        def learn_from(groups: list[Group]) -> dict[str, float]:
            metrics = learn(lm, groups, config, run, state, total)
            if run.due(options.refresh_reference_every, state):
                reference.refresh(lm, state)
            return metrics

        def step() -> dict[str, Any]:
            return rollouts.step(state, ready, learn_from)

        evaluate = held_out(on_eval, lm, data, state)
        loop(run, state, total, step, evaluate=evaluate, settle=lambda: rollouts.settle(state))
        facts = {
            "model": config.model.path,
            "models_in_memory": held + rollouts.models,
            "beta": options.beta,
            **rollouts.facts(state),
            "feedback_items": len(data.groups),
            "pairs": int(state.controllers.get("pairs", 0)),
            "tied_pairs": int(state.controllers.get("tied_pairs", 0)),
            "data": data.fingerprints,
        }
        run.finish(lm, state, facts)
        return Result(run.out, lm, state)


def penalise(groups: list[Group], penalty: float) -> None:
    """Take the penalty from the reward of every response without an end."""
    for response in (r for group in groups for r in group.responses):
        if penalty and response.finish == "length":
            response.reward = (response.reward or 0.0) - penalty


def learn(
    lm: LanguageModel, groups: list[Group], config: Config, run: Run, state: State, total: int
) -> dict[str, float]:
    """One optimiser step on the pairs of these groups; its metrics.

    Without a pair the weights stay, and the samples count as tokens, so that a budget is spent in any case.
    """
    options = config.online_dpo
    trees, couples, ties = [], dict[str, list[Couple]](), 0
    for group in groups:
        ties += len(options.meets) - len(couples_of(group, options.meets, "all"))
        found = couples_of(group, options.meets, options.pairing)
        if found:
            tree, couples[group.id] = compared(group, found)
            trees.append(tree)
    pairs = sum(map(len, couples.values()))
    count(state, "pairs", pairs)
    count(state, "tied_pairs", ties)
    beta = options.beta_at(run.train, state.step, total, state.tokens)
    lr = learning_rate(run.train, state.step, total, state.tokens)
    if trees:
        smoothed = {"label_smoothing": options.label_smoothing} if options.label_smoothing else {}
        loss = functools.partial(PAIR_LOSSES[options.loss], **smoothed)
        metrics = learn_couples(lm, run, state, trees, lambda tree: couples[tree.id], loss, beta, lr)
    else:
        metrics = {"lr": lr}
        state.step, state.tokens = state.step + 1, state.tokens + tokens_of(groups)
    own, theirs = own_responses(groups, options.challengers)
    against = {}
    if theirs:
        against = {
            "win_rate": win_rate(groups, options.challengers),
            "reference_reward": sum(r.reward or 0.0 for r in theirs) / len(theirs),
        }
    shown = {"pairs": pairs, "ties": ties / (len(options.meets) * len(groups)), "beta": beta}
    return {**metrics, **shown, **against, **rollout_metrics(own, state)}
