"""Each process works on its share of a rollout's prompts; every process has what all of them found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.parallel.world import World
from trimtab.spread.deal import places_of
from trimtab.spread.heard import Heard, first_failure
from trimtab.spread.records import packed, unpacked
from trimtab.training.memory import out_of_memory

Work = Callable[[list[Group]], tuple[list[Group], dict[str, Any]]]
"""Prompts in; the groups that became of them, one each and in order, and what there is to tell (JSON)."""


def shared_out(
    prompts: list[Group], work: Work, here: World, *, together: bool = False
) -> tuple[list[Group], list[dict[str, Any]]]:
    """The groups of all prompts, in their order, and what each process told, in order of rank.

    ``work`` is called in every process, also with no prompts. What it makes of a prompt may differ from it in
    its responses alone. Where it fails in one process all raise: that one what it was, the others an
    InputError with the same words, or for what is no InputError with the number of the process. Where it
    fails in several all raise what the first of them by rank met.

    ``together``: the work makes passes of all processes (a model is spread). What is no InputError may then
    have come in the middle of one, where nobody can be told; it is raised here, which ends the others.
    """
    if here.alone:
        made, said = work(prompts)
        return made, [said]
    # As many to each, give or take one: what is sampled for a prompt costs more than the prompt.
    places = places_of(prompts, here.size, evenly=True)
    groups: list[Group] = []
    message, failed, words = b"", None, None
    try:
        groups, said = work([prompts[i] for i in places[here.rank]])
        message = packed([group.responses for group in groups], said)
    except Heard:
        raise
    except Exception as error:
        if together and not isinstance(error, InputError):
            raise
        # Told before it is raised: the others would wait for this share.
        failed, words = error, str(error)
        if not isinstance(error, InputError):
            words = f"process {here.rank}: {type(error).__name__}: {' '.join(words.split())[:300]}"
    # The very message that a phase of passes begins with, since that is where the others may be by now.
    if (first := first_failure(here, words)) is not None:
        if failed is not None and first[0] == here.rank:
            raise failed
        raise Heard(first[1]) from failed
    found = [unpacked(part) for part in here.gather_bytes(message)]
    out = list(prompts)
    for rank, (rows, _) in enumerate(found):
        own = groups if rank == here.rank else None
        for k, i in enumerate(places[rank]):
            out[i] = own[k] if own is not None else dataclasses.replace(prompts[i], responses=rows[k])
    return out, [told for _, told in found]


@contextmanager
def memory_in_one_line(doing: str, remedy: str, *, when: bool = True) -> Iterator[None]:
    """``when``, memory that runs out within is an InputError that says while ``doing`` what.

    Within a share, so that the other processes get the same line; of a spread model outside of it, since they
    wait in the middle of a pass and can be told nothing.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not when or not out_of_memory(error):
            raise
        raise InputError(
            f"{doing} ({' '.join(str(error).split())[:120]}): lower {remedy} and go on from the last "
            "checkpoint (run.resume)"
        ) from None
