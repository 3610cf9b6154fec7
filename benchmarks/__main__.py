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
        metavar="N",
        help="timed steps a side and case, after the warm-up (default: the benchmark's, in list)",
    )
    command.add_argument(
        "--case", metavar="NAME", help="only this case, or those of this allocator or variant: '4 epochs'"
    )
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
    if options.runs is not None and options.runs < 1:
        raise InputError(f"--runs {options.runs}: expected at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder; make it first")
    if not _cases(options):
        names = harness.cases_of(BENCHMARKS[options.name])
        raise InputError(f"--case {options.case!r}: expected a part of {'; '.join(names)}")


def _cases(options: argparse.Namespace) -> list[str]:
    """The cases that ``--case`` names: by the whole name, or by its allocator or variant."""
    cases = harness.cases_of(BENCHMARKS[options.name])
    return [case for case in cases if options.case in (None, case, *case.split(", "))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parser().parse_args(arguments)
    if options.name == "list":
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:8}{benchmark.summary} ({benchmark.runs} timed steps a side and case)")
        return 0
    try:
        _check(options)
        benchmark = BENCHMARKS[options.name]
        sides = [options.side] if options.side else ["ours", "peer"]
        with harness.launcher_for(benchmark, sides, options.keep) as launcher:
            result = harness.run(benchmark, launcher, _cases(options), options.runs)
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
