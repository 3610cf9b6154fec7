"""A plan on the terminal: what was taken to be so, memory as a table and as bars, time, cost.

Colours only where a terminal has them; the bars' letters say the same. Everything is ASCII where the output
is no terminal or not UTF-8.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.planning.look import (
    GIB,
    MIB,
    NOTHING,
    count,
    duration,
    fact,
    in_unit,
    kinds_of,
    letter,
    money,
    operations,
    printable,
    size,
)
from trimtab.planning.result import KINDS, MARGIN, Plan, Time
from trimtab.planning.showing.bars import WIDEST, bars, legend, style_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from trimtab.planning.advice import Advice

EFFECTS = {
    "same": "same result",
    "rounding": "same within rounding",
    "log": "a figure of the log less",
    "another": "another result",
}
ONCE = ("loading", "reference once")
"""Works that are not part of a step."""


def show_plan(plan: Plan, console: Console) -> None:
    """Title, facts, warnings, the verdict, memory by phase and kind, bars, time."""
    say = _sayer(console)
    say(plan.title, "bold")
    for told in packed(facts_of(plan.facts), console.width):
        say(told, "dim")
    for warning in plan.warnings:
        say(warning, "yellow", 2, "warning: ")
    say(verdict(plan), {True: "bold green", False: "bold red", None: "bold"}[plan.fits], 2)
    say("")
    _print_whole(memory_table(plan, console), console)
    say("")
    for line in bars([(phase.name, phase) for phase in plan.memory.phases], plan.available, console):
        say(line)
    if plan.time is not None:
        say("")
        _print_whole(time_table(plan.time), console)
        say("")
        for told in time_lines(plan.time):
            say(told, "", 4)


def show_plans(title: str, plans: Mapping[str, Plan], failed: Mapping[str, str], console: Console) -> None:
    """Several methods side by side: a row each, then a bar each of its fullest phase.

    What holds for all is said once. ``failed``: why a method has no plan.
    """
    say = _sayer(console)
    say(title, "bold")
    for told in packed(common_facts(plans), console.width):
        say(told, "dim")
    warned: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for warning in plan.warnings:
            warned.setdefault(warning, []).append(name)
    for warning, names in warned.items():
        whose = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        say(f"{whose}{warning}", "yellow", 2, "warning: ")
    say("")
    _print_whole(methods_table(plans), console)
    say("")
    limits = {plan.available for plan in plans.values()}
    limit = limits.pop() if len(limits) == 1 else None
    rows = [(name, plan.memory.fullest) for name, plan in plans.items()]
    for line in [*bars(rows, limit, console), *legend([phase for _, phase in rows], console)]:
        say(line)
    for name, why in failed.items():
        say(why, "", 2, f"{name}: no plan: ")


def common_facts(plans: Mapping[str, Plan]) -> list[str]:
    """The facts that every one of the plans states alike."""
    told = [facts_of(plan.facts) for plan in plans.values()]
    return [one for one in told[0] if all(one in other for other in told)] if told else []


def show_advice(advice: Advice, console: Console) -> None:
    """The changes with what each saves, the options in one line, and what comes of them."""
    say = _sayer(console)
    peak = size(float(advice.plan.memory.peak))
    say("")
    if not advice.changes:
        say("no change of options makes it smaller", "bold")
    elif advice.fits:
        say(f"with these changes it fits, with a peak of {peak}:", "bold")
    else:
        say(f"these changes do not suffice, with a peak of {peak}:", "bold")
    for change in advice.changes:
        options = " ".join(f"--{key} {value}" for key, value in change.options.items())
        saved = f"{change.phase} -{size(change.saves)}" if change.saves > 0 else "with the others"
        say(f" ({saved}; {EFFECTS[change.effect]})", "", 6, f"  {printable(options)}")
        say(f"      {change.why}", "dim", 6)
    if len(advice.changes) > 1:
        say(f"  all at once: {advice.options()}", "", 6)
    if advice.otherwise:
        say(f"  {advice.otherwise}", "", 4)


def verdict(plan: Plan) -> str:
    """One sentence: does it fit."""
    peak, phase = float(plan.memory.peak), plan.memory.fullest.name
    at = f"peak {size(peak)} ({phase})"
    if plan.available is None:
        return f"{at}; nobody knows what the device has: give --memory or --device"
    if not plan.fits:
        return f"does not fit: {at}, {size(peak - plan.available)} over the {size(plan.available)} there are"
    used = 100 * peak / plan.available
    share = (
        f"{at}, {used:.0f} % of {size(plan.available)}" if used >= 0.5 else f"{at} of {size(plan.available)}"
    )
    if (1 + MARGIN) * peak > plan.available:
        return f"fits, if barely: {share}, and plans have been wrong by {MARGIN:.0%}"
    return f"fits: {share}"


def facts_of(facts: Mapping[str, Any]) -> list[str]:
    """``key value`` each; what is not known or empty is left out."""
    told = {printable(key).replace("_", " "): fact(value) for key, value in facts.items()}
    return [f"{key} {value}" for key, value in told.items() if value != NOTHING]


def packed(items: Sequence[str], room: int) -> list[str]:
    """The items in lines that fit, broken between items; one that is longer stands alone."""
    lines = list[str]()
    for item in items:
        if lines and len(lines[-1]) + len(item) + 3 <= min(room, WIDEST):
            lines[-1] = f"{lines[-1]}; {item}"
        else:
            lines.append(item)
    return [*(f"{line};" for line in lines[:-1]), *lines[-1:]]


def memory_table(plan: Plan, console: Console) -> Table:
    """Kinds down, phases across, then the same bytes by model where there are several."""
    from rich.text import Text

    phases = plan.memory.phases
    unit = GIB if plan.memory.peak >= GIB else MIB
    by_kind = [kinds_of(phase) for phase in phases]
    many = plan.time is not None and plan.time.devices > 1
    head = f"{'GiB' if unit == GIB else 'MiB'}{' a device' if many else ''}"
    table = _table([head, *(phase.name for phase in phases)], left=1)
    for kind in (kind for kind in KINDS if any(kind in held for held in by_kind)):
        name = Text.assemble((letter(kind), style_of(kind, console)), f" {kind}")
        table.add_row(name, *(in_unit(held.get(kind, 0.0), unit) for held in by_kind))
    table.add_section()
    peak = plan.memory.peak
    totals = [Text(in_unit(p.bytes, unit), style="bold" if p.bytes == peak else "") for p in phases]
    table.add_row(Text("  all", style="bold"), *totals)
    roles = list(dict.fromkeys(part.role for phase in phases for part in phase.parts if part.role))
    if len(roles) > 1:
        table.add_section()
        for role in [*roles, ""]:
            held = [float(sum(p.bytes for p in phase.parts if p.role == role)) for phase in phases]
            if any(held):
                table.add_row(f"  {role or 'of no model'}", *(in_unit(bytes, unit) for bytes in held))
    return table


def time_table(time: Time) -> Table:
    """A row for each phase of a step; what is done once stands below."""
    table = _table(["a step", "operations", "bytes", "time", "bound by"], left=1)
    steps = [work for work in time.works if work.phase not in ONCE]
    once = [work for work in time.works if work.phase in ONCE]
    for works in (steps, once):
        for work in works:
            table.add_row(
                work.phase if works is steps else f"{work.phase.removesuffix(' once')} (once)",
                operations(work.flops) if work.flops else NOTHING,
                size(work.bytes) if work.bytes else NOTHING,
                duration(float(work.seconds)),
                work.bound,
            )
        table.add_section()
    return table


def time_lines(time: Time) -> list[str]:
    """A step, the run, tokens, cost."""
    many = f"{time.devices} x " if time.devices != 1 else ""
    steps = round((time.run_s - time.once_s) / time.step_s) if time.step_s else 0
    once = f"; {duration(float(time.once_s))} of the run are spent once" if time.once_s else ""
    made = f"; {count(float(time.generated_tokens))} are generated" if time.generated_tokens else ""
    lines = [
        f"  a step {duration(float(time.step_s))}, the run {duration(float(time.run_s))}"
        f" on {many}{printable(time.device)}",
        f"  {steps:,} step{'' if steps == 1 else 's'}{once}",
        f"  {count(float(time.tokens))} tokens are learned from{made}",
    ]
    if time.cost is not None and time.price_per_hour is not None:
        lines.append(f"  cost {money(float(time.cost))} at {money(time.price_per_hour)} a device and hour")
    return lines


def methods_table(plans: Mapping[str, Plan]) -> Table:
    """One row a method."""
    times = [plan.time for plan in plans.values() if plan.time is not None]
    priced = any(time.cost is not None for time in times)
    header = ["method", "peak", "at", "fits", *(["a step", "the run"] if times else [])]
    table = _table([*header, *(["cost"] if priced else [])], left=1)
    for name, plan in plans.items():
        fits = {True: "yes", False: "no", None: "?"}[plan.fits]
        row = [name, size(float(plan.memory.peak)), plan.memory.fullest.name, fits]
        if times:
            time = plan.time
            row += (
                [NOTHING] * 2 if time is None else [duration(float(time.step_s)), duration(float(time.run_s))]
            )
            if priced:
                row.append(NOTHING if time is None or time.cost is None else money(float(time.cost)))
        table.add_row(*row, style=None if plan.fits is not False else "red")
    return table


def _table(header: Sequence[str], left: int) -> Table:
    """Columns from ``left`` on are numbers. No borders, a line of dashes below the header."""
    from rich.box import Box
    from rich.table import Table

    lines = Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
    table = Table(box=lines, show_edge=False, header_style="bold", padding=(0, 1, 0, 0), pad_edge=True)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i >= left else "left", no_wrap=True)
    return table


def _print_whole(table: Table, console: Console) -> None:
    """With every figure, also where the terminal is too narrow: it wraps what rich would cut."""
    from rich.measure import Measurement

    room = console.width
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(room, needed)
    console.print(table, highlight=False)
    console.width = room


def _sayer(console: Console) -> Callable[..., None]:
    """Prints a line, nothing in which is markup; what does not fit goes on below, ``hang`` columns in."""
    from rich.text import Text

    def say(line: Any, style: str = "", hang: int = 0, head: str = "") -> None:
        if isinstance(line, Text):
            console.print(line, highlight=False, markup=False)
            return
        room = min(console.width, WIDEST)
        lines = textwrap.wrap(f"{head}{printable(line)}", room, subsequent_indent=" " * hang) or [""]
        for i, told in enumerate(lines):
            text = Text(told, style=style)
            if head and not i:
                text.stylize("bold", 0, len(head))
            console.print(text, highlight=False, markup=False)

    return say
