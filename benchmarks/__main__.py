"""``python -m benchmarks list``, ``python -m benchmarks NAME --json FILE``, and what shows the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, plot, tables
from benchmarks.catalogue import BENCHMARKS
from benchmarks.machine import describe_machine
from benchmarks.parity import cases as parity_cases
from benchmarks.plan import command as plan
from benchmarks.scale import command as scale
from trimtab.errors import InputError

PRECISION = "precision"
PARITY = "parity"
PLAN, REPLAN, PLAN_TIME = "plan", "replan", "plan-time"
SCALE = "scale"
SCALING = "scaling"
OTHERS = {
    PLAN: "every method in a dozen settings: the plan's peak beside the measured one, in fresh processes",
    REPLAN: "plan the rows of a result of plan again, measuring nothing: replan plan.json",
    PARITY: "50 steps of every method beside TRL's, on the same batches: loss and gradient norm",
    PLAN_TIME: "step times planned from a calibration of this machine, beside those of real runs",
    SCALE: "five methods in one process and in two, replicated and sharded: throughput, memory, messages",
    PRECISION: "200 steps of DPO and of GRPO in bf16 against fp32: curves, final metrics, gold reward",
    SCALING: "plan one, eight and 64 GPUs for 0.5B to 70B and write the tables of docs/scaling.md",
    "table": "write the tables of benchmarks/results into docs/performance.md",
    "plot": "draw a result of growth: plot growth.json growth.svg",
}
"""Names that are not a comparison of two sides."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time Trimtab beside its peers, both sides in turn."
    )
    command.add_argument("name", metavar="NAME", help="a benchmark, or 'list' to name them")
    what = "plot: a result and a picture; replan: a result"
    command.add_argument("files", nargs="*", type=Path, metavar="FILE", help=what)
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
    names = [*BENCHMARKS, *OTHERS]
    if options.name not in names:
        raise InputError(f"unknown benchmark {options.name!r}: expected list, {', '.join(names)}")
    if options.runs is not None and options.runs < 1:
        raise InputError(f"--runs {options.runs}: expected at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder; make it first")
    if options.name == "plot":
        if len(options.files) != 2 or not options.files[0].is_file():
            raise InputError("plot: expected two files, a result of growth and the picture to write")
    elif options.name == REPLAN:
        if len(options.files) != 1:
            raise InputError("replan: expected one file, a result of plan")
        if not options.files[0].is_file():
            raise InputError(f"replan: no such file: {options.files[0]}; plan --json FILE writes one")
    elif options.files:
        raise InputError(f"{options.name}: unexpected {options.files[0]}; a result is written by --json FILE")
    if options.name in OTHERS:
        allowed = {PARITY: ("case",), PLAN: ("case",), SCALE: ("case", "runs")}
        for option in ("runs", "case", "side"):
            if getattr(options, option) is not None and option not in allowed.get(options.name, ()):
                raise InputError(f"--{option} has no effect with {options.name}")
        if options.name == PARITY and not _parity_cases(options):
            raise InputError(f"--case {options.case!r}: expected a part of {'; '.join(parity_cases.NAMES)}")
        if options.name == PLAN and not _plan_cases(options):
            raise InputError(f"--case {options.case!r}: expected a part of a name as {plan.names()[0]!r}")
        if options.name == SCALE and not _scale_cases(options):
            raise InputError(f"--case {options.case!r}: expected a part of {'; '.join(scale.names())}")
        return
    benchmark = BENCHMARKS[options.name]
    if not _cases(options):
        cases = harness.cases_of(benchmark)
        raise InputError(f"--case {options.case!r}: expected a part of {'; '.join(cases)}")
    if options.side == "peer" and benchmark.peer_module is None:
        raise InputError(f"--side peer: {options.name} has no peer")


def _cases(options: argparse.Namespace) -> list[str]:
    """The cases that ``--case`` names: by the whole name, or by its allocator, its variant or a part of
    that."""
    benchmark = BENCHMARKS[options.name]
    return [
        case
        for case in harness.cases_of(benchmark)
        if options.case in (None, case, case.rpartition(", ")[0], *case.split(", "))
    ]


def _parity_cases(options: argparse.Namespace) -> list[str]:
    """The parity cases that ``--case`` names: one, or those that begin with the same word."""
    return [name for name in parity_cases.NAMES if options.case in (None, name, name.split(", ")[0])]


def _plan_cases(options: argparse.Namespace) -> list[str]:
    """The cases of plan that hold ``--case``."""
    return [name for name in plan.names() if options.case is None or options.case in name]


def _scale_cases(options: argparse.Namespace) -> list[str]:
    """The cases of scale that hold ``--case``."""
    return [name for name in scale.names() if options.case is None or options.case in name]


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result of a comparison, or of the precision study."""
    if options.name == PRECISION:
        from benchmarks import precision

        rows = precision.run(Path.cwd() / harness.CACHE / PRECISION)
        result = {"name": PRECISION, "setting": precision.SETTING, "machine": describe_machine({})}
        return {**result, "rows": rows}
    if options.name == PARITY:
        from benchmarks.parity import command

        parity = command.run(_parity_cases(options), Path.cwd() / harness.CACHE)
        print(command.show(parity["rows"]), file=sys.stderr)
        return parity
    if options.name in (PLAN, REPLAN):
        folder = Path.cwd() / harness.CACHE
        if options.name == PLAN:
            result = plan.run(_plan_cases(options), folder)
        else:
            result = plan.replanned(_result_of_plan(options.files[0]), folder / PLAN)
        print(plan.show(result), file=sys.stderr)
        return result
    if options.name == SCALE:
        found = scale.run(_scale_cases(options), Path.cwd() / harness.CACHE, options.runs)
        print(scale.show(found), file=sys.stderr)
        return found
    if options.name == PLAN_TIME:
        from benchmarks.plan import steps

        return steps.run(Path.cwd() / harness.CACHE)
    benchmark, cases = BENCHMARKS[options.name], _cases(options)
    sides = [options.side] if options.side else ["ours", "peer"]
    with harness.launcher_for(benchmark, sides, options.keep, cases) as launcher:
        return harness.run(benchmark, launcher, cases, options.runs)


def _result_of_plan(file: Path) -> dict[str, Any]:
    """Raises InputError for another file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"replan: {file} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("name") != PLAN or not isinstance(found.get("rows"), list):
        raise InputError(f"replan: {file} is no result of plan; plan --json FILE writes one")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parser().parse_args(arguments)
    if options.name == "list":
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:10}{benchmark.summary} ({benchmark.runs} timed steps a side and case)")
        for name, summary in OTHERS.items():
            print(f"{name:10}{summary}")
        return 0
    try:
        _check(options)
        if options.name == "plot":
            plot.draw_growth(*options.files)
            return 0
        if options.name == SCALING:
            from benchmarks.scaling import page as scaling

            print(f"{scaling.PAGE}: {'written' if scaling.write() else 'is what the planner says today'}")
            return 0
        if options.name == "table":
            for page in tables.write_pages():
                print(page)
            return 0
        result = _measure(options)
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
