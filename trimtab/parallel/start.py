"""Joining the processes that a launcher started: ``torchrun``, or a scheduler's ``srun``."""

from __future__ import annotations

import itertools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from trimtab.errors import InputError, Lost
from trimtab.parallel.environment import Place, launched, place
from trimtab.parallel.peers import Peer, myself
from trimtab.parallel.signals import Asked, asked
from trimtab.parallel.watch import NONE, Watch, put_on, store_at
from trimtab.parallel.world import FOR_EVER, World, enter, world

__all__ = ["joined", "launched", "not_joined"]

WAIT_S = 300.0
"""How long a process waits for the others to come."""
LOST_AFTER_S = 45.0
"""Silence after which a process counts as lost."""

_TIMES = itertools.count()
"""How often this process has joined: what one time left in the store is not read the next."""
STAY_S = 3.0
"""What a process that gives up stays for others that do, so that one speaks."""
_HELD: dict[str, Any] = {}
"""The word of a process that says what others found too."""
_STORE: dict[tuple[str, int], Any] = {}
"""The store that this process holds: it stays for those that meet there again, until another is held."""
TRY_S = 5.0
"""What one try to reach the store may take: no signal is heard within the part of it that PyTorch waits."""


@contextmanager
def joined(
    device: str = "cpu", *, wait_s: float = WAIT_S, lost_after_s: float = LOST_AFTER_S
) -> Iterator[World]:
    """Within it this process is one of those that the launcher started; alone where there is no launcher.

    ``device``: what models are for; with cuda each process takes the GPU of its number on its machine. Within
    another ``joined`` it changes nothing. Raises InputError for an environment that is incomplete, and where
    a process does not come. What ends one process within ends all: in one of them it is raised as it is, in
    the others as Lost, which has words only where a process was lost.
    """
    here = None if not world().alone else place()
    if here is None:
        yield world()
        return
    with asked():
        try:
            watch, connect = _meet(here, wait_s, lost_after_s)
        except (Asked, KeyboardInterrupt) as ended:
            if here.rank:
                raise Lost(code=143 if isinstance(ended, Asked) else 130) from None
            raise
        with watch.told(_disband):
            backend = "gloo" if _device(here, device) is None else "cpu:gloo,cuda:nccl"
            store = connect()
            store.set_timeout(FOR_EVER)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=here.rank,
                world_size=here.size,
                timeout=FOR_EVER,
            )
            mine = World(here.rank, here.size, here.local_rank, here.local_size)
            before, unwatched = enter(mine), put_on(watch)
            try:
                yield mine
            finally:
                enter(before)
                put_on(unwatched)


def _disband(failed: bool) -> None:
    """Take the processes' group apart; not NCCL's with messages under way, which it would wait for."""
    if dist.is_initialized() and not (failed and "nccl" in dist.get_backend_config()):
        dist.destroy_process_group()


def not_joined() -> bool:
    """A launcher started several processes, and this one has not joined the others."""
    return world().alone and not dist.is_initialized() and launched() > 1


