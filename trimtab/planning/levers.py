"""The options that a run's memory hangs on, from the least to the most harm to its result. No torch."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.planning.result import Plan

Effect = Literal["same", "rounding", "log", "another"]
Given = Mapping[str, Any]
"""The options in effect, dotted key → value."""
Values = Iterator[dict[str, Any]]
LORA_RATE = 10.0
"""An adapter's learning rate is about so many times that of full training (Schulman and others, 2025,
"LoRA Without Regret", found 10 for supervised and for policy-gradient training)."""
LEAST = 16
"""Tokens of a micro-batch."""
BEYOND = 1.25
"""How much longer than the longest of its head a row of the data is taken to be."""
BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
"""Shares of what the activations take, as budgets to compute layers again for."""
ROWS = 256
"""Responses that run at once where ``sampling.max_rows`` is 0."""
NOT_THE_METHODS = {"watch", "reward", "run", "data", "train", "sampling", "adapter", "critic"}
"""Sections in which an option of a method's name means something else."""


@dataclass(frozen=True, eq=False, slots=True)
class Lever:
    """One way to need less memory."""

    name: str
    effect: Effect
    why: str
    values: Callable[[Given, Plan], Values]
    """Options from mild to strong, given those in effect and the plan with them; none where it is no way."""
    meets: Callable[[dict[str, Any], Plan], bool] = lambda options, plan: True
    """Whether a run would take the options, going by the plan with them."""


def key(given: Given, *names: str) -> str | None:
    """The first of these names that is an option here: of a run's configuration or of ``trimtab plan``."""
    return next((name for name in names if name in given), None)


def method_key(given: Given, *names: str) -> str | None:
    """An option of the method's own section, whatever the method is called."""
    for option in given:
        section, _, name = option.rpartition(".")
        if name in names and section.split(".")[0] not in NOT_THE_METHODS:
            return option
    return None


def halves(value: float, least: int) -> Iterator[int]:
    """Half, a quarter …, not below ``least``."""
    value = int(value) // 2
    while value >= least:
        yield value
        value //= 2


def _devices(given: Given, plan: Plan) -> Values:
    """More of them, as far as there are (``devices_at_hand``)."""
    count, most = given.get("devices"), given.get("devices_at_hand", 0)
    if count is not None:
        while (count := 2 * count) <= most:
            yield {"devices": count}


def _shards(given: Given, plan: Plan) -> Values:
    """Of a run on several processes whose weights are whole in each, or shared by few."""
    option = key(given, "parallel.weights", "weights")
    if not option or plan.facts.get("processes", 1) == 1:
        return
    if str(plan.facts.get("weights", "")).startswith("replicated"):
        yield {option: "shard"}
    over = key(given, "parallel.shard_over", "shard_over")
    if over and given[over]:
        yield {over: 0}


def _gather(given: Given, plan: Plan) -> Values:
    option = key(given, "parallel.gather", "gather")
    if option and given[option] != "layers" and str(plan.facts.get("samples_from", "")).startswith("whole"):
        yield {option: "layers"}


def _micro_batch(given: Given, plan: Plan) -> Values:
    """Down to a longest group, which the configuration or the data refuse to go below."""
    if option := key(given, "train.micro_batch_tokens", "micro_batch_tokens"):
        now = given[option] or plan.facts.get("micro_batch_tokens", 0)
        yield from ({option: tokens} for tokens in halves(now, _longest_group(given, plan)))


def _longest_group(given: Given, plan: Plan) -> int:
    """Tokens that a group of the data may have, where only the head of the data was read.

    Where all of it was, planning itself refuses what is too small, as the run would.
    """
    longest = plan.facts.get("longest_sequence")
    if not longest or plan.facts.get("lengths") in (None, "all rows"):
        return LEAST
    longest = given.get("data.max_tokens") or BEYOND * longest
    together = 1 if method_key(given, "group_size", "samples") else plan.facts.get("responses_per_group", 1)
    return max(LEAST, math.ceil(longest * together))


def _activations(plan: Plan) -> float:
    """MiB of the policy's in training."""
    phase = next((phase for phase in plan.memory.phases if phase.name == "training"), None)
    parts = () if phase is None else phase.parts
    return max((float(p.bytes) for p in parts if p.kind == "activations"), default=0.0) / 2**20


def _recompute(given: Given, plan: Plan) -> Values:
    """A budget of three quarters of what they take … down to a tenth."""
    option = key(given, "train.activation_mb", "activation_mb")
    if option and (now := _activations(plan)) >= 2:
        yield from ({option: int(share * now)} for share in BUDGETS if share * now >= 1)
    if given.get("recompute") == "none" and not given.get("activation_mb"):
        yield {"recompute": "all"}


