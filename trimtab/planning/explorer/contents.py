"""What the page holds: formulas as data, and the words around them, from the cards of methods and models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.planning import devices, look, models
from trimtab.planning.explorer import drawing
from trimtab.planning.explorer.graphs import (
    ADAPTED,
    METHODS,
    OPTIONS,
    SIZES,
    Formulas,
    Tracer,
    combinations,
    device_numbers,
    model_numbers,
    model_options,
)
from trimtab.planning.job import Model
from trimtab.planning.memory import memory_of
from trimtab.planning.method_card import Card
from trimtab.planning.methods import CARDS
from trimtab.planning.result import KINDS, MARGIN, PHASES
from trimtab.planning.roles import adapter_of
from trimtab.planning.time import time_of

ROLES = ("policy", "reference", "critic", "reward model", "snapshot", "")
"""In the order of the table."""
SHORT = {"ppo": "PPO", "dpo": "DPO", "grpo": "GRPO", "kto": "KTO", "simpo": "SimPO", "orpo": "ORPO"}
WORDS: dict[str, list[tuple[str, str]]] = {
    "shard": [("yes", "states sharded over them (FSDP2)"), ("no", "a whole copy on each")],
    "adapter": [("none", "all weights"), ("lora", "a LoRA adapter on every linear layer")],
    "compute": [("bfloat16", "bfloat16"), ("float32", "float32")],
    "recompute": [("none", "kept for the backward pass"), ("all", "computed again in the backward pass")],
    "reward": [("function", "a function or a verifier"), ("model", "a reward model of the policy's size")],
}
"""How the page words each option that its reader sets."""
KIND_WORDS = {
    "weights": "what is computed with, in the precision that was chosen",
    "master weights": "the float32 copy that the optimiser changes",
    "gradients": "one number for each weight that learns",
    "optimiser": "AdamW's two running means of the gradients",
    "adapter": "the small matrices that learn instead of the weights",
    "activations": "what a forward pass keeps for the backward pass",
    "logits": "scores over the vocabulary, and their gradient",
    "cache": "keys and values of the answers that are being sampled",
    "gathered layer": "one layer's weights, fetched from all devices",
    "workspace": "what a computation needs for a moment",
    "file": "pages of the file that weights are read from",
    "allocator": "holes between tensors of different sizes",
    "framework": "code, libraries, and on a GPU its context",
}
DEFAULTS: dict[str, Any] = {
    "prompt": 512,
    "response": 512,
    "groups": 16,
    "responses": 8,
    "micro_batch_tokens": 8192,
    "rank": 16,
    "devices": 1,
    "shard": "yes",
    "adapter": "none",
    "compute": "bfloat16",
    "recompute": "none",
    "reward": "function",
}
FIRST_MODEL, FIRST_DEVICE = "Qwen/Qwen3-1.7B", "H100-SXM"
"""What the page shows when it is opened, where there are such cards."""
FOOTNOTE = (
    "Models in memory: while training, with the method's defaults and a reward that is a function. DPO "
    "computes its reference's log-probabilities before the first step and lets it go; over an adapter all "
    "roles stand on one base. The bars count what the settings above come to. Fits, if barely: "
    f"plans have been wrong by as much as {MARGIN:.0%}."
)


@dataclass(frozen=True, slots=True)
class Contents:
    """Of one page."""

    data: dict[str, Any]
    """What its script reads."""
    said: dict[str, Any]
    """What its template writes."""
    methods: list[dict[str, Any]]
    """Those, with their drawings as markup."""


def contents(cards: Mapping[str, Model] | None = None) -> Contents:
    """Trace the planner for every combination and collect what is shown beside."""
    cards = models.cards() if cards is None else cards
    data = written(cards)
    data |= {
        "methods": [
            {"key": name, "title": SHORT[name], "rollouts": CARDS[name].rollouts} for name in METHODS
        ],
        "phase_names": list(PHASES),
        "phase_words": PHASES,
        "kinds": list(KINDS),
        "letters": [look.letter(kind) for kind in KINDS],
        "roles": list(ROLES),
        "worst_error": MARGIN,
        "defaults": DEFAULTS | _first(cards),
    }
    methods = [_method(CARDS[name]) for name in METHODS]
    return Contents(data, _said(cards), methods)


def written(cards: Mapping[str, Model]) -> dict[str, Any]:
    """The formulas of every combination, and the numbers of every model and device.

    ``which``: for each place of ``dimensions`` (the last turning first) one of ``graphs``: the formulas of
    the least micro-batch and of a step's seconds, then its ``phases``. A phase: its name, then its
    ``parts``. A part: role, kind, formula.
    """
    tracer = Tracer(memory_of, time_of)
    kinds = {_key(model_options(model)): model for model in cards.values()}
    found = [tracer.formulas(c, model) for model in kinds.values() for c in combinations()]
    distinct = list({id(formulas): formulas for formulas in found}.values())
    table, places = tracer.table.written(_wanted(distinct), [*SIZES, *_names(cards)])
    phases: dict[tuple[int, ...], int] = {}
    parts: dict[tuple[int, int, int], int] = {}
    graphs: dict[int, tuple[int, ...]] = {}
    # In the order of _wanted.
    following = iter(places)
    for formulas in distinct:
        graph = [next(following), next(following)]
        for phase in formulas.memory.phases:
            held = [(ROLES.index(p.role), KINDS.index(p.kind), next(following)) for p in phase.parts]
            numbers = (parts.setdefault(part, len(parts)) for part in held)
            graph.append(phases.setdefault((list(PHASES).index(phase.name), *numbers), len(phases)))
        graphs[id(formulas)] = tuple(graph)
    once = {graph: i for i, graph in enumerate(dict.fromkeys(graphs.values()))}
    return {
        "table": table,
        "parts": list(parts),
        "phases": list(phases),
        "graphs": list(once),
        "which": [once[graphs[id(formulas)]] for formulas in found],
        "dimensions": [["kind", list(kinds)], ["method", METHODS], *([k, v] for k, v in OPTIONS.items())],
        "models": [_model(name, model) for name, model in cards.items()],
        "devices": [_device(card) for card in devices.CARDS.values()],
    }


def _wanted(found: Sequence[Formulas]) -> Iterator[Any]:
    for formulas in found:
        yield formulas.budget
        yield formulas.step_s
        for phase in formulas.memory.phases:
            yield from (part.bytes for part in phase.parts)


def _names(cards: Mapping[str, Model]) -> list[str]:
    model = next(iter(cards.values()))
    device = next(iter(devices.CARDS.values()))
    return [f"model.{name}" for name in (*model_numbers(model), ADAPTED)] + [
        f"device.{name}" for name in device_numbers(device)
    ]


def _key(options: Mapping[str, Any]) -> str:
    return ".".join(str(value) for value in options.values())


def _model(name: str, model: Model) -> dict[str, Any]:
    numbers = model_numbers(model) | {ADAPTED: adapter_of(model, "lora").layers}
    return {
        "key": name,
        "title": name.rpartition("/")[2],
        "kind": _key(model_options(model)),
        "numbers": {f"model.{key}": value for key, value in numbers.items()},
        "context": model.context,
        "said": _model_said(model),
    }


def _model_said(model: Model) -> str:
    known = [f"{look.count(model.parameters)} parameters"]
    if model.experts:
        known.append(f"{look.count(model.active)} of them for a token")
    known.append(f"{model.layers} layers of width {model.width:,}")
    known.append(f"{model.vocabulary:,} tokens" + (", embeddings tied" if model.tied else ""))
    return "; ".join(known)


def _device(card: devices.Device) -> dict[str, Any]:
    numbers = {f"device.{key}": value for key, value in device_numbers(card).items()}
    return {"key": card.name, "engine": card.engine, "gib": card.memory_gib, "numbers": numbers}


def _first(cards: Mapping[str, Model]) -> dict[str, Any]:
    device = devices.CARDS.get(FIRST_DEVICE) or next(iter(devices.CARDS.values()))
    model = FIRST_MODEL if FIRST_MODEL in cards else next(iter(cards))
    return {"model": model, "device": device.name, "memory": device.memory_gib}


def _said(cards: Mapping[str, Model]) -> dict[str, Any]:
    families: dict[str, list[tuple[str, str]]] = {}
    for name, model in cards.items():
        label = f"{name.rpartition('/')[2]} ({look.count(model.parameters)})"
        families.setdefault(name.partition("/")[0], []).append((name, label))
    listed = [
        (card.name, f"{card.name.replace('-', ' ')}, {card.memory_gib:g} GiB")
        for card in devices.CARDS.values()
    ]
    colours = [(colour, _ink(colour)) for colour in (look.COLOURS.get(kind, "#888888") for kind in KINDS)]
    return {
        "families": list(families.items()),
        "devices": listed,
        "choices": WORDS,
        "colours": colours,
        "kinds": [(kind, KIND_WORDS.get(kind, "")) for kind in KINDS],
        "compared": _compared([CARDS[name] for name in METHODS]),
        "footnote": FOOTNOTE,
    }


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on the colour (WCAG 2's relative luminance)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def _method(card: Card) -> dict[str, Any]:
    return {
        "key": card.name,
        "title": SHORT[card.name],
        "summary": card.title,
        "paper": card.paper,
        "drawing": drawing.draw(
            card.flow, f"Data flow of {SHORT[card.name]}; the list beside it says the same"
        ),
        "told": drawing.told(card.flow),
    }


def _compared(cards: Sequence[Card]) -> dict[str, Any]:
    header = ["Samples", "Data", "Reward", "Critic", "Reference", "Models in memory", "Best for"]
    references = {
        "none": "none",
        "once": "before the first step, then gone",
        "kept": "kept for the run",
    }
    rows = [
        (
            card.name,
            SHORT[card.name],
            [
                "its own" if card.rollouts else "none",
                card.feedback,
                card.reward_source,
                "yes" if card.critic else "no",
                references[card.reference],
                _models(card),
                card.best_for,
            ],
        )
        for card in cards
    ]
    return {"header": header, "rows": rows}


def _models(card: Card) -> str:
    learned = ", and a learned reward's" if "reward model" in card.roles else ""
    usual = (
        f"; usually {card.models_usual}" if card.models_usual != card.models_in_memory + bool(learned) else ""
    )
    return f"{card.models_in_memory}{learned}{usual}"
