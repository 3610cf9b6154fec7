"""The small run before the large one: how much, what to watch, when to stop, when to change the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.planning.choosing.decide import Choice
from trimtab.planning.choosing.needs import ONLINE, PAIRWISE, RELATIVE, REWARDS
from trimtab.planning.choosing.situation import HELD_OUT, Situation
from trimtab.planning.choosing.sources import SECTION, rows_of

PILOT_ROWS = 2_000
"""Rows that a pilot of a method on given feedback learns from; our judgement."""
PILOT_STEPS = 50
"""Steps of a pilot of a method that samples; our judgement: in the newsroom rewards had moved by step 20."""

Watched = tuple[str, str]
"""A metric, as the run logs it, and what to see in it."""

PREFERENCE: tuple[Watched, ...] = (
    ("eval_accuracy_implicit_reward", "rises above 0.5, with its interval"),
    ("reward_margin", "rises; alone, without held-out accuracy, it is learning by heart"),
    ("chosen_reward", "may fall below 0; many nats down while accuracy stands still is too far"),
    ("response_tokens", "the data's lengths: compare them with the answers' in trimtab eval"),
)
SAMPLED: tuple[Watched, ...] = (
    ("reward_mean", "rises: the curve to watch"),
    ("groups_without_contrast", "below 0.5, or prompts are too easy or too hard"),
    ("kl", "grows slowly from 0; a jump means that the policy has left"),
    ("entropy", "falls slowly; towards 0 all answers become one"),
    ("response_tokens", "beside the reward: length is the commonest way to win it"),
    ("cut_off", "near 0, or raise sampling.max_new_tokens"),
)
WATCH: dict[str, tuple[Watched, ...]] = {
    **dict.fromkeys((*PAIRWISE, "rank"), PREFERENCE),
    "simpo": (("eval_accuracy_per_token", "rises: its reward is a mean a token"), *PREFERENCE[1:]),
    "orpo": (
        ("log_odds_ratio", "rises from about 0"),
        ("nll", "falls as in SFT"),
        ("eval_accuracy_per_token", "rises: the same on held-out pairs"),
        ("reward_margin", "rises"),
    ),
    "kto": (
        ("eval_label_auc", "rises above 0.5: a good answer has gained more than a bad one"),
        ("reward_margin", "rises"),
        ("kl", "a steady rise is the policy leaving the reference everywhere"),
    ),
    "mixed": (
        ("pairs/accuracy", "rises from 0.5"),
        ("labels/kl", "a steady rise is the policy leaving the reference everywhere"),
        ("eval_label_auc", "rises above 0.5"),
    ),
    "sft": (("eval_loss", "falls with loss; once it rises, rows are learned by heart"),),
    "spin": (
        ("eval_loss", "falls, and is the first to say that steps are too large"),
        ("accuracy", "back at 0.5 with each iteration"),
        ("copies", "near 0: copies teach nothing"),
        ("cut_off", "near 0, or raise sampling.max_new_tokens"),
    ),
    "online-dpo": (
        ("accuracy", "rises from 0.5, and ends below the judge's own consistency"),
        ("ties", "well below 1: at 1 nothing is learned"),
        ("chosen_tokens", "beside rejected_tokens: far apart, the judge likes length"),
        ("cut_off", "near 0, or raise sampling.max_new_tokens"),
    ),
    **dict.fromkeys(RELATIVE, SAMPLED),
    "dapo": (
        *SAMPLED[:1],
        (
            "refilled_groups",
            "grows slowly: as fast as groups are learned from, half the prompts teach nothing",
        ),
        ("overlong_punishment", "near 0; below -0.1 raise sampling.max_new_tokens"),
        *SAMPLED[3:],
    ),
    "ppo": (
        *SAMPLED[:1],
        ("explained_variance", "rises from 0; below 0 the critic is worse than a constant"),
        *SAMPLED[2:],
    ),
    "reward": (
        ("eval_accuracy_low", "above 0.5: the lower end of the held-out accuracy"),
        ("eval_length_correlation", "near 0; near 1 it measures length"),
        ("eval_loss", "falls; once it rises, rows are learned by heart"),
    ),
    "process-reward": (
        ("eval_first_error_f1", "the curve to watch where most answers are right"),
        ("eval_step_accuracy", "above the share of right steps"),
        ("eval_loss", "falls"),
    ),
}
"""What to look at, by method. A test holds the names to the methods' pages."""


@dataclass(frozen=True, slots=True)
class Pilot:
    """What to run first, and what to make of it."""

    rows: int
    steps: int
    heldout: int
    overrides: Mapping[str, Any]
    """Options of the method (of the last stage) that make its recipe a pilot."""
    watch: tuple[Watched, ...]
    stop: tuple[str, ...]
    switch: str

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "rows": self.rows,
            "steps": self.steps,
            "heldout_rows": self.heldout,
            "overrides": dict(self.overrides),
            "watch": [{"metric": name, "see": see} for name, see in self.watch],
            "stop": list(self.stop),
            "switch": self.switch,
        }


