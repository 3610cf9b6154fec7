"""Several wordings of each prompt: formats around it and system prompts before it, drawn anew in every pass.

A policy that meets its prompts in one wording learns that wording too. With F formats and S system prompts a
group has F·S wordings. Which of them it is drawn in is a function of (seed, pass, group): all responses of a
group share it, and a resumed run draws the same. All are tokenised ahead, so that a length that does not fit
ends a run at its start. What is only evaluated on is read in the first format and the first system prompt.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence

from trimtab.data.render import TokenReport
from trimtab.errors import InputError
from trimtab.groups import Group, Text

PLACE = "{prompt}"


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError for a format that says nothing of the prompt, or that cannot be filled in."""
    for number, text in enumerate(formats, start=1):
        which = f"entry {number} of formats, {text!r},"
        try:
            places = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{which} cannot be read ({error}): write a brace as {{{{ or }}}}") from None
        for name, detail, conversion in places:
            if (name, detail, conversion) != ("prompt", "", None):
                raise ValueError(f"{which} has the unknown placeholder {{{name}}}: only {PLACE} is filled in")
        if not places:
            raise ValueError(f"{which} has no {PLACE}: say where the prompt goes")
    _differ(formats, "formats")


def check_system_prompts(prompts: Sequence[str]) -> None:
    """Raises ValueError for one that is given twice."""
    _differ(prompts, "system_prompts")


def _differ(texts: Sequence[str], name: str) -> None:
    if len(set(texts)) < len(texts):
        raise ValueError(f"{name} has an entry twice: leave one out")


def wordings(group: Group, formats: Sequence[str], system_prompts: Sequence[str]) -> list[Group]:
    """The group in each format with each system prompt, formats in the outer order; at least once.

    Raises InputError, naming the row, for a prompt that cannot be worded so.
    """
    try:
        return [
            dataclasses.replace(group, prompt=_with_system(_formatted(group.prompt, text), system))
            for text in formats or [PLACE]
            for system in system_prompts or [None]  # type: ignore[list-item]
        ]
    except InputError as error:
        raise InputError(f"{group.id}: {error}") from None


def tokenised(
    groups: Sequence[Group],
    formats: Sequence[str],
    system_prompts: Sequence[str],
    tokenise: Callable[[list[Group]], tuple[list[Group], TokenReport]],
) -> tuple[list[Group], dict[str, list[Group]], str]:
    """The groups in their first wording; by id in all of them, where there are several; and a report.

    What ``tokenise`` leaves out in one wording is left out. The report is empty where nothing is.
    """
    worded = [wordings(group, formats, system_prompts) for group in groups]
    columns, reports = zip(*(tokenise(list(column)) for column in zip(*worded, strict=True)), strict=True)
    if len(columns) == 1:
        return columns[0], {}, str(reports[0]) if len(columns[0]) < len(groups) else ""
    by_id = [{group.id: group for group in column} for column in columns]
    kept = [group for group in columns[0] if all(group.id in found for found in by_id)]
    report = ""
    if len(kept) < len(groups):
        worst = max(reports, key=lambda report: report.groups - report.kept)
        report = f"{len(kept):,} groups fit in all of {len(columns)} wordings; of one wording {worst}"
    return kept, {group.id: [found[group.id] for found in by_id] for group in kept}, report


def _formatted(prompt: Text, text: str) -> Text:
    """A text within the format; of a conversation its last message by the user."""
    if text == PLACE:
        return prompt
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the row has no prompt that data.formats could word: leave formats out")
        return text.format(prompt=prompt)
    asked = max((k for k, message in enumerate(prompt) if message.get("role") == "user"), default=None)
    content = None if asked is None else prompt[asked].get("content")
    if asked is None or not isinstance(content, str):
        raise InputError("the prompt has no message of plain text by the user that data.formats could word")
    return [*prompt[:asked], {**prompt[asked], "content": text.format(prompt=content)}, *prompt[asked + 1 :]]


def _with_system(prompt: Text, system: str | None) -> Text:
    """The conversation behind a system prompt; an empty one is none."""
    if system is None:
        return prompt
    if isinstance(prompt, str):
        raise InputError("data.system_prompts needs conversations, and this prompt is text: write messages")
    if prompt and prompt[0].get("role") in ("system", "developer"):
        raise InputError(
            "the conversation begins with a system prompt of its own: take it out of the row, or leave out "
            "data.system_prompts"
        )
    return [{"role": "system", "content": system}, *prompt] if system else prompt
