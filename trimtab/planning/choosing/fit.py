"""Does the chosen run fit, and if not, what makes it fit with the least harm: by the planner alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import InputError
from trimtab.planning.choosing.decide import Choice
from trimtab.planning.choosing.needs import ONLINE, learns_a_reward
from trimtab.planning.choosing.situation import Situation
from trimtab.planning.choosing.sources import OURS, START, Hyper, rows_of
from trimtab.planning.devices import Device
from trimtab.planning.job import Model
from trimtab.planning.look import size
from trimtab.planning.models import find_model
from trimtab.planning.quick import quick_job
from trimtab.planning.quick_config import QuickConfig, idle_in
from trimtab.planning.result import Plan

ACTIVATIONS_MB = 256
LORA_RATE = 10
"""Times the rate of a run that trains every weight."""
LORA_SOURCE = (
    "Schulman et al., 2025 (LoRA Without Regret): about ten times the full run's rate; about 15 in very "
    "short runs"
)

RECOMPUTED = Hyper(
    "train.activation_mb", ACTIVATIONS_MB, "trimtab plan: layers computed again, no number changes"
)
LORA = (
    Hyper("adapter.kind", "lora", "trimtab plan: every weight does not fit; Hu et al., 2021"),
    Hyper("adapter.rank", 16, f"{OURS}: the default of trimtab"),
)
FOUR_BITS = Hyper("adapter.quantise", "nf4", "trimtab plan: the base in 4 bits; Dettmers et al., 2023")

Step = tuple[Mapping[str, Any], tuple[Hyper, ...]]
LADDER: tuple[Step, ...] = (
    ({}, ()),
    ({"activation_mb": ACTIVATIONS_MB}, (RECOMPUTED,)),
    ({"adapter": "lora"}, LORA),
    ({"adapter": "lora", "activation_mb": ACTIVATIONS_MB}, (*LORA, RECOMPUTED)),
)
"""What is tried in turn, the least harm first: options of the planner, and of the recipe."""
QUANTISED: Step = (
    {"adapter": "lora", "activation_mb": ACTIVATIONS_MB, "quantise": "nf4"},
    (*LORA, FOUR_BITS, RECOMPUTED),
)
"""The last step, on a GPU."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the run would stand on."""

    available: float | None = None
    """Bytes of one device; None where it is not known."""
    device: Device | None = None
    count: int = 1
    """Devices, a process on each; more than a step has groups are left idle."""

    @property
    def engine(self) -> str:
        """cpu or gpu."""
        return "cpu" if self.device is None else self.device.engine


@dataclass(frozen=True, slots=True)
class Fit:
    """The plan of the stage that takes the most, as it would be run."""

    plan: Plan | None = None
    stage: str = ""
    more: tuple[Hyper, ...] = ()
    """Options that make it fit."""
    rates: Mapping[str, Hyper] = field(default_factory=dict)
    line: str = ""
    """What came of it, in words."""


def planned(
    method: str,
    model: str,
    s: Situation,
    values: Mapping[str, Any],
    lengths: tuple[int, int],
    on: Hardware,
    options: Mapping[str, Any],
) -> Plan:
    """The plan of one stage. ``values``: its own, dotted; ``lengths``: tokens of a prompt and a response.

    Raises InputError for what the planner refuses.
    """
    from trimtab.planning.plan import plan

    given: dict[str, Any] = {
        "prompt": lengths[0],
        "response": lengths[1],
        "groups": values.get("train.batch_groups", 16),
        "rows": max(1, rows_of(method, s)) if method not in ONLINE else 0,
        "steps": values.get("train.steps", 0),
        "engine": on.engine,
        **options,
    }
    given["devices"] = min(on.count, given["groups"])
    shared = "adapter" in options and not s.reward_model  # an adapter on the policy's own base
    if method in ONLINE and not shared and (s.reward_model or learns_a_reward(s)):
        given["reward_model"] = _known(s.reward_model) or model  # else taken to be as large as the policy
    kept = {key: value for key, value in given.items() if not idle_in(method, key)}
    job = quick_job(QuickConfig(method=method, model=model, **kept), available=on.available)
    return plan(job, device=on.device, available=on.available)


def _known(reward_model: str) -> str:
    """The name, where the planner can tell the model's size without asking the hub."""
    try:
        find_model(reward_model, online=False)
    except InputError:
        return ""
    return reward_model


def fits(
    names: Sequence[str], model: str, s: Situation, lengths: tuple[int, int], on: Hardware
) -> dict[str, bool | None]:
    """Whether these methods fit as they are, with the values that they start from."""
    out: dict[str, bool | None] = {}
    for name in names:
        values = {h.key: h.value for h in START[name]}
        out[name] = planned(name, model, s, values, lengths, on, {}).fits
    return out


def fit(choice: Choice, model: str, found: Model, lengths: tuple[int, int], on: Hardware) -> Fit:
    """The first step of the ladder on which every stage fits; the last one that there is, where none does.

    Raises InputError for what the planner refuses.
    """
    ladder = (*LADDER, QUANTISED) if on.engine == "gpu" else LADDER
    worst: tuple[str, Plan] | None = None
    for options, more in ladder:
        plans = {}
        for stage in choice.stages:
            values = {h.key: h.value for h in choice.hypers[stage]}
            plans[stage] = planned(stage, model, choice.situation, values, lengths, on, options)
        stage = max(plans, key=lambda name: float(plans[name].memory.peak))
        worst = (stage, plans[stage])
        if worst[1].fits is not False:
            return Fit(worst[1], stage, more, _rates(choice, more), _told(worst, more, found, on))
    assert worst is not None
    stage, plan = worst
    line = (
        f"{found.name} does not fit: {stage} needs {size(float(plan.memory.peak))} even so, and there are "
        f"{size(on.available or 0)}; take a smaller model, or shorter answers (--max-new-tokens)"
    )
    return Fit(plan, stage, ladder[-1][1], _rates(choice, ladder[-1][1]), line)


def _rates(choice: Choice, more: tuple[Hyper, ...]) -> dict[str, Hyper]:
    """Learning rates of an adapter, by stage."""
    if not any(h.key == "adapter.kind" for h in more):
        return {}
    rates = {}
    for stage in choice.stages:
        rate = next(h.value for h in choice.hypers[stage] if h.key == "train.lr")
        rates[stage] = Hyper("train.lr", float(f"{LORA_RATE * rate:.2g}"), LORA_SOURCE)
    return rates


def _told(worst: tuple[str, Plan], more: tuple[Hyper, ...], found: Model, on: Hardware) -> str:
    stage, plan = worst
    peak = size(float(plan.memory.peak))
    what = {1: "with layers computed again", 2: "with LoRA", 3: "with LoRA and layers computed again"}
    how = f" {what.get(len(more), 'with LoRA on 4 bits')}" if more else ""
    room = "" if on.available is None else f", {size(on.available)} are there"
    if on.count > 1:
        how = f"{how} on each of {on.count} devices"
    clock = "" if plan.time is None else f", and about {plan.time.step_s:.2g} s a step on {plan.time.device}"
    return f"{found.name}: {stage} takes about {peak}{how}{room}{clock}"
