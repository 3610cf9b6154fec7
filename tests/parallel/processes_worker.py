"""One process of the pool in ``processes.py``: reads what to run on its standard input, a JSON object a line.

Ends when that input does, even in the middle of a call that waits for another process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from trimtab.kernels import build
from trimtab.parallel import start
from trimtab.parallel.start import joined


def encoded(value: Any) -> Any:
    """For ``json.dumps(default=…)``: what JSON has no form of."""
    if isinstance(value, Path):
        return {"__path__": str(value)}
    raise TypeError(f"a process is told JSON and paths, not {type(value).__name__}")


def decoded(value: dict[str, Any]) -> Any:
    """The inverse, for ``json.loads(object_hook=…)``."""
    return Path(value["__path__"]) if value.keys() == {"__path__"} else value


def _read(asked: queue.Queue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    os._exit(1)


def call(order: dict[str, Any]) -> dict[str, Any]:
    """Run what was asked for among the processes that were asked; the answer, or what went wrong."""
    before = dict(os.environ)
    os.environ.update(order["environment"])
    torch.set_num_threads(1)
    try:
        for folder in order["folders"]:
            if folder not in sys.path:
                sys.path.insert(0, folder)
        function = getattr(importlib.import_module(order["module"]), order["function"])
        # The store is a new one, and a process that was started later has joined less often.
        start._TIMES = itertools.count()
        with joined() if order["join"] else contextlib.nullcontext():
            found = function(**order["given"])
        # A run sets these for the whole process; the next call does not inherit them.
        build.use(True)
        gc.collect()
        return {"found": found}
    except BaseException:
        return {"error": traceback.format_exc()}
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    """Answer until the input ends."""
    # What a run prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    while True:
        answer = call(json.loads(asked.get(), object_hook=decoded))
        try:
            line = json.dumps(answer, default=encoded)
        except (TypeError, ValueError):
            line = json.dumps({"error": traceback.format_exc()})
        answers.write(line + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
