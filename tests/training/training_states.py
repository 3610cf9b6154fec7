"""A state around a linear layer, and what the tests of saving do to it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trimtab.groups import Group, Response
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.state import State


def new(seed: int = 0, dtype: torch.dtype = torch.bfloat16, width: int = 3) -> tuple[nn.Module, State]:
    """The layer and its state before the first step."""
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    return model, State(Optimiser(model, TrainConfig(grad_clip=0.0), dtype))


def advance(model: nn.Module, state: State) -> None:
    """One optimiser step on random inputs."""
    inputs = torch.randn(4, 3, dtype=next(model.parameters()).dtype)
    state.optimiser.backward(model(inputs).float().square().mean())
    state.optimiser.step(0.01)
    state.step += 1


def group(text: str = "b") -> Group:
    """One with numbers that decimal notation rounds."""
    response = Response(
        text=text, tokens=[3, 2], old_logps=[-0.1, -1 / 3], reward=1.0, reward_terms={"x": 1.0}
    )
    return Group(id="f:0", prompt="a", prompt_tokens=[5], responses=[response], columns={"n": [1]})


def everything(state: State) -> dict[str, Any]:
    """All that a checkpoint has to bring back, comparable by ``==``."""
    tensors = {**state.optimiser.tensors(), **state.extra, "noise": torch.get_rng_state()}
    return {
        "tensors": {name: (t.dtype, t.shape, t.flatten().tolist()) for name, t in tensors.items()},
        "plain": copy.deepcopy(
            [state.step, state.position, state.tokens, state.controllers, state.pending, state.ahead]
        ),
    }
