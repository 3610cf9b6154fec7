"""What a decoder is made of, as sizes: linear weights, layers, and what the planner reads off them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.errors import InputError
from trimtab.planning.job import Model


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear weight of a layer; or of its experts, stacked into one tensor."""

    name: str
    """Of the module or the stacked tensor, without what it is part of."""
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    """Experts."""
    used: int = 1
    """Experts that one token goes through."""
    adapts: bool = True
    """A module of its own, which an adapter can be put on; stacked experts and most routers are none."""

    @property
    def weights(self) -> int:
        """Of one copy, without its bias."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Of one copy."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    linears: tuple[Linear, ...]
    other: int
    """Parameters of norms, attention sinks and the like."""
    inner: int
    """Width of the MLP, over the experts that a token goes through."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.other + sum(part.copies * part.parameters for part in self.linears)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A decoder."""

    layers: tuple[Layer, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int
    key: int
    value: int
    vocabulary: int
    context: int
    tied: bool
    embedded: int = 0
    """Width of the embedding; 0 for that of the hidden states."""
    positions: int = 0
    """Rows of a learnt position embedding."""
    outside: tuple[Linear, ...] = ()
    """Linear weights before the first layer or after the last, the head apart."""
    other: int = 0
    """Parameters of norms outside the layers."""
    head_bias: bool = False
    window: int = 0
    windowed: int = 0
    experts: int = 0
    experts_used: int = 0
    matrices: int = 3
    norms: int = 2
    head_norms: int = 0
    norm: Literal["rms", "layer"] = "rms"
    gate: Literal["silu", "gelu", "none"] = "silu"
    packed: bool = True
    latent: bool = False

    def model(self, name: str, family: str) -> Model:
        """What the planner needs of it."""
        parts = [part for layer in self.layers for part in layer.linears] + list(self.outside)
        table = self.vocabulary * (self.embedded or self.width)
        embedding = table + self.positions * self.width
        head = (0 if self.tied else table) + (self.vocabulary if self.head_bias else 0)
        parameters = (
            embedding
            + head
            + self.other
            + sum(layer.parameters for layer in self.layers)
            + sum(part.copies * part.parameters for part in self.outside)
        )
        inner = sum(layer.inner for layer in self.layers)
        linears = _counted(parts)
        return Model(
            name=name,
            family=family,
            parameters=parameters,
            active=parameters - sum((p.copies - p.used) * p.parameters for p in parts),
            layers=len(self.layers),
            width=self.width,
            query=self.heads * self.head_width,
            key=self.key,
            value=self.value,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_width=self.head_width,
            inner=inner // len(self.layers) if inner % len(self.layers) == 0 else inner / len(self.layers),
            matrices=self.matrices,
            linear=sum(p.copies * p.weights for p in parts),
            active_linear=sum(p.used * p.weights for p in parts),
            linear_ends=sum((inputs + outputs) * count for _, inputs, outputs, count in linears),
            tensor=max(table, self.positions * self.width, *(p.copies * p.weights for p in parts)),
            layer=max(layer.parameters for layer in self.layers),
            vocabulary=self.vocabulary,
            embedding=embedding,
            head=head,
            context=self.context,
            window=self.window if self.windowed else 0,
            windowed=self.windowed,
            experts=self.experts,
            experts_used=self.experts_used,
            norms=self.norms,
            head_norms=self.head_norms,
            norm=self.norm,
            gate=self.gate,
            tied=self.tied,
            packed=self.packed,
            latent=self.latent,
            linears=linears,
        )


def _counted(parts: Iterable[Linear]) -> tuple[tuple[str, int, int, int], ...]:
    """Those that an adapter can be put on, by name and size, with how many there are."""
    found: dict[tuple[str, int, int], int] = {}
    for part in parts:
        if part.adapts:
            key = (part.name, part.inputs, part.outputs)
            found[key] = found.get(key, 0) + part.copies
    return tuple((*key, count) for key, count in found.items())


class Fields:
    """A configuration's fields, each under one name, with the family's defaults for those left out.

    Every reading raises InputError, one line with the field's name, for a value that is no such thing.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def size(self, name: str) -> int:
        """A whole number of at least 1."""
        found = self.optional(name)
        if found is None:
            raise InputError(f"{self.where}: {name} is missing; a model's size needs it")
        return found

    def optional(self, name: str, *, least: int = 1) -> int | None:
        """A whole number, or None for null and what is left out."""
        found = self.values.get(name)
        if found is None:
            return None
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise InputError(f"{self.where}: {name} is {found!r}; it is a whole number of at least {least}")
        return found

    def flag(self, name: str) -> bool:
        """true or false; null counts as false."""
        found = self.values.get(name)
        if found is None or isinstance(found, bool):
            return bool(found)
        raise InputError(f"{self.where}: {name} is {found!r}; it is true or false")

    def text(self, name: str) -> str:
        """Text; null counts as none."""
        found = self.values.get(name) or ""
        if not isinstance(found, str):
            raise InputError(f"{self.where}: {name} is {found!r}; it is text")
        return found

    def items(self, name: str) -> list[Any] | None:
        """A list, or None for null."""
        found = self.values.get(name)
        if found is None or isinstance(found, list | tuple):
            return None if found is None else list(found)
        raise InputError(f"{self.where}: {name} is {found!r}; it is a list")

    def divided(self, name: str, by: str, whole: int, parts: int) -> int:
        """``whole / parts``, which leaves no rest."""
        if whole % parts:
            raise InputError(f"{self.where}: {name} {whole} is not a multiple of {by} {parts}")
        return whole // parts
