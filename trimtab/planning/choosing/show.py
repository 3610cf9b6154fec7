"""A choice as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from trimtab.planning.choosing.decide import Choice, Reason
from trimtab.planning.choosing.pilot import Pilot
from trimtab.planning.choosing.recipe import several

WIDTH = 79
POINTS = 6
"""Methods whose points are shown beside the chosen one's."""


def show_choice(
    choice: Choice,
    pilot: Pilot,
    commands: Sequence[str],
    *,
    found: Sequence[str] = (),
    fit: str = "",
    warnings: Sequence[str] = (),
    sources: bool = True,
) -> str:
    """Everything, in the order in which it is read. ``sources``: with the source of every reason."""
    stages = f" ({', then '.join(choice.stages)})" if several(choice) else ""
    lines = [f"{choice.method.upper()}{stages}"]
    for name, texts in (("Your data", found), ("Warnings", warnings), ("Memory", [fit] if fit else [])):
        lines += _block(name, texts)
    lines += ["", "Because", *_reasons(choice.reasons, sources)]
    lines += _block("Against it", choice.against)
    if choice.runner_up is None:
        lines += _block("No runner-up", [choice.prefer])
    else:
        lines += ["", f"Runner-up: {choice.runner_up}", *_wrapped(f"if {choice.prefer}")]
        lines += _reasons(choice.runner_up_reasons, sources)
    lines += _block("Note", choice.notes)
    lines += _block("Where sources disagree", choice.disagreements)
    lines += _block("Points", [", ".join(f"{n} {p}" for n, p in list(choice.points.items())[:POINTS])])
    lines += ["", "Ruled out", *_columns(choice.ruled_out.items())]
    for stage, values in choice.hypers.items():
        title = f"Start {stage} with" if several(choice) else "Start with"
        lines += ["", title]
        for h in values:
            lines += _wrapped(f"{h.key} = {_short(h.value)}", "  ")
            lines += _wrapped(h.source, "      ")
    lines += ["", *_pilot(pilot)]
    lines += ["", "Run"]
    for command in commands:
        lines += _command(command)
    return "\n".join(lines)


def _command(text: str) -> list[str]:
    """A command that can be copied whole, whatever its length."""
    wrapper = textwrap.TextWrapper(WIDTH - 2, initial_indent="  ", subsequent_indent="      ")
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    lines = wrapper.wrap(text)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _short(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def _block(title: str, texts: Iterable[str]) -> list[str]:
    texts = [text for text in texts if text]
    if not texts:
        return []
    out = ["", title]
    for text in texts:
        out += textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return out


def _reasons(reasons: Sequence[Reason], sources: bool) -> list[str]:
    out: list[str] = []
    for r in reasons:
        out += textwrap.wrap(
            r.because, WIDTH, initial_indent=f"  {r.points:+3d} ", subsequent_indent="      "
        )
        if sources:
            out += _wrapped(f"[{r.rule}: {r.source}]", "      ")
    return out


def _columns(items: Iterable[tuple[str, str]]) -> list[str]:
    out: list[str] = []
    for name, text in items:
        out += textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
    return out


def _pilot(pilot: Pilot) -> list[str]:
    size = f"{pilot.rows:,} rows, {pilot.steps:,} steps, {pilot.heldout:,} rows held out"
    out = [f"Pilot: the whole run, of so few rows ({size})" if pilot.whole else f"Pilot: {size}"]
    out.append("  watch")
    for name, see in pilot.watch:
        out += textwrap.wrap(see, WIDTH, initial_indent=f"    {name:<31} ", subsequent_indent=" " * 36)
    out.append("  stop, if")
    for text in pilot.stop:
        out += textwrap.wrap(text, WIDTH, initial_indent="    - ", subsequent_indent="      ")
    return [*out, *_wrapped(f"change {pilot.switch}")]
