"""How data flow through each method: what is given, which model makes what of it, what learns from it.

A page draws these; nodes stand from left to right in the order of ``column``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["data", "model", "values", "loss"]
"""data: given or sampled text. model: weights. values: numbers of responses or tokens. loss: what is
minimised.
"""


@dataclass(frozen=True, slots=True)
class Node:
    """A box."""

    id: str
    label: str
    kind: Kind
    column: int
    """From 0, left to right."""
    learns: bool = False
    role: str = ""
    """Of a model: policy, reference, critic, reward model."""
    optional: bool = False
    """There only with some options: a reward that is no model, say."""


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow, from what is read to what is made of it."""

    source: str
    target: str
    label: str


@dataclass(frozen=True, slots=True)
class Flow:
    """Of one method."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def _data(label: str, *, id: str = "data") -> Node:
    return Node(id, label, "data", 0)


def _policy(column: int, label: str = "policy") -> Node:
    return Node("policy", label, "model", column, learns=True, role="policy")


def _reference(column: int) -> Node:
    return Node("reference", "reference", "model", column, role="reference")


def _loss(label: str, column: int) -> Node:
    return Node("loss", label, "loss", column)


def _learns(model: str = "policy") -> Edge:
    return Edge("loss", model, "gradient")


def demonstration_flow() -> Flow:
    """SFT."""
    return Flow(
        (_data("prompt + demonstration"), _policy(1), _loss("−mean log π", 2)),
        (Edge("data", "policy", "tokens"), Edge("policy", "loss", "log π of the response"), _learns()),
    )


def pair_flow(anchored: bool, loss: str) -> Flow:
    """DPO and its kin; without ``anchored`` there is no reference."""
    nodes = [_data("prompt + chosen, rejected"), _policy(1), _loss(loss, 2)]
    edges = [
        Edge("data", "policy", "one tree: the prompt once"),
        Edge("policy", "loss", "log π of both"),
        _learns(),
    ]
    if anchored:
        nodes.append(_reference(1))
        edges += [
            Edge("data", "reference", "once, before the first step"),
            Edge("reference", "loss", "log π_ref of both, kept with the pairs"),
        ]
    return Flow(tuple(nodes), tuple(edges))


def label_flow() -> Flow:
    """KTO."""
    return Flow(
        (
            _data("prompt + response + thumb"),
            Node("mismatched", "each prompt, the next one's response", "data", 0),
            _policy(1),
            _reference(1),
            Node("baseline", "z_ref = max(0, mean log π/π_ref)", "values", 2),
            _loss("1 − σ(± β·(log π/π_ref − z_ref))", 3),
        ),
        (
            Edge("data", "policy", "tokens"),
            Edge("data", "reference", "once, before the first step"),
            Edge("data", "mismatched", "of the batch"),
            Edge("mismatched", "policy", "without gradient"),
            Edge("mismatched", "reference", "each step"),
            Edge("policy", "baseline", "log π"),
            Edge("reference", "baseline", "log π_ref"),
            Edge("policy", "loss", "log π"),
            Edge("reference", "loss", "log π_ref"),
            Edge("baseline", "loss", "z_ref"),
            _learns(),
        ),
    )


def ranking_flow() -> Flow:
    """A policy from rankings."""
    return Flow(
        (
            _data("prompt + K ranked responses"),
            _policy(1),
            _reference(1),
            _loss("−log Plackett–Luce of β·log π/π_ref", 2),
        ),
        (
            Edge("data", "policy", "one tree: the prompt once"),
            Edge("data", "reference", "once, before the first step"),
            Edge("policy", "loss", "log π of all K"),
            Edge("reference", "loss", "log π_ref, kept with the rankings"),
            _learns(),
        ),
    )


def mixed_flow() -> Flow:
    """Pairs, labels and demonstrations in one run."""
    kinds = ("pairs", "labels", "demonstrations")
    return Flow(
        (
            *(_data(kind, id=kind) for kind in kinds),
            _policy(1),
            _reference(1),
            _loss("weighted sum: DPO + KTO + likelihood", 2),
        ),
        (
            *(Edge(kind, "policy", "tokens") for kind in kinds),
            *(Edge(kind, "reference", "once, before the first step") for kind in kinds[:2]),
            Edge("policy", "loss", "log π"),
            Edge("reference", "loss", "log π_ref, and KTO's baseline each step"),
            _learns(),
        ),
    )


def score_flow() -> Flow:
    """A reward model."""
    model = Node("policy", "reward model", "model", 1, learns=True, role="policy")
    return Flow(
        (_data("prompt + compared responses"), model, _loss("−log σ(r_chosen − r_rejected)", 2)),
        (
            Edge("data", "policy", "one tree: the prompt once"),
            Edge("policy", "loss", "a score at each end token"),
            _learns(),
        ),
    )


def step_flow() -> Flow:
    """A process reward model."""
    model = Node("policy", "process reward model", "model", 1, learns=True, role="policy")
    return Flow(
        (_data("prompt + steps, each right or wrong"), model, _loss("cross-entropy of each step", 2)),
        (
            Edge("data", "policy", "tokens"),
            Edge("policy", "loss", "a score at each step's end"),
            _learns(),
        ),
    )


def self_play_flow() -> Flow:
    """SPIN: the policy is its own opponent and reference."""
    return Flow(
        (
            _data("prompt + demonstration"),
            _policy(1),
            Node("samples", "the model's own answer", "data", 2),
            Node("anchor", "log π_t of both, kept with the pairs", "values", 2),
            _loss("−log σ(β·gap of log π/π_t)", 3),
        ),
        (
            Edge("data", "policy", "prompt; demonstration"),
            Edge("policy", "samples", "answers, at each iteration's start"),
            Edge("policy", "anchor", "before it learns"),
            Edge("samples", "policy", "rejected"),
            Edge("policy", "loss", "log π of both"),
            Edge("anchor", "loss", "log π_t"),
            _learns(),
        ),
    )


def _judged(column: int) -> Node:
    return Node(
        "reward",
        "reward: function, verifier, model or judge",
        "model",
        column,
        role="reward model",
        optional=True,
    )


def online_pair_flow() -> Flow:
    """Online DPO."""
    return Flow(
        (
            _data("prompt"),
            _policy(1),
            Node("samples", "answers of the policy", "data", 2),
            _judged(3),
            _reference(3),
            Node("pairs", "better, worse", "values", 4),
            _loss("−log σ(β·gap of log π/π_ref)", 5),
        ),
        (
            Edge("data", "policy", "prompt"),
            Edge("policy", "samples", "samples, anew for each rollout"),
            Edge("samples", "reward", "text"),
            Edge("reward", "pairs", "an order"),
            Edge("samples", "reference", "tokens"),
            Edge("reference", "loss", "log π_ref"),
            Edge("pairs", "loss", "which is better"),
            Edge("policy", "loss", "log π"),
            _learns(),
        ),
    )


def relative_flow(loss: str) -> Flow:
    """GRPO and its kin."""
    return Flow(
        (
            _data("prompt"),
            _policy(1),
            Node("samples", "a group of G answers", "data", 2),
            _judged(3),
            _reference(3),
            Node("advantage", "advantage: reward against its group", "values", 4),
            _loss(loss, 5),
        ),
        (
            Edge("data", "policy", "prompt"),
            Edge("policy", "samples", "samples, with their log-probabilities"),
            Edge("samples", "reward", "text"),
            Edge("reward", "advantage", "a reward each"),
            Edge("samples", "reference", "tokens, for the KL"),
            Edge("reference", "loss", "log π_ref"),
            Edge("advantage", "loss", "of every token of a response"),
            Edge("policy", "loss", "log π, log π_old"),
            _learns(),
        ),
    )


def actor_critic_flow() -> Flow:
    """PPO."""
    return Flow(
        (
            _data("prompt"),
            _policy(1),
            Node("samples", "answers", "data", 2),
            _judged(3),
            _reference(3),
            Node("critic", "critic", "model", 3, learns=True, role="critic"),
            Node("advantage", "token advantages and returns (GAE)", "values", 4),
            _loss("clipped ratio × advantage; squared error of the value", 5),
        ),
        (
            Edge("data", "policy", "prompt"),
            Edge("policy", "samples", "samples, with their log-probabilities"),
            Edge("samples", "reward", "text"),
            Edge("samples", "reference", "tokens"),
            Edge("samples", "critic", "tokens"),
            Edge("reward", "advantage", "a reward at the last token"),
            Edge("reference", "advantage", "−β·KL at each token"),
            Edge("critic", "advantage", "a value at each token"),
            Edge("advantage", "loss", "of each token"),
            Edge("policy", "loss", "log π, log π_old"),
            Edge("critic", "loss", "values"),
            _learns(),
            _learns("critic"),
        ),
    )
