"""Which of how many processes this one is, by what a launcher left in the environment. No torch.

``torchrun`` sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; these count
first. A step that ``srun`` starts has SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and the names of its
machines. The script that ``sbatch`` starts is no step: there only SLURM_NTASKS says how many there may be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.errors import InputError, Lost

PORTS = range(20000, 30000)
"""Of SLURM jobs, each by its number, where MASTER_PORT is not given; below those that systems hand out."""


@dataclass(frozen=True)
class Place:
    """This process among all, and where they meet."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str = "torchrun"
    """Or "srun"."""
    store_is_there: bool = False
    """torchrun keeps the store in which processes meet; elsewhere the first process does."""
    attempt: str = "0"
    """torchrun counts how often it has started the processes again."""


def place(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place; None without a launcher, and where there is one process.

    Raises InputError for an environment that is incomplete or contradicts itself; of a fault that all
    processes have the first says so, and in the others it is a Lost without words.
    """
    found = os.environ if environment is None else environment
    try:
        if found.get("RANK") is not None or found.get("WORLD_SIZE") is not None:
            return _torchrun(found)
        if found.get("SLURM_PROCID") is not None and found.get("SLURM_STEP_NUM_TASKS") is not None:
            return _slurm(found)
    except _OfAll as error:
        if quiet(found):
            raise Lost(code=2) from None
        raise InputError(str(error)) from None
    return None


def launched() -> int:
    """How many processes the launcher says that there are; 1 without one. Raises InputError."""
    here = place()
    return 1 if here is None else here.size


def quiet(environment: Mapping[str, str] | None = None) -> bool:
    """Another process has the word: this one's number is there, and not 0."""
    found = os.environ if environment is None else environment
    given = found.get("RANK", found.get("SLURM_PROCID", ""))
    return given.isascii() and given.isdecimal() and int(given) > 0


def _torchrun(found: Mapping[str, str]) -> Place | None:
    for one, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if found.get(other) is None:
            if _number(found, one) == (1 if one == "WORLD_SIZE" else -1):
                return None
            raise _OfAll(
                f"the environment has {one} without {other}: a launcher (torchrun) sets both; unset {one} to "
                "run in one process"
            )
    rank, size = _number(found, "RANK"), _number(found, "WORLD_SIZE")
    if size < 1 or rank >= size:
        raise (_OfAll if size < 1 else InputError)(
            f"RANK = {rank} and WORLD_SIZE = {size}: ranks are 0 to WORLD_SIZE - 1"
        )
    if size == 1:
        return None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not found.get(name)]
    if missing:
        raise _OfAll(
            f"WORLD_SIZE = {size} without {' and '.join(missing)}: where the processes meet; torchrun sets "
            "both, other launchers have to be told"
        )
    local = _number(found, "LOCAL_RANK") if "LOCAL_RANK" in found else rank
    locals_ = _number(found, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in found else max(size, local + 1)
    if local >= locals_ or locals_ > max(size, local + 1):
        raise InputError(
            f"LOCAL_RANK = {local} and LOCAL_WORLD_SIZE = {locals_} of {size}: a machine's processes are 0 "
            "to LOCAL_WORLD_SIZE - 1, and no more than all"
        )
    return Place(
        rank,
        size,
        local,
        locals_,
        found["MASTER_ADDR"],
        _port(found),
        store_is_there=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=found.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _slurm(found: Mapping[str, str]) -> Place | None:
    rank, size = _number(found, "SLURM_PROCID"), _number(found, "SLURM_STEP_NUM_TASKS")
    if size <= 1:
        return None
    if rank >= size:
        raise InputError(f"SLURM_PROCID = {rank} and SLURM_STEP_NUM_TASKS = {size}: not of one step")
    local = _number(found, "SLURM_LOCALID") if "SLURM_LOCALID" in found else rank
    nodes = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST") or found.get("SLURM_NODELIST")
    address = found.get("MASTER_ADDR") or first_host(nodes or "")
    if not address:
        raise _OfAll(
            f"SLURM_STEP_NUM_TASKS = {size} without SLURM_STEP_NODELIST: set MASTER_ADDR to task 0's machine"
        )
    job, step = found.get("SLURM_JOB_ID", "0"), found.get("SLURM_STEP_ID", "0")
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    port = _port(found) if found.get("MASTER_PORT") else PORTS[(7 * numbers[0] + numbers[1]) % len(PORTS)]
    return Place(rank, size, local, max(_local_size(found, size), local + 1), address, port, "srun")


def _local_size(found: Mapping[str, str], size: int) -> int:
    """Tasks of this machine, by ``SLURM_STEP_TASKS_PER_NODE`` ("2(x3),1") and ``SLURM_NODEID``."""
    counts: list[int] = []
    for part in found.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if (told := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())) is not None:
            counts += [int(told[1])] * int(told[2] or 1)
    node = found.get("SLURM_NODEID", "0")
    place = int(node) if node.isdecimal() else 0
    return counts[place] if place < len(counts) else size


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it.

    >>> first_host("gpu[003-010,12],login"), first_host("a1,a2"), first_host("r[1-2]n[07,9]")
    ('gpu003', 'a1', 'r1n07')
    """
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes.strip())
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


class _OfAll(InputError):
    """A fault that every process has."""


_OWN = {"RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"}
"""Variables that each process has its own value of: others may not know of a fault in them."""


def _number(found: Mapping[str, str], name: str) -> int:
    text = found[name]
    if not (text.isascii() and text.strip().isdecimal()):
        kind = InputError if name in _OWN else _OfAll
        raise kind(f"the environment variable {name} is {text!r}: it has to be a whole number")
    return int(text)


def _port(found: Mapping[str, str]) -> int:
    port = _number(found, "MASTER_PORT")
    if not 0 < port < 65536:
        raise _OfAll(f"MASTER_PORT = {port}: a port is a number from 1 to 65535")
    return port
