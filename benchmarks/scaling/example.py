"""The worked example of docs/scaling.md: each line a sum to be done with a pencil, and what the planner says.

A line's sum is text, as the page shows it; ``worked_out`` does it. A test holds every line to the planner.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.scaling.cases import GIB, Found, planned
from benchmarks.scaling.tables import DEVICE, table
from trimtab.planning import gpu
from trimtab.planning.devices import find_device
from trimtab.planning.time import spent_on
from trimtab.planning.work import pieces

CASE = ("grpo", "7B", "all weights")
COUNT = 8
OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the example."""

    what: str
    sum: str
    unit: str
    """GiB, s, or nothing for a plain number."""
    planned: float
    """What the planner says, in bytes, seconds or numbers."""


def case() -> Found:
    """The plan that the example repeats."""
    return planned(*CASE, DEVICE, devices=COUNT)


def worked_out(line: Line) -> float:
    """The sum of a line, in its unit."""
    text = line.sum.replace(",", "").replace("·", "*").replace("−", "-").replace("10⁹", "1000000000.0")
    value = _value(ast.parse(text.replace("10¹²", "1000000000000.0"), mode="eval").body)
    return value / GIB if line.unit == "GiB" else value


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int | float)
    return float(node.value)


def memory() -> list[Line]:
    """Of one device, at the fullest moment of training."""
    phase = next(one for one in case().plan.memory.phases if one.name == "training")

    def part(role: str, *kinds: str) -> float:
        return sum(float(p.bytes) for p in phase.parts if p.role == role and p.kind in kinds)

    states = ("weights", "gradients", "optimiser")
    each = 28 * 225_400 + 22_028
    lines = [
        Line(
            "policy: fp32 weights, gradients, two moments",
            "16 · 7,615,616,512 / 8",
            "GiB",
            part("policy", *states),
        ),
        Line("reference in bf16", "2 · 7,615,616,512 / 8", "GiB", part("reference", "weights")),
        Line(
            "cache: blocks of 32 tokens, 8 prompts of 16, 64 answers of 32",
            "(8 · 16 + 64 · 32) · 32 · 28 · (512 + 512) · 2",
            "GiB",
            part("policy", "cache"),
        ),
        Line(
            "kept of a token by a layer: norms, attention, MLP",
            "16 · 3,584 + 8 + 2 · (2 · 3,584 + 2 · 512) + 4 · 28 + 8 · 18,944",
            "",
            float(gpu.gpu_kept(case().job.model, "bfloat16")),
        ),
        Line("kept of a token in 28 layers and around them", "28 · 225,400 + 22,028", "", each),
        Line(
            "activations of 7,680 tokens",
            "7,680 · (28 · 225,400 + 22,028)",
            "GiB",
            part("policy", "activations"),
        ),
        Line("hidden states of 7,168 answer tokens", "7,168 · 3,584 · 2", "GiB", part("policy", "logits")),
        Line(
            "at the head: hidden gradients, a chunk of 110 rows with entropy, two gradients of its weight",
            "7,168 · 3,584 · 2 + 110 · 152,064 · 2 · 9 + 2 · 2 · 544,997,376",
            "GiB",
            part("policy", "workspace"),
        ),
        Line(
            "gathered: embedding, head and last norm; two layers; the head's gradient; gradients of a layer",
            "2 · (2 · 544,997,376 + 3,584) + 4 · 233,057,792 + 2 · 544,997,376 + 6 · 233,057,792",
            "GiB",
            part("policy", "gathered layer"),
        ),
    ]
    sums = sum(worked_out(line) for line in lines if line.unit == "GiB")
    used = f"{sums:.2f}"
    return [
        *lines,
        Line(
            "cuBLAS, and 3 % of the above for holes",
            f"67,108,864 + 0.03 · {used} · {GIB:,}",
            "GiB",
            part("", "allocator"),
        ),
        Line("CUDA and NCCL", f"(0.5 + 0.3) · {GIB:,}", "GiB", part("", "framework")),
    ]