def _budget_met(options: dict[str, Any], plan: Plan) -> bool:
    """A run refuses a budget that computing every layer again does not meet."""
    return "recompute" in options or _activations(plan) <= 1.01 * next(iter(options.values()))


def _cache(given: Given, plan: Plan) -> Values:
    if option := key(given, "sampling.cache_mb", "cache_mb"):
        for size in halves(given[option], 16):
            yield {option: size}


def _rows(given: Given, plan: Plan) -> Values:
    if option := key(given, "sampling.max_rows", "max_rows"):
        for rows in halves(given[option] or ROWS, 4):
            yield {option: rows}


def _dtype(given: Given, plan: Plan) -> Values:
    option = key(given, "model.dtype", "dtype")
    # What "auto" comes to is in the plan; where it is this already, nothing is saved and nothing advised.
    if option and given[option] != "bfloat16":
        yield {option: "bfloat16"}


def _watch_kl(given: Given, plan: Plan) -> Values:
    # Without prompts to answer the option has no effect, which the configuration says.
    if given.get("watch.kl") is True and (given.get("watch.prompts") or given.get("watch.heldout")):
        yield {"watch.kl": False}


def _log_kl(given: Given, plan: Plan) -> Values:
    option, beta = method_key(given, "log_kl"), method_key(given, "beta")
    if option and given[option] is True and beta and given[beta] == 0:
        yield {option: False}


def _critic(given: Given, plan: Plan) -> Values:
    if given.get("critic.share") == "none":
        yield {"critic.share": "trunk"}
    elif given.get("critic") == "own":
        yield {"critic": "trunk"}


def _lora(given: Given, plan: Plan) -> Values:
    if given.get("adapter.kind", given.get("adapter")) != "none":
        return
    option = key(given, "adapter.kind", "adapter")
    options: dict[str, Any] = {str(option): "lora"}
    if "train.lr" in given:
        options["train.lr"] = float(f"{LORA_RATE * given['train.lr']:.3g}")
    yield options


def _quantise(given: Given, plan: Plan) -> Values:
    option = key(given, "adapter.quantise", "quantise")
    adapted = given.get("adapter.kind", given.get("adapter")) in ("lora", "rslora", "dora")
    if option and adapted and given[option] == "none" and importlib.util.find_spec("bitsandbytes"):
        yield {option: "nf4"}


def _group(given: Given, plan: Plan) -> Values:
    option = method_key(given, "group_size", "samples", "responses")
    if option and isinstance(given[option], int):
        size = given[option] or plan.facts.get("responses_per_group", 0)
        yield from ({option: fewer} for fewer in halves(size, 2))


def _reference(given: Given, plan: Plan) -> Values:
    option = method_key(given, "reference")
    if option and given[option]:
        yield {option: ""}


LEVERS: tuple[Lever, ...] = (
    Lever("devices", "same", "what is learned is sharded over more devices", _devices),
    Lever("shards", "same", "each process holds a part of the weights, which all gather to compute", _shards),
    Lever("gather", "same", "layers are gathered for each token that is drawn: slow", _gather),
    Lever(
        "micro batch",
        "same",
        "fewer tokens are computed at once; their gradients add up to the same",
        _micro_batch,
    ),
    Lever(
        "recomputation",
        "same",
        "layers beyond this budget are computed again in the backward pass: up to a third more work",
        _recompute,
        meets=_budget_met,
    ),
    Lever("cache", "same", "fewer responses are sampled at once", _cache),
    Lever("rows", "same", "fewer responses are sampled at once", _rows),
    Lever("dtype", "rounding", "computes in two bytes a number; what learns stays in fp32", _dtype),
    Lever("watched KL", "log", "no copy of the first policy is kept to measure eval_kl against", _watch_kl),
    Lever("logged KL", "log", "with beta = 0 the reference was only kept for the log", _log_kl),
    Lever("critic", "another", "the critic is a head on the policy instead of a model", _critic),
    Lever(
        "adapter",
        "another",
        "only an adapter learns, over a frozen base that all roles share; it wants about ten times the rate",
        _lora,
    ),
    Lever("quantise", "another", "the frozen base is kept in 4 bits", _quantise),
    Lever("reference", "another", "the policy's own start is the reference: no second model", _reference),
    Lever("group", "another", "fewer responses to each prompt", _group),
)
"""In the order in which they are tried."""
