"""Small twins of modules: the same code over a few drawn weights in fp32.

Whether a kernel computes what a module computes is a question about the module's code. Its weights would only
blur the answer: freshly initialised ones hardly leave 0, where activations are alike, bf16 hides what differs
by less than 1 %, and stand-ins for weights that lie elsewhere are all one number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Draw:
    """Random numbers of its own: a run's are not touched."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Of mean 0 and standard deviation 1."""
        return torch.randn(shape, generator=self._generator)

    def linear(self, like: Any, inputs: int, outputs: int) -> nn.Linear:
        """A plain linear layer, with a bias where ``like`` has one; unit inputs give unit outputs."""
        bias = getattr(like, "bias", None) is not None
        made = nn.Linear(inputs, outputs, bias, device="meta")  # there, initialising draws nothing
        made.weight = nn.Parameter(self(outputs, inputs) * inputs**-0.5, requires_grad=False)
        if bias:
            made.bias = nn.Parameter(0.3 * self(outputs), requires_grad=False)
        return made


def twin_of(
    module: nn.Module,
    children: dict[str, nn.Module] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Any:
    """The module with these children and parameters in the place of its own; the rest is the very same."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    replaced = getattr(module.__dict__.get("forward"), "__func__", None)
    if hasattr(replaced, "replaces"):
        del made.__dict__["forward"]  # bound to the module, not to its twin
    drawn = {name: nn.Parameter(w, requires_grad=False) for name, w in (weights or {}).items()}
    made._modules = {**module._modules, **(children or {})}
    made._parameters = {**module._parameters, **drawn}
    return made


def only(twin: nn.Module, parts: Iterable[nn.Module]) -> bool:
    """Every parameter is one of these modules': none is left that was not drawn anew.

    What a parameter does that is 0 or 1 until it is trained, no check would see.
    """
    known = {id(p) for part in parts for p in part.parameters()}
    return all(id(p) in known for p in twin.parameters())