def time() -> list[Line]:
    """Of one optimiser step."""
    found, device = case(), find_device(DEVICE)
    works = list(pieces(found.job))

    def spent(phase: str, *kinds: str, at: int = 0) -> float:
        piece = [one for one in works if one.phase == phase][at]
        seconds = {
            str(k): float(v) for k, v in spent_on(piece.amount, device, piece.compute, found.job).items()
        }
        return sum(seconds[kind] for kind in kinds)

    whole = {work.phase: float(work.seconds) for work in found.plan.time.works}  # type: ignore[union-attr]
    products, memory = "(989 · 10¹² · 0.6)", "(3,350 · 10⁹ · 0.75)"
    return [
        Line(
            "training, computing: layers forward and backward; head, forward twice; attention, 3.5 forwards",
            f"6 · 73,728 · 6,525,288,448 / {products} + 8 · 65,536 · 152,064 · 3,584 / {products} "
            "+ 3.5 · 4 · 3,584 · 28 · 69,242,880 / (989 · 10¹² · 0.35)",
            "s",
            spent("training", "compute"),
        ),
        Line(
            "training, memory: elementwise, 10 micro-batches of weights and gradients; logits",
            "(2 · 73,728 · (4 · 28 · 90,112 + 3 · 8,443,904) "
            "+ 10 · (4 · 6,525,288,448 + 10 · 7,615,616,512)) "
            f"/ {memory} + 65,536 · 152,064 · 74 / (3,350 · 10⁹ · 0.5)",
            "s",
            spent("training", "memory"),
        ),
        Line(
            "training, link: layers gathered twice, the root once, gradients reduced; 5 µs a hop",
            "10 · 7 / 8 · (8 · 7,615,616,512 − 2 · 1,089,998,336) / (450 · 10⁹ · 0.7) "
            "+ 10 · (29 + 57) · 7 · 0.000005",
            "s",
            spent("training", "link"),
        ),
        Line(
            "training: computing and memory, behind which the link is hidden",
            "5.627 + 2.926",
            "s",
            whole["training"],
        ),
        Line(
            "sampling: 1,024 steps read the weights, 65,536 tokens their keys and values",
            "(1,024 · 2 · (6,525,288,448 + 544,997,376) + 65,536 · 2,048 · 28 · (512 / 8 + 512)) "
            "/ (3,350 · 10⁹ · 0.7)",
            "s",
            float(works[[w.phase for w in works].index("sampling")].amount.decode_bytes) / (3350e9 * 0.7),
        ),
        Line(
            "sampling: launches and rows, which run beside that",
            "28 · (1,024 + 1.2) · 0.00015 + 65,536 · 0.000005",
            "s",
            spent("sampling", "overhead"),
        ),
        Line(
            "sampling: whole weights are gathered once; 5 µs a hop",
            "7 / 8 · 2 · 7,615,616,512 / (450 · 10⁹ · 0.7) + 29 · 7 · 0.000005",
            "s",
            spent("sampling", "link", at=1),
        ),
        Line(
            "sampling: with reading the prompts and drawing", "7.098 + 0.180 + 0.043", "s", whole["sampling"]
        ),
        Line(
            "scoring, computing: the reference's forward pass",
            f"2 · 73,728 · 6,525,288,448 / {products} + 2 · 65,536 · 152,064 · 3,584 / {products} "
            "+ 4 · 3,584 · 28 · 69,242,880 / (989 · 10¹² · 0.35)",
            "s",
            spent("scoring", "compute"),
        ),
        Line("scoring: with its memory", "1.822 + 0.761", "s", whole["scoring"]),
        Line(
            "update: 40 bytes of each weight",
            "40 · 7,615,616,512 / 8 / (3,350 · 10⁹ · 0.8)",
            "s",
            whole["update"],
        ),
        Line("a step", "8.553 + 7.321 + 2.583 + 0.014", "s", found.step_s),
    ]


def shown(lines: list[Line]) -> str:
    """As a table."""
    rows = []
    for line in lines:
        digits = 0 if not line.unit else 2 if line.unit == "GiB" else 3
        rows.append([line.what, line.sum, f"{worked_out(line):,.{digits}f} {line.unit}".strip()])
    return table(["what", "sum", "is"], rows, words=2)


def all_of_memory() -> str:
    """The lines of memory, and what they come to."""
    lines = memory()
    sums = " + ".join(f"{worked_out(line):.2f}" for line in lines if line.unit)
    peak = next(float(one.bytes) for one in case().plan.memory.phases if one.name == "training")
    return shown(lines) + f"| **all** | {sums} | **{peak / GIB:.2f} GiB** |\n"
