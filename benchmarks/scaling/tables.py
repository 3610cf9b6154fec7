"""The tables of docs/scaling.md, each made from plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.scaling.cases import COUNTS, LEARNS, METHODS, MODELS, SAMPLES, Found, best, planned
from trimtab.planning.devices import find_device
from trimtab.planning.time import links_of, spent_on
from trimtab.planning.work import pieces

DEVICE = "H100"
CARDS = {"H100-SXM": "H100 80 GB", "A100-40GB": "A100 40 GB", "RTX-4090": "RTX 4090 24 GB"}
POWERS = (1, 2, 4, 8, 16, 32, 64)
PHASES = ("sampling", "scoring", "training", "update")
SHOWN = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}
KINDS = {
    "states": ("weights", "master weights", "gradients", "optimiser", "adapter"),
    "activations": ("activations",),
    "logits": ("logits", "workspace"),
    "cache": ("cache",),
    "gathered layers": ("gathered layer",),
    "CUDA and holes": ("allocator", "framework"),
}
"""Kinds of memory, as the page names what fills a device."""


def table(header: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """Markdown; the first ``words`` columns are text, the rest numbers."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * words + "---:|" * (len(names) - words)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def smallest(method: str, size: str, learns: str, card: str) -> str:
    """The fewest devices on which it fits, in powers of two, and how."""
    for count in POWERS:
        found = best(method, size, learns, card, count)
        if found.fits:
            return f"{count} {found.letters}".strip() + ("~" if found.barely else "")
    return "–"


def fewest() -> str:
    """Method by method and model by model, on three cards."""
    header = ["method", "model", *(f"{title}, {what}" for title in CARDS.values() for what in LEARNS)]
    rows = (
        [SHOWN[m], size, *(smallest(m, size, learns, card) for card in CARDS for learns in LEARNS)]
        for m in METHODS
        for size in MODELS
    )
    return table(header, rows, words=2)


def gib(found: Found) -> str:
    """The peak; in brackets where that does not fit."""
    shown = f"{found.gib:,.0f} {found.letters}".strip() + ("~" if found.barely else "")
    return shown if found.fits else f"({shown})"


def digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def seconds(found: Found) -> str:
    """Of a step; nothing where it does not fit."""
    return digits(found.step_s) if found.fits else "–"


def efficiency(cases: list[Found]) -> list[str]:
    """Of 8 and 64 devices, of the fewest of the three that fit: how much of their seconds is not lost."""
    own = next((one for one in cases if one.fits), None)
    if own is None:
        return ["–"] * (len(cases) - 1)
    spent = own.step_s * float(own.job.devices)
    return [
        "–" if not one.fits or one is own else f"{spent / (one.step_s * float(one.job.devices)):.0%}"
        for one in cases[1:]
    ]


def method(name: str) -> str:
    """Peak and seconds of a step on one, 8 and 64."""
    header = [
        *("model", "learns"),
        *(f"GiB, {n}" for n in COUNTS),
        *(f"s, {n}" for n in COUNTS),
        *(f"efficiency, {n}" for n in COUNTS[1:]),
    ]
    rows = []
    for size in MODELS:
        for learns in LEARNS:
            cases = [best(name, size, learns, DEVICE, count) for count in COUNTS]
            rows.append([size, learns, *map(gib, cases), *map(seconds, cases), *efficiency(cases)])
    return table(header, rows, words=2)


def spent(found: Found) -> dict[str, float]:
    """Seconds of a step, phase by phase."""
    assert found.plan.time is not None
    works = {work.phase: float(work.seconds) for work in found.plan.time.works}
    return {phase: works.get(phase, 0.0) for phase in PHASES}


def phases() -> str:
    """Shares of a step in the four phases, of the methods that sample."""
    rows = []
    for name in SAMPLES:
        for size in MODELS:
            cells = []
            for count in COUNTS:
                found = best(name, size, "all weights", DEVICE, count)
                whole = sum(spent(found).values())
                shares = " · ".join(f"{100 * part / whole:.0f}" for part in spent(found).values())
                cells.append(shares if found.fits else "–")
            rows.append([SHOWN[name], size, *cells])
    return table(["method", "model", *(f"on {n}, %" for n in COUNTS)], rows, words=2)


def fullest(found: Found) -> str:
    """The kind of memory that takes most at the peak, and its share."""
    phase = max(found.plan.memory.phases, key=lambda one: float(one.needed))
    sums = {
        name: sum(float(p.bytes) for p in phase.parts if p.kind in kinds) for name, kinds in KINDS.items()
    }
    first = max(sums, key=lambda name: sums[name])
    return f"{first} {100 * sums[first] / float(phase.needed):.0f} %"


