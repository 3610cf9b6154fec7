"""What an option allows the whole run, for each of its processes. No torch."""

from __future__ import annotations

from trimtab.parallel.environment import place


def processes() -> int:
    """How many share what is the whole run's."""
    here = place()
    return 1 if here is None else here.size


def own_part(total: int) -> int:
    """This process's part of a number of things at once that is the run's; at least one."""
    here = place()
    return total if here is None else max(1, total // here.size + (here.rank < total % here.size))


def machine_part(total: int) -> int:
    """This process's part of a number that is each machine's; at least one."""
    here = place()
    if here is None:
        return total
    return max(1, total // here.local_size + (here.local_rank < total % here.local_size))
