"""Stages in order: who starts from whom, which blocks are repeated, and what each name stands for when.

A stage starts from the newest policy before it, unless it names another. A name means the newest run of that
stage: in a repeated block the runs are called NAME-1, NAME-2, …, and ``replaces = "rm"`` makes a stage's runs
the newest of ``rm``. ``{NAME}`` stands for that run's folder in any string of a later stage. Everything is
worked out, and every option of every stage checked, before the first one runs.

Seeds count up by one from iteration to iteration, so that none repeats the noise and the order of the one
before it.
"""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.errors import InputError
from trimtab.studies.config import StudyFile, check_folder
from trimtab.studies.planner import Planner
from trimtab.studies.records import Order, PipelineStage, Repeat


def in_order(
    study: StudyFile, stages: dict[str, PipelineStage], repeats: list[Repeat], table: str = "stages"
) -> Order:
    """Work out every step. Raises InputError for the first option, of any stage, that cannot be meant."""
    try:
        runs = list(_runs(stages, repeats, table))
    except ValueError as error:
        raise InputError(str(error)) from None
    order = Order()
    for name, iteration in runs:
        folder = f"{name}-{iteration}" if iteration else name
        planner = Planner(
            study, order, f"{table}.{name}", stages[name], folder, name, iteration, list(stages)
        )
        step = planner.step()
        order.steps.append(step)
        order.latest[name] = step
        if step.stage.replaces:
            order.latest[step.stage.replaces] = step
        if step.kind == "policy":
            order.policy = step.folder
    return order


def _runs(stages: dict[str, PipelineStage], repeats: list[Repeat], table: str) -> Iterator[tuple[str, int]]:
    """(stage, iteration from 1, or 0 outside a block), in order. Raises ValueError."""
    names = list(stages)
    block_of: dict[str, Repeat] = {}
    for number, block in enumerate(repeats):
        key = f"repeat.{number}.stages"
        if not block.stages:
            raise ValueError(f"{key} is empty: name the stages that are run {block.times} times")
        for name in block.stages:
            if name not in stages:
                raise ValueError(f"{key}: {name!r} is no stage; there are {', '.join(names)}")
            if name in block_of:
                raise ValueError(f"{key}: {name!r} is named twice: a stage is in one block, once")
            block_of[name] = block
        first = names.index(block.stages[0])
        if names[first : first + len(block.stages)] != block.stages:
            raise ValueError(
                f"{key}: {', '.join(block.stages)} do not follow each other in the file in this order"
            )
    for name in names:
        check_folder(f"{table}.{name}", name)
        repeated = block_of.get(name)
        if repeated is None:
            yield name, 0
        elif name == repeated.stages[0]:
            for k in range(1, repeated.times + 1):
                for inner in repeated.stages:
                    if f"{inner}-{k}" in stages:
                        raise ValueError(f"{table}.{inner}-{k}: iteration {k} of {inner!r} has this folder")
                    yield inner, k