def heldout_fraction(stage: str, s: Situation) -> float:
    """The share of prompts that holds out :data:`HELD_OUT` rows: 2 % at least, of reward models 10 %, half at
    most. A method that samples only looks at a few prompts.
    """
    rows = rows_of(stage, s)
    if rows < 10:
        return 0.0
    if stage in ONLINE:
        return 0.05 if rows >= 200 else 0.1
    least = 0.1 if stage in REWARDS else 0.02
    return min(0.5, max(least, math.ceil(100 * HELD_OUT / rows) / 100))


def pilot(choice: Choice) -> Pilot:
    """The pilot of a choice: of its method, the last stage."""
    s, method = choice.situation, choice.method
    values = {h.key: h.value for h in choice.hypers[method]}
    batch = int(values["train.batch_groups"])
    rows = rows_of(method, s)
    heldout = math.floor(heldout_fraction(method, s) * rows)
    overrides: dict[str, Any] = {}
    if method in ONLINE:
        batch = min(batch, 16)
        overrides["train.batch_groups"] = batch
        steps = min(PILOT_STEPS, int(values["train.steps"]))
        learned = min(rows, steps * batch)
        rollout = f"{SECTION[method]}.rollout_groups"
        if rollout in values:
            overrides[rollout] = batch
    else:
        learned = min(PILOT_ROWS, rows - heldout)
        steps = max(2, learned // batch)
        if values.get("train.epochs", 1.0) != 1.0:
            overrides["train.epochs"] = 1.0
        if method == "spin":
            overrides["spin.iterations"] = 1
    overrides["train.steps"] = steps
    if values.get("train.warmup_steps", 0) > steps // 10:
        overrides["train.warmup_steps"] = steps // 10
    return Pilot(
        rows=learned,
        steps=steps,
        heldout=heldout,
        overrides=overrides,
        watch=WATCH[method],
        stop=_stop(choice, heldout),
        switch=_switch(choice),
    )


def _stop(choice: Choice, heldout: int) -> tuple[str, ...]:
    method = choice.method
    if method in ("dpo", "ipo", "rank") and heldout:
        bar = 0.5 + 0.98 / math.sqrt(heldout)
        return (
            f"eval_accuracy_implicit_reward below {bar:.3f} at the end: with {heldout:,} held-out "
            "rows that is a "
            "coin's interval, and more steps of the same will not help",
            "chosen_reward falls by more than 20 nats while held-out accuracy stands still (ours)",
        )
    if method in ("simpo", "orpo"):
        return (
            "eval_accuracy_per_token no higher than at step 0",
            "chosen_reward falls fast: lower the rate",
        )
    if method == "kto":
        return (
            "eval_label_auc not above 0.5 at the end",
            "kl of more than 20 nats a response (ours)",
        )
    if method in ONLINE:
        learned = choice.situation.reward_model or "reward" in choice.stages
        first = (
            "reward_mean no higher in the last 10 steps than in the first 10"
            if method != "online-dpo"
            else "accuracy still at 0.5 after all steps, or ties above 0.9"
        )
        second = (
            "kl above 0.2 nats a token (the production guide aims at 0.05 to 0.2), or "
            "response_tokens up or down by "
            "half"
            if learned
            else "response_tokens up or down by half without a rise in reward, or entropy near 0"
        )
        return (first, second)
    if method in REWARDS:
        return ("eval_loss rises while accuracy does too", "trimtab audit does not call it trusted")
    return ("eval_loss rises",)


def _switch(choice: Choice) -> str:
    if choice.runner_up is None:
        return "there is no runner-up: collect more, or other feedback"
    return f"to {choice.runner_up}, if {choice.prefer}"


def flags(overrides: Mapping[str, Any], prefix: str = "") -> str:
    """Options as they are typed."""
    return " ".join(f"--{prefix}{key} {value}" for key, value in overrides.items())


def commands(choice: Choice, made: Pilot, recipe: str, out: str, audit: str = "") -> list[str]:
    """What to run, in order: plan, pilot, evaluation, audit, the whole run."""
    method, several = choice.method, len(choice.stages) > 1
    prefix = f"stages.{method}." if several else ""
    where = "out" if several else "run.out"
    what = "pipeline" if several else method
    run = f"runs/{out}-pilot/{method}" if several else f"runs/{out}-pilot"
    lines = [] if several else [f"trimtab plan {method} {recipe}"]
    lines.append(f"trimtab {what} {recipe} {flags(made.overrides, prefix)} --{where} runs/{out}-pilot")
    if audit:
        lines.append(f"trimtab audit {audit}")
    if method not in REWARDS:
        lines.append(f"trimtab eval {run}")
    lines.append(f"trimtab {what} {recipe}")
    return lines
