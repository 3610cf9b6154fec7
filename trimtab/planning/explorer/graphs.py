"""The planner, traced: for every combination of options the formulas of its memory and of its step's seconds.

Numbers (lengths, sizes, a model's fields, a device's speeds) stay open; options (method, adapter, dtype, …)
choose the formulas. All combinations share one table, in which each expression stands once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.planning import devices
from trimtab.planning.batch import batch_of, smallest_budget
from trimtab.planning.devices import Device, Reached
from trimtab.planning.job import Adapter, Batch, Job, Layout, Model, Sampling
from trimtab.planning.method_card import DEFAULTS, MOST_ROWS, Card
from trimtab.planning.methods import CARDS
from trimtab.planning.numbers import Number, largest
from trimtab.planning.quick import PUBLISHED_BYTES, scores_of
from trimtab.planning.result import Memory, Time
from trimtab.planning.roles import critic_of, reference_of, reward_model_of
from trimtab.planning.rollout import engine_of
from trimtab.planning.trace import Table, Unknown

METHODS = ("ppo", "dpo", "grpo", "kto", "simpo", "orpo")
"""Side by side on the page."""
SIZES = ("prompt", "response", "groups", "responses", "micro_batch_tokens", "rank", "devices")
"""Numbers that the reader sets."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "engine": ("gpu", "cpu"),
    "shard": ("no", "yes"),
    "adapter": ("none", "lora"),
    "compute": ("bfloat16", "float32"),
    "recompute": ("none", "all"),
    "reward": ("function", "model"),
}
"""What chooses the formulas, beside the method and the model's own options."""
DEVICES = {device.engine: device for device in devices.CARDS.values()}
"""One of each engine, whose numbers are taken out."""
PLANS = ("matrices", "norms", "head_norms")
"""Numbers of a model that say how it is built, not how large: formulas may ask for them."""
LINEARS, OF_LINEAR = 12, ("inputs", "outputs", "count")
"""Kinds of linear layers of a model, at most."""
ADAPTED = "adapted"
"""Beside a model's fields: how many linear layers an adapter is put on."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One choice of everything that is no number."""

    method: str
    engine: Any
    shard: str
    adapter: Any
    compute: Any
    recompute: Any
    reward: str


@dataclass(frozen=True, slots=True)
class Formulas:
    """What one combination comes to: quantities of one table, or numbers."""

    memory: Memory
    budget: Number
    """Tokens that a micro-batch must hold."""
    step_s: Number
    """Seconds of an optimiser step, its share of a rollout in it."""


def model_numbers(model: Model) -> dict[str, float]:
    """The fields that are numbers, and the sizes of LINEARS kinds of linear layers, 0 for those it lacks."""
    found = _numbers(model)
    if len(model.linears) > LINEARS:
        raise ValueError(f"{model.name} has {len(model.linears)} kinds of linear layers: raise LINEARS")
    for i in range(LINEARS):
        _, *sizes = model.linears[i] if i < len(model.linears) else ("", 0, 0, 0)
        found |= {f"linear {i} {what}": size for what, size in zip(OF_LINEAR, sizes, strict=True)}
    return found


def model_options(model: Model) -> dict[str, Any]:
    """The fields that choose formulas: the family, strings, yes or no, and what is 2 or 4 of a kind."""
    found = {k: v for k, v in _fields(model).items() if isinstance(v, str | bool) or k in PLANS}
    return {name: value for name, value in found.items() if name != "name"}


def device_numbers(device: Device) -> dict[str, float]:
    """The fields that are numbers; where it has no bfloat16, the speed that takes its place."""
    found = _numbers(device) | {"bfloat16": device.flops("bfloat16") / 1e12}
    found.pop("tf32", None)
    return found | {f"reached.{name}": value for name, value in _numbers(device.reached).items()}


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _numbers(record: Any) -> dict[str, float]:
    return {
        k: v for k, v in _fields(record).items() if isinstance(v, int | float) and not isinstance(v, bool)
    }


def job_of(
    combination: Combination,
    model: Model,
    scored: Model,
    sizes: Mapping[str, Number],
    batch_of: Callable[..., Batch] = batch_of,
) -> tuple[Job, Number]:
    """The run, and the least micro-batch of it: ``quick_job`` of the same options, as a test holds it to be.

    ``scored``: the model with a score in the place of its vocabulary (``quick.scores_of``). A micro-batch
    that is too small for one group is made as large as it has to be.
    """
    card, c = CARDS[combination.method], combination
    layout: Layout = "packed" if model.packed else "tree"
    adapter = Adapter()
    if c.adapter != "none":
        adapter = Adapter(c.adapter, sizes["rank"], model.linear_ends, sizes[ADAPTED])
    responses = sizes["responses"] if card.responses_option else card.responses
    prompt, response, groups = sizes["prompt"], sizes["response"], sizes["groups"]
    budget = smallest_budget(prompt, response, responses=responses, layout=layout, divisible=card.divisible)
    micro_batch_tokens = largest(sizes["micro_batch_tokens"], budget)
    anchored = card.reference != "none"
    old_pass = card.critic or card.name == "kto"
    job = Job(
        method=card.name,
        model=model,
        batch=batch_of(
            *(prompt, response),
            groups=groups,
            responses=responses,
            micro_batch_tokens=micro_batch_tokens,
            layout=layout,
            divisible=card.divisible,
            layers=model.layers,
            recompute=c.recompute,
            forward_groups=groups if anchored or old_pass else None,
        ),
        sampling=_sampling(prompt, response, groups, responses, model) if card.rollouts else None,
        steps_per_rollout=card.epochs_per_rollout if card.rollouts else 1,
        roles=_roles(card, model, scored, adapter, c.reward),
        adapter=adapter,
        compute=c.compute,
        layout=layout,
        engine=c.engine,
        scalar=card.scalar,
        entropy=card.entropy,
        reference_pass=anchored,
        reference_once=anchored and not card.rollouts,
        reference_each=anchored and not card.rollouts and card.reference == "kept",
        old_pass=old_pass,
        old_pass_whole=card.critic,
        recompute=c.recompute,
        micro_batch_tokens=micro_batch_tokens,
        file_bytes=PUBLISHED_BYTES,
        devices=sizes["devices"],
        shard=c.shard == "yes",
    )
    return job, budget


