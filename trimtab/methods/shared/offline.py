"""What methods that learn from given feedback share: one step for each batch of the stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from trimtab.batch import TreeBatch
from trimtab.groups import Group
from trimtab.methods.shared.setup import Data, OnEval, held_out, tokens_of
from trimtab.models.tree_model import TreeModel
from trimtab.objectives.reduce import reduce_items
from trimtab.spread.deal import Sums, parts
from trimtab.training.loop import loop
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.schedule import learning_rate
from trimtab.training.state import State
from trimtab.training.update import update

Losses = Callable[[list[Group], TreeBatch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
"""A micro-batch's loss, weights and what is shown of it, a number a group: each ``[P]``."""


def accumulate_items(
    lm: TreeModel, optimiser: Optimiser, groups: list[Group], losses: Losses, max_tokens: int
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of one optimiser step; the loss and the means over groups of what is shown."""
    sums = Sums()
    for part in parts(lm, groups, max_tokens):
        loss_P, weights_P, shown = losses(part.groups, part.batch)
        loss = reduce_items(loss_P, len(groups), weights_P=weights_P)
        sums.backward(optimiser, loss, part, {key: float(value.sum()) for key, value in shown.items()})
    return sums.total(len(groups))


def learn_from(
    data: Data,
    lm: TreeModel,
    run: Run,
    state: State,
    total: int,
    gradient: Callable[[list[Group], int], tuple[float, dict[str, float]]],
    on_eval: OnEval | None,
) -> None:
    """Run the loop. ``gradient`` adds up that of some groups, in micro-batches of at most so many tokens."""

    def step() -> dict[str, Any]:
        began = time.perf_counter()
        groups = data.stream.batch(state.position, run.train.batch_groups)
        lr = learning_rate(run.train, state.step, total, state.tokens)
        done = update(run, state, groups, lambda tokens: gradient(groups, tokens), lr)
        lm.version += 1
        tokens = tokens_of(groups)
        state.step, state.position = state.step + 1, state.position + len(groups)
        state.tokens += tokens if done.done else 0
        return {
            **done.metrics(),
            "lr": lr,
            "tokens_per_s": tokens / (time.perf_counter() - began),
            "epoch": data.stream.epoch(state.position),
        }

    loop(run, state, total, step, evaluate=held_out(on_eval, lm, data, state))
