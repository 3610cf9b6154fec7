"""Forks a process for every run asked for, so that torch is imported once: a run then takes under a second.

Reads one JSON object a line from standard input and answers each with one, when the process has ended:

    {"spec": …, "arguments": […], "stdout": PATH, "stderr": PATH,
     "after_s": null, "signal": 9, "group": false, "limit_s": 60,
     "size": 1, "rank": 0, "both": false}      →      {"statuses": [−9], "wall_s": 0.4}

A status is the exit code, or minus the signal that ended the process. ``signal`` is sent after ``after_s``
seconds, with ``group`` to all of the process's group. With ``size`` 2 a run of two processes is forked, as
a launcher would start them: the signal and the spec's faults are for process ``rank``, and once that is
killed the other ends by itself, or is killed too (``both``). What process 1 writes is in PATH-1.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

import faults_driver

WARM = [
    *("torch", "safetensors.torch", "transformers", "transformers.models.llama.modeling_llama", "peft"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *(f"trimtab.methods.{name}" for name in ("sft", "reward", "dpo", "ppo", "grpo")),
    *("trimtab.cli.main", "trimtab.evaluation.watching.during", "trimtab.rewards.pool"),
    *("torch.distributed.fsdp", "torch._dynamo", "trimtab.parallel.start", "trimtab.studies.launch"),
]


def main() -> int:
    """Serve until standard input ends."""
    for name in WARM:
        importlib.import_module(name)
    # A collection in a forked process would touch, and so copy, all that was imported.
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = {"size": 1, "rank": 0, "both": False, **json.loads(line)}
        began = time.monotonic()
        children: list[int] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(request["size"]):
            child = os.fork()
            group = children[0] if children else child
            if not child:
                be_the_run(request, rank, port, group)
            with contextlib.suppress(OSError):  # the child does the same: whoever is first
                os.setpgid(child, group)
            children.append(child)
        statuses = watch(children, request)
        print(json.dumps({"statuses": statuses, "wall_s": time.monotonic() - began}), flush=True)
    return 0


def watch(children: list[int], request: dict[str, Any]) -> list[int]:
    """Wait for the processes, send what is to be sent; end them when they take too long."""
    began, sent = time.monotonic(), request["after_s"] is None
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        # Not yet waited for, so that the numbers can belong to no other processes.
        left = [child for child in children if child not in statuses]
        passed = time.monotonic() - began
        if not sent and passed >= request["after_s"]:
            marked = children[request["rank"]]
            if marked in left:
                (os.killpg if request["group"] else os.kill)(marked, request["signal"])
            sent = True
        if request["both"] and -signal.SIGKILL in statuses.values():
            for child in left:
                os.kill(child, signal.SIGKILL)
        elif passed > request["limit_s"]:
            if len(children) > 1:
                os.kill(left[0], signal.SIGABRT)  # not mistaken for a kill that was asked for
                request["limit_s"] += 5
            else:
                os.killpg(children[0], signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[child] for child in children]


def be_the_run(request: dict[str, Any], rank: int, port: int, group: int) -> NoReturn:
    """The forked process: nothing of the server's is left in it."""
    with contextlib.suppress(OSError):
        os.setpgid(0, group if rank else 0)
    spec, after = dict(request["spec"]), f"-{rank}" if rank else ""
    if request["size"] > 1:
        names = dict.fromkeys(("RANK", "LOCAL_RANK"), rank) | dict.fromkeys(SIZES, request["size"])
        os.environ.update({name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        spec["log"] += after
        if rank != request["rank"]:
            spec.pop("faults", None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(request[name] + after, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in NAMES]
    for target, source in enumerate([nothing, *files]):
        os.dup2(source, target)
        os.close(source)
    code = faults_driver.drive(spec, request["arguments"])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking every module apart, which would copy them as well


NAMES = ("stdout", "stderr")
SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")

if __name__ == "__main__":
    sys.exit(main())
