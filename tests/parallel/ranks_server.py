"""Forks the processes of a run, as a launcher would start them, but with torch imported once.

Reads one JSON object a line and answers each with one, when all processes have ended:

    {"arguments": [[…], […]], "environments": [{…}, {…}], "folder": DIR, "limit_s": 60,
     "fault": {"rank": 1, "step": 3, "do": "kill"}}          →      {"ended": [[75, 1.2], [-9, 0.4]]}

An end is the exit code, or minus the signal, and seconds since the fault (since the start without one).
``do`` is kill, stop, term, int, error (an InputError), bug, memory or wait:SECONDS, before the optimiser's
step of that number; a process that was stopped is killed once all others have ended. What rank 1 writes is
in DIR/1.out and DIR/1.err.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

WARM = [
    *("torch", "torch.distributed", "torch.distributed.fsdp", "safetensors.torch", "transformers", "peft"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("trimtab.methods.dpo", "trimtab.cli.main", "trimtab.evaluation.watching.during"),
    *("trimtab.parallel.start", "trimtab.studies.launch", "torch._dynamo"),
]


def main() -> int:
    """Serve until standard input ends."""
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        children = {}
        for rank in range(len(request["arguments"])):
            child = os.fork()
            if not child:
                be_a_process(rank, request)
            children[child] = rank
        print(json.dumps({"ended": wait(children, request, began)}), flush=True)
    return 0


def wait(children: dict[int, int], request: dict[str, Any], began: float) -> list[tuple[int, float]]:
    """How and when each ended; what is stopped is killed when it is the last."""
    ends: dict[int, tuple[int, float]] = {}
    mark = Path(request["folder"]) / "fault"
    while len(ends) < len(children):
        for child, rank in children.items():
            if rank in ends:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                since = float(mark.read_text()) if mark.exists() else began
                ends[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - since
        left = [child for child, rank in children.items() if rank not in ends]
        fault = request.get("fault") or {}
        only = len(left) == 1 and fault.get("do") == "stop" and children[left[0]] == fault["rank"]
        if only or time.monotonic() - began > request["limit_s"]:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [ends[rank] for rank in sorted(ends)]


def be_a_process(rank: int, request: dict[str, Any]) -> NoReturn:
    """The forked process: nothing of the server's is left in it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(request["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(folder / f"{rank}.{end}", os.O_WRONLY | os.O_CREAT, 0o600) for end in ("out", "err")]
    for target, source in enumerate([nothing, *files]):
        os.dup2(source, target)
    os.environ.update(request["environments"][rank])
    if "TEST_FOLDER" in os.environ:
        os.chdir(os.environ["TEST_FOLDER"])
    fault = request.get("fault")
    if fault and fault["rank"] == rank:
        install(folder / "fault", fault)
    sys.argv = ["trimtab", *request["arguments"][rank]]
    from trimtab.cli.main import main as command

    code: Any = 1
    try:
        command()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def install(mark: Path, fault: dict[str, Any]) -> None:
    """Let it happen before the step."""
    import torch

    from trimtab.errors import InputError
    from trimtab.training.optimiser import Optimiser

    own = Optimiser.backward
    done = 0
    numbers = {"kill": 9, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}

    def backward(self: Optimiser, *given: Any, **named: Any) -> float:
        nonlocal done
        done += 1
        if done == fault["step"]:
            mark.write_text(str(time.monotonic()))
            verb, _, value = fault["do"].partition(":")
            if verb in numbers:
                os.kill(os.getpid(), numbers[verb])
            elif verb == "wait":
                time.sleep(float(value))
            elif verb == "memory":
                raise torch.OutOfMemoryError("out of memory, as a test has it")
            elif verb == "bug":
                raise ZeroDivisionError("a fault of the code")
            else:
                raise InputError("one process has found something wrong")
        return own(self, *given, **named)

    Optimiser.backward = backward  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
