"""The small run before the large one: how much, what to watch, when to stop, when to change the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.planning.choosing.decide import Choice
from trimtab.planning.choosing.needs import ONLINE, REWARDS
from trimtab.planning.choosing.situation import HELD_OUT, Situation
from trimtab.planning.choosing.sources import SECTION, rows_of
from trimtab.planning.choosing.watch import WATCH, Watched

PILOT_ROWS = 2_000
"""Rows that a pilot of a method on given feedback learns from, at most: a tenth of what there is; our
judgement."""
PILOT_LEAST = 20
"""Steps that such a pilot takes at least; our judgement. Where that is half of the whole, it is the whole."""
PILOT_STEPS = 50
"""Steps of a pilot of a method that samples; our judgement: in the newsroom rewards had moved by step 20."""


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
    whole: bool = False
    """So little is learned from that the pilot is the whole run."""

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "rows": self.rows,
            "steps": self.steps,
            "heldout_rows": self.heldout,
            "whole_run": self.whole,
            "overrides": dict(self.overrides),
            "watch": [{"metric": name, "see": see} for name, see in self.watch],
            "stop": list(self.stop),
            "switch": self.switch,
        }


def heldout_fraction(stage: str, s: Situation) -> float:
    """The share of prompts that holds out :data:`HELD_OUT` rows: 2 % at least, of reward models 10 %, half at
    most. A loss on demonstrations is measured on a tenth, about 200 rows at most; a method that samples only
    looks at a few prompts.
    """
    rows = rows_of(stage, s)
    if rows < 10:
        return 0.0
    if stage in ONLINE:
        return 0.05 if rows >= 200 else 0.1
    if stage in IMITATING:
        return 0.1 if rows <= 10 * MOST_LOSS_ROWS else round(MOST_LOSS_ROWS / rows, 5)
    least = 0.1 if stage in REWARDS else 0.02
    return min(0.5, max(least, math.ceil(100 * HELD_OUT / rows) / 100))


IMITATING = ("sft", "spin")
MOST_LOSS_ROWS = 200
"""Demonstrations that are held out at most: their mean loss needs no more; our judgement."""


def pilot(choice: Choice) -> Pilot:
    """The pilot of a choice: of its method, the last stage."""
    s, method = choice.situation, choice.method
    values = {h.key: h.value for h in choice.hypers[method]}
    batch = int(values["train.batch_groups"])
    rows = rows_of(method, s)
    heldout = math.floor(heldout_fraction(method, s) * rows)
    whole = False
    overrides: dict[str, Any] = {}
    if method in ONLINE:
        batch = min(batch, 16)
        overrides["train.batch_groups"] = batch
        steps = min(PILOT_STEPS, int(values["train.steps"]))
        passes = int(values.get(f"{SECTION[method]}.epochs_per_rollout", 1))
        learned = min(rows, max(1, steps * batch // passes))
        rollout = f"{SECTION[method]}.rollout_groups"
        if rollout in values:
            overrides[rollout] = batch
    else:
        there = rows - heldout
        learned = min(PILOT_ROWS, max(PILOT_LEAST * batch, rows // 10))
        if 2 * learned > there:
            whole, learned = True, there
        epochs = float(values.get("train.epochs", 1.0)) if whole else 1.0
        steps = max(2, int(epochs * learned) // batch)
        if values.get("train.epochs", 1.0) != 1.0:
            overrides["train.epochs"] = 1.0
        if method == "spin":
            overrides["spin.iterations"] = 1
    if whole:
        overrides = {}
    else:
        overrides["train.steps"] = steps
        for key, share in (("train.warmup_steps", 10), ("train.eval_every", 5)):
            if values.get(key, 0) > steps // share:
                overrides[key] = steps // share
    return Pilot(
        rows=learned,
        steps=steps,
        heldout=heldout,
        overrides=overrides,
        watch=WATCH[method],
        stop=_stop(choice, heldout),
        switch=_switch(choice),
        whole=whole,
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
    if method == "mixed":
        return ("pairs/accuracy and eval_label_auc both at 0.5 at the end",)
    if method in ONLINE:
        learned = choice.situation.reward_model or any(name in choice.stages for name in REWARDS)
        first = (
            "reward_mean no higher in the last 10 steps than in the first 10"
            if method != "online-dpo"
            else "accuracy still at 0.5 after all steps, or ties above 0.9"
        )
        if method == "online-dpo":
            return (first, "chosen_tokens well above rejected_tokens throughout, or cut_off rises")
        second = (
            "kl above 0.2 nats a token (the production guide aims at 0.05 to 0.2), or "
            "response_tokens up or down by "
            "half"
            if learned
            else "response_tokens up or down by half without a rise in reward, or entropy near 0"
        )
        return (first, second)
    if method == "process-reward":
        return ("eval_loss rises", "eval_first_error_f1 no higher than at the first evaluation")
    if method in REWARDS:
        return ("eval_loss rises while accuracy does too", "trimtab audit does not call it trusted")
    return ("eval_loss rises",)


def _switch(choice: Choice) -> str:
    if choice.runner_up is None:
        return "the data: there is no runner-up; collect more, or other feedback"
    return f"to {choice.runner_up}, if {choice.prefer}"


def flags(overrides: Mapping[str, Any], prefix: str = "") -> str:
    """Options as they are typed."""
    return " ".join(f"--{prefix}{key} {value}" for key, value in overrides.items())


def pilot_folder(choice: Choice, made: Pilot, out: str) -> str:
    """Where the pilot writes: a folder of its own, or that of the whole run where it is the whole."""
    return f"runs/{out}" if made.whole else f"runs/{out}-pilot"


def commands(
    choice: Choice, made: Pilot, recipe: str, out: str, audit: str = "", place: str = ""
) -> list[str]:
    """What to run, in order: plan, pilot, audit, evaluation, the whole run.

    ``place``: options of ``trimtab plan`` that say what it has to fit into.
    """
    method, several = choice.method, len(choice.stages) > 1
    prefix = f"stages.{method}." if several else ""
    where = "out" if several else "run.out"
    what = "pipeline" if several else method
    run = pilot_folder(choice, made, out)
    lines = [] if several else [f"trimtab plan {method} {recipe}{place and ' ' + place}"]
    whole = f"trimtab {what} {recipe}"
    lines.append(whole if made.whole else f"{whole} {flags(made.overrides, prefix)} --{where} {run}")
    if audit:
        lines.append(f"trimtab audit {audit}")
    if method not in REWARDS:
        lines.append(f"trimtab eval {run}/{method}" if several else f"trimtab eval {run}")
    return lines if made.whole else [*lines, whole]