def slowest(found: Found) -> str:
    """The phase that takes most of a step, its share, and what bounds it."""
    assert found.plan.time is not None
    parts = spent(found)
    first = max(parts, key=lambda name: parts[name])
    bound = next(work.bound for work in found.plan.time.works if work.phase == first)
    return f"{first} {100 * parts[first] / sum(parts.values()):.0f} %, {bound}"


def limits() -> str:
    """What fills a device and what takes the time, with all weights learning."""
    header = ["method", "model", *(f"{what}, {n}" for n in COUNTS for what in ("memory", "time"))]
    rows = []
    for name in METHODS:
        for size in MODELS:
            cases = [best(name, size, "all weights", DEVICE, count) for count in COUNTS]
            cells = [cell for one in cases for cell in (fullest(one), slowest(one) if one.fits else "–")]
            rows.append([SHOWN[name], size, *cells])
    return table(header, rows, words=8)


def on_the_link(found: Found) -> float:
    """Seconds of a step in which a device sends, hidden behind computing or not."""
    device = find_device(DEVICE)
    amounts = ((piece.amount, piece.compute) for piece in pieces(found.job))
    return sum(float(spent_on(amount, device, compute, found.job)["link"]) for amount, compute in amounts)


def holding() -> str:
    """Replicated, sharded over all and over a machine, on 64."""
    ways: dict[str, dict[str, Any]] = {
        "replicated": {"weights": "replicate"},
        "sharded over 8, 8 copies": {"weights": "shard", "shard_over": 8},
        "sharded over 64": {"weights": "shard"},
    }
    rows = []
    for size in MODELS:
        for title, way in ways.items():
            found = best("sft", size, "all weights", DEVICE, 64, **way)
            if found.fits:
                rows.append([size, title, gib(found), seconds(found), f"{on_the_link(found):.3g}"])
    return table(["model", "weights", "GiB", "s a step", "s on the link"], rows, words=2)


def gathering() -> str:
    """Sampling from whole weights and from layers gathered for each token."""
    rows = []
    for size in list(MODELS)[3:]:
        for count in COUNTS[1:]:
            cells = []
            for gather in ("whole", "layers"):
                found = best("grpo", size, "all weights", DEVICE, count, weights="shard", gather=gather)
                drawn = next(phase for phase in found.plan.memory.phases if phase.name == "sampling")
                took = f"{float(drawn.needed) / 2**30:,.0f}"
                cells += [took if found.fits else f"({took})", digits(spent(found)["sampling"])]
            rows.append([size, str(count), *cells])
    header = ["model", "devices", "whole: GiB", "s", "layer by layer: GiB", "s"]
    return table(header, rows)


def batches() -> str:
    """GRPO on 64 devices as a step grows: sampling is shared by more rows."""
    rows = []
    one = planned("grpo", "7B", "all weights", DEVICE, devices=8, weights="shard")
    each = one.step_s * 8 / float(one.job.batch.tokens)
    for groups in (64, 128, 256, 512, 1024):
        found = best("grpo", "7B", "all weights", DEVICE, 64, groups=groups)
        per_token = found.step_s * 64 / float(found.job.batch.tokens)
        share = spent(found)["sampling"] / found.step_s
        rows.append(
            [f"{groups:,}", f"{groups * 8 // 64}", seconds(found), f"{share:.0%}", f"{each / per_token:.0%}"]
        )
    header = ["prompts a step", "answers a device", "s a step", "of it sampling", "efficiency against 8"]
    return table(header, rows)


def links() -> str:
    """What is sent at, in the cards of the page."""
    rows = []
    for card, title in CARDS.items():
        device = find_device(card)
        whole, between = links_of(device, 64, 64)[0], links_of(device, 64, device.node_devices)[1]
        one = device.reached.link
        rows.append([title, *(f"{one * float(x):,.4g}" for x in (device.link, whole, between))])
    header = ["card", "within a machine", "all 64", "copies, one a machine"]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "fewest": fewest,
    "sft": lambda: method("sft"),
    "dpo": lambda: method("dpo"),
    "grpo": lambda: method("grpo"),
    "ppo": lambda: method("ppo"),
    "phases": phases,
    "limits": limits,
    "holding": holding,
    "gathering": gathering,
    "batches": batches,
    "links": links,
}
"""Name of a mark → its table."""
