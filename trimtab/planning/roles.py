"""The models beside the policy, and its adapter, as the methods load them (``models/roles.py``).

Without an adapter every role is a model of its own. Over one frozen base a reference that never learned is
the base itself; a snapshot, a refreshed reference and a critic are an adapter more.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from trimtab.errors import InputError
from trimtab.planning.job import BYTES, Adapter, Compute, Model, Role
from trimtab.planning.numbers import Number

HEADS = ("lm_head", "embed_out", "output_layer")
"""What the output head is called, for an adapter that is asked for on it."""


def reference_of(
    policy: Model,
    adapter: Adapter,
    *,
    named: Model | None = None,
    own: bool = False,
    averaged: Compute | None = None,
    when: Literal["always", "before"] = "always",
) -> Role:
    """The anchor: ``named`` where it is another model, else what the run starts from.

    ``own``: over an adapter it needs one of its own, being refreshed or going on from a saved one.
    ``averaged``: it is refreshed by a moving average, whose weights are kept as wide as masters, beside those
    in this dtype; over an adapter the adapter's alone.
    """
    if named is not None:
        return Role("reference", named, when=when, file=True)
    both = None if averaged is None else (8 if averaged == "float64" else 4) + BYTES[averaged]
    if adapter.kind != "none":
        return Role("reference", policy, shares_base=True, adapter=own, bytes=both, when=when)
    return Role("reference", policy, bytes=both, when=when)


def snapshot_of(policy: Model, adapter: Adapter) -> Role:
    """The copy of the weights that is sampled from while the policy learns (``overlap``)."""
    shared = adapter.kind != "none"
    # It is drawn from while others learn, so that nothing of it can be gathered.
    return Role("snapshot", policy, shares_base=shared, adapter=shared, whole=True)


def critic_of(model: Model, adapter: Adapter, *, own_base: bool = False) -> Role:
    """PPO's, of its own trunk, ``model`` with a score; ``own_base``: it starts from a model on another."""
    learns_by_one = adapter.kind != "none"
    shared = learns_by_one and not own_base
    return Role("critic", model, learns=True, shares_base=shared, adapter=learns_by_one, file=not shared)


def reward_model_of(model: Model, *, bytes: Number = 4, shared: bool = False, whole: bool = False) -> Role:
    """A learned reward in so many bytes a weight; ``shared``: an adapter on the policy's own base.

    ``whole``: it is never cut: an encoder, or one that a thread asks.
    """
    held = None if shared else bytes
    made = Role("reward model", model, bytes=held, shares_base=shared, adapter=shared, file=not shared)
    return replace(made, whole=whole and not shared)


def count_models(roles: Iterable[Role]) -> int:
    """Bases in memory, the policy's among them: ``models_in_memory`` of a run's lineage."""
    return 1 + sum(not role.shares_base for role in roles)


def adapter_of(
    model: Model,
    kind: Literal["none", "lora", "rslora", "dora"],
    rank: int = 16,
    *,
    targets: Sequence[str] = (),
    quantise: Literal["none", "nf4", "int8"] = "none",
) -> Adapter:
    """The adapter on these linear layers by name, or on all but the head.

    Raises InputError for a target that the model does not have, with the nearest names.
    """
    if kind == "none":
        return Adapter()
    linears = {name: (inputs + outputs, outputs, count) for name, inputs, outputs, count in model.linears}
    if not targets:
        layers = sum(count for _, _, count in linears.values()) or 7 * model.layers
        lengths = sum(out * count for _, out, count in linears.values())
        return Adapter(kind, rank, model.linear_ends, layers, quantise, lengths)
    ends: Number = 0
    lengths = 0
    layers = 0
    for target in dict.fromkeys(targets):
        name = target.rpartition(".")[2]
        if name in HEADS and name not in linears:
            ends, layers = ends + model.width + model.vocabulary, layers + 1
            lengths += model.vocabulary
            continue
        found = [sizes for known, sizes in linears.items() if known.rpartition(".")[2] == name]
        if not found:
            names = sorted({known.rpartition(".")[2] for known in linears})
            near = difflib.get_close_matches(name, names, n=3) or names
            raise InputError(
                f"adapter.targets: {model.name} has no linear layer {target!r}; did you mean "
                f"{', '.join(near)}?"
            )
        ends += sum(size * count for size, _, count in found)
        lengths += sum(out * count for _, out, count in found)
        layers += sum(count for *_, count in found)
    return Adapter(kind, rank, ends, layers, quantise, lengths)
