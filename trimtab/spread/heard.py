"""What one process met and the others have to hear of, wherever in their work they are by then."""

from __future__ import annotations

from trimtab.errors import InputError
from trimtab.parallel.world import World


class Heard(InputError):
    """What a process met, raised in all that heard of it: nobody waits to hear of it again."""


def first_failure(here: World, words: str | None) -> tuple[int, str] | None:
    """The first process by rank that has failed, and what it met; None where all go on. Collective.

    ``words``: what this process met. One message, the same where a share of the work ends as where a phase of
    passes begins: a process that failed between two phases meets there those that are about to begin one.
    """
    for rank, said in enumerate(here.gather(words)):
        if said is not None:
            return rank, said
    return None
