"""``python -m benchmarks list`` and ``python -m benchmarks NAME --json FILE``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.settings import BENCHMARKS
from trimtab.errors import InputError


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time Trimtab beside its peers, both sides in turn."
    )
    command.add_argument("name", metavar="NAME", help="a benchmark, or 'list' to name them")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    command.add_argument(
        "--runs",
        type=int,
        default=harness.RUNS,
        metavar="N",
        help=f"timed steps a side and case, after {harness.WARM_UP} of warm-up (default {harness.RUNS})",
    )
    command.add_argument("--case", choices=list(harness.CASES), help="only this case")
    command.add_argument(
        "--side", choices=["ours", "peer"], help="only this side; the other's figures are null"
    )
    command.add_argument(
        "--keep", action="store_true", help="keep the workers' folders, with their logs, in .benchmarks/runs"
    )
    return command


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything is computed, what would fail after it.

    Raises InputError, naming the option.
    """
    if options.name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {options.name!r}: expected list, {', '.join(BENCHMARKS)}")
    if options.runs < 1:
        raise InputError(f"--runs {options.runs}: expected at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder; make it first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parser().parse_args(arguments)
    if options.name == "list":
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:8}{benchmark.summary}")
        return 0
    try:
        _check(options)
        benchmark = BENCHMARKS[options.name]
        sides = [options.side] if options.side else ["ours", "peer"]
        cases = [options.case] if options.case else list(harness.CASES)
        with harness.launcher_for(benchmark, sides, options.keep) as launcher:
            result = harness.run(benchmark, launcher, cases, options.runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except harness.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
    if options.json is not None:
        options.json.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