def _device(here: Place, device: str) -> torch.device | None:
    """The GPU of this process, from here on its current one; None on a CPU."""
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if number and here.local_size > 1:
        raise InputError(
            f"model.device = {device!r} is one device, and this machine has {here.local_size} processes: use "
            '"cuda", with which each takes its own'
        )
    # A scheduler that binds tasks shows each its own device alone, as number 0.
    bound = here.launcher == "srun" and count == 1
    index = 0 if bound else int(number) if number.isdecimal() else here.local_rank
    if index >= count:
        raise InputError(
            f"process {here.rank} is number {here.local_rank} on {socket.gethostname()}, which has {count} "
            "GPU(s): start one process a GPU, or use model.device = cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(here: Place, wait_s: float, lost_after_s: float) -> tuple[Watch, Callable[[], Any]]:
    """Wait until all processes are there, and watch over them from here on."""
    until = time.monotonic() + wait_s
    holds = here.rank == 0 and not here.store_is_there
    first = _store(here, wait_s, holds=holds)
    name = f"trimtab/{here.attempt}/{next(_TIMES)}"

    def connect() -> Any:
        return dist.PrefixStore(name, store_at(here.address, here.port, lost_after_s))

    store = dist.PrefixStore(name, first)
    try:
        if here.rank == 0:
            store.set("fault", NONE)
        store.set(f"beat/{here.rank}", "0")
        store.set(f"here/{here.rank}", json.dumps(myself(here.rank)))
        store.add("came", 1)
        pause = 0.01
        while store.add("came", 0) < here.size:
            if time.monotonic() > until or store.add("given up", 0):
                _give_up(store, here, wait_s)
            time.sleep(pause)
            pause = min(0.5, pause * 1.3)
        told = store.multi_get([f"here/{rank}" for rank in range(here.size)])
    except RuntimeError:  # whoever held the store had waited long enough
        raise Lost(code=2) from None
    peers = [Peer(**json.loads(one)) for one in told]
    holder = None if here.store_is_there else 0
    watch = Watch(connect, here.rank, peers, lost_after_s=lost_after_s, store_of=holder, held=first)
    watch.begin()
    return watch, connect


def _give_up(store: Any, here: Place, wait_s: float) -> NoReturn:
    """The time is over: of those that came the first says who did not."""
    store.add("given up", 1)
    came = [rank for rank in range(here.size) if store.check([f"here/{rank}"])]
    missing = [rank for rank in range(here.size) if rank not in came]
    if here.rank == 0 and not here.store_is_there:
        until = time.monotonic() + STAY_S
        while store.add("given up", 0) < len(came) and time.monotonic() < until:
            time.sleep(0.05)
    if here.rank != came[0]:
        raise Lost(code=2)
    hosts = sorted({json.loads(store.get(f"here/{rank}"))["host"] for rank in came})
    raise InputError(
        f"{_named(missing)} of {here.size} did not come within {wait_s:.0f} s (parallel.wait_s) to "
        f"{here.address}:{here.port}; {_named(came)} did, on {', '.join(hosts[:5])}: start the missing, or "
        "look at what ended them"
    )


def _named(ranks: Sequence[int]) -> str:
    """ "process 3", "processes 0 to 5 and 7"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [f"{a}" if a == b else f"{a} to {b}" for a, b in spans]
    if len(texts) > 8:
        texts = [*texts[:7], f"{sum(b - a + 1 for a, b in spans[7:])} more"]
    listed = " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
    return f"{'process' if len(ranks) == 1 else 'processes'} {listed}"


def _store(here: Place, wait_s: float, *, holds: bool) -> Any:
    """The store in which all meet; held by the first process, where no launcher has one."""
    where = f"{here.address}:{here.port}"
    try:
        store = _held(here, wait_s) if holds else _reached(here, wait_s)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"process 0 cannot listen on {where} ({reason}): give another MASTER_PORT (torchrun "
            "--master-port), and for MASTER_ADDR the machine of process 0"
        ) from None
    if store is not None:
        return store
    if not _first_of_machine(where):
        raise Lost(code=2)
    who = "torchrun's store" if here.store_is_there else "process 0"
    raise InputError(
        f"process {here.rank} of {here.size}: {who} did not answer at {where} within {wait_s:.0f} s "
        "(parallel.wait_s): is MASTER_ADDR its machine, was it started, does a firewall stand between?"
    )


def _held(here: Place, wait_s: float) -> Any:
    """The store, held by this process; the one that it already holds there. Raises dist.DistError."""
    key = here.address, here.port
    if key not in _STORE:
        _STORE.clear()
        _STORE[key] = store_at(*key, wait_s, holds=True)
    _STORE[key].set_timeout(timedelta(seconds=wait_s))
    return _STORE[key]


def _reached(here: Place, wait_s: float) -> Any | None:
    """A connection to the store that another holds; None where it does not answer in time.

    PyTorch waits for it in a call within which no signal is heard, so it is asked only once someone listens.
    """
    until = time.monotonic() + wait_s
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((here.address, here.port), timeout=left).close()
            store = store_at(here.address, here.port, max(0.1, min(TRY_S, until - time.monotonic())))
        except (OSError, dist.DistError, RuntimeError, ValueError):
            time.sleep(0.1)
            continue
        store.set_timeout(timedelta(seconds=wait_s))
        return store
    return None


def _first_of_machine(where: str) -> bool:
    """Whether no other process of this machine says the same; none can be asked, so a name is taken.

    Where there are no such names (they are Linux's) everyone is the first.
    """
    if sys.platform != "linux":
        return True
    word = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        word.bind(f"\0trimtab/{where}")
    except OSError:
        word.close()
        return False
    _HELD[where] = word
    time.sleep(STAY_S)  # others came a little later
    return True