def _sampling(prompt: Number, response: Number, groups: Number, responses: Number, model: Model) -> Sampling:
    return Sampling(
        prompts=groups,
        samples=responses,
        prompt=prompt,
        response=response,
        longest_response=response,
        longest_prompt=prompt,
        cache_mb=DEFAULTS["cache_mb"],
        max_rows=MOST_ROWS,
        engine=engine_of(model),
    )


def _roles(card: Card, model: Model, scored: Model, adapter: Adapter, reward: str) -> tuple[Any, ...]:
    roles = []
    if card.reference == "kept":
        roles.append(reference_of(model, adapter))
    if card.critic:
        roles.append(critic_of(scored, adapter))
    if reward == "model" and card.rollouts:
        roles.append(reward_model_of(scored))
    return tuple(roles)


def combinations(options: Mapping[str, Sequence[str]] = OPTIONS) -> Iterator[Combination]:
    """All of them, the last option turning first."""
    for method, *chosen in itertools.product(METHODS, *options.values()):
        yield Combination(method, **dict(zip(options, chosen, strict=True)))


class Tracer:
    """Writes down the formulas of combinations, for models of any options."""

    def __init__(
        self,
        memory_of: Callable[[Job], Memory],
        time_of: Callable[[Job, Device], Time],
    ) -> None:
        self.table = Table()
        self._memory_of = memory_of
        self._time_of = time_of
        self._sizes = {name: self.table.name(name) for name in SIZES}
        self._sizes[ADAPTED] = self.table.name(f"model.{ADAPTED}")
        self._asking: set[tuple[str, str]] = set()
        self._batch_of = functools.cache(batch_of)
        self._options = functools.cache(model_options)
        self._met: dict[tuple[str, Combination], list[tuple[dict[str, Any], Any]]] = {}

    def formulas(self, combination: Combination, model: Model) -> Formulas:
        """Of models with this one's options. What does not ask for an option is written once for all."""
        c, options = combination, self._options(model)
        if not CARDS[c.method].rollouts:
            c = dataclasses.replace(c, reward="function")

        def memory(model: Model, scored: Model) -> tuple[Memory, Number]:
            job, budget = job_of(c, model, scored, self._sizes, self._batch_of)
            return self._memory_of(job), budget

        def seconds(model: Model, scored: Model) -> Number:
            return self._seconds(job_of(c, model, scored, self._sizes, self._batch_of)[0])

        held, budget = self._once(("memory", c), options, memory)
        return Formulas(held, budget, self._once(("time", c), options, seconds))

    def _once(
        self, what: tuple[str, Combination], options: dict[str, Any], trace: Callable[[Model, Model], Any]
    ) -> Any:
        """What was traced before with a model that differs in nothing that was asked for, or traced now."""
        met = self._met.setdefault(what, [])
        for asked, found in met:
            if all(options[name] == value for name, value in asked.items()):
                return found
        asked = {}
        part = what[0], what[1].engine
        try:
            found = trace(*self._open(options, asked, part in self._asking))
        except Unknown:
            if part in self._asking:
                raise
            # It asks how a model is built; where nothing asks, that is a number, and one formula serves all.
            self._asking.add(part)
            asked = {}
            found = trace(*self._open(options, asked, True))
        met.append((asked, found))
        return found

    def _open(self, options: dict[str, Any], asked: dict[str, Any], asking: bool) -> tuple[Model, Model]:
        """A model whose sizes are names, which notes in ``asked`` what it is asked for; and with a score."""
        fixed = {name: value for name, value in options.items() if asking or name not in PLANS}

        class Watched(Model):
            def __getattribute__(self, name: str) -> Any:
                if name in fixed:
                    asked[name] = fixed[name]
                return super().__getattribute__(name)

        sizes = [f.name for f in dataclasses.fields(Model) if f.name not in (*fixed, "name", "linears")]
        values = {"name": "", **fixed, **{size: self.table.name(f"model.{size}") for size in sizes}}
        named = [[self.table.name(f"model.linear {i} {what}") for what in OF_LINEAR] for i in range(LINEARS)]
        values["linears"] = tuple(("", *one) for one in named)
        # Made from one that does not watch: to copy a model is not to ask for what it holds, but for this.
        scored = _fields(scores_of(Model(**values)))
        asked["tied"] = fixed["tied"]
        return Watched(**values), Watched(**scored)

    def _seconds(self, job: Job) -> Number:
        device = DEVICES[job.engine]
        names: dict[str, Any] = {name: self.table.name(f"device.{name}") for name in device_numbers(device)}
        reached = Reached(**{k.partition(".")[2]: v for k, v in names.items() if k.startswith("reached.")})
        own = {name: value for name, value in names.items() if "." not in name}
        return self._time_of(job, dataclasses.replace(device, reached=reached, **own)).step_s
