"""Steps of a response: their texts, their tokens, and where each ends.

A step is written as its text without surrounding white space, then the separator, and its tokens are those
of the text followed by those of the separator, each tokenised by itself. So a boundary never falls inside
a token, whatever a tokenizer would have merged, and every step is judged at the same token: the
separator's last. (TRL's process reward trainer does the same.) With an empty separator steps stand as they
are given, and each is judged at the last token of its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trimtab.data.chat import render_response
from trimtab.errors import InputError
from trimtab.groups import Group, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of a text, each with the separators behind it: their concatenation is the text.

    What lies between two separators and is blank is no step: "a\\n\\nb" has two. There is always one step.
    """
    if not separator:
        raise ValueError("a text is split by a separator that is not empty")
    parts = text.split(separator)
    steps: list[str] = []
    said = False
    for n, part in enumerate(parts):
        chunk = part if n == len(parts) - 1 else part + separator
        says = bool(part.strip())
        if steps and not (says and said):
            steps[-1] += chunk
            said = said or says
        else:
            steps.append(chunk)
            said = says
    return steps


def bare(step: str, separator: str) -> str:
    """A step's text without the separators and the white space around it."""
    # White space at the separator's end goes with the step's.
    text, end = step.strip(), separator.rstrip()
    while end and text.endswith(end):
        text = text.removesuffix(end).rstrip()
    return "" if text == separator.strip() else text


def divided(groups: Iterable[Group], separator: str) -> tuple[int, int]:
    """How many steps have the separator inside, so that their text alone is several steps; and all steps."""
    texts = [text for group in groups for r in group.responses for text in r.step_texts or ()]
    return sum(len(split_steps(bare(text, separator), separator)) > 1 for text in texts), len(texts)


def step_tokens(tokenizer: Tokenizer, steps: Sequence[str], separator: str) -> tuple[list[int], list[int]]:
    """Token ids of a response, without an end token, and the index of each step's last token among them.

    Raises InputError for a step of no token.
    """
    ids: list[int] = []
    ends: list[int] = []
    for step in steps:
        text = bare(step, separator) if separator else step
        tokens = _ids(tokenizer, text) + (_ids(tokenizer, separator) if separator else [])
        if not tokens:
            raise InputError(f"the step {step[:60]!r} is no token of this tokenizer: remove it")
        ids += tokens
        ends.append(len(ids) - 1)
    return ids, ends


def as_steps(
    groups: Iterable[Group], tokenizer: Tokenizer, separator: str, *, last_only: bool = False
) -> list[Group]:
    """Responses in labelled steps, with their tokens and ``step_ends``; other rows are left out.

    ``last_only`` keeps the last step's label alone: the outcome. Raises InputError, naming the row, for a
    label that is no probability.
    """
    return [made for group in groups if (made := _labelled(group, tokenizer, separator, last_only))]


def _labelled(group: Group, tokenizer: Tokenizer, separator: str, last_only: bool) -> Group | None:
    responses = []
    for response in group.responses:
        if response.step_texts is None or response.step_labels is None:
            continue
        if bad := [label for label in response.step_labels if not 0 <= label <= 1]:
            raise InputError(
                f"{group.id}: a step's label is {bad[0]:g}; it is the probability, from 0 to 1, that the "
                "step is right: write a wrong step as 0, and decide what a neutral one is"
            )
        try:
            tokens, ends = step_tokens(tokenizer, response.step_texts, separator)
        except InputError as error:
            raise InputError(f"{group.id}: {error}") from None
        first = len(ends) - 1 if last_only else 0
        responses.append(
            dataclasses.replace(
                response,
                tokens=tokens,
                mask=[True] * len(tokens),
                step_texts=response.step_texts[first:],
                step_labels=response.step_labels[first:],
                step_ends=ends[first:],
            )
        )
    return dataclasses.replace(group, responses=responses) if responses else None


def ends_in(tokenizer: Tokenizer, tokens: Sequence[int], steps: Sequence[str]) -> list[int]:
    """Where the steps of a sampled response end among the tokens that were drawn.

    ``steps`` as :func:`split_steps` gives them, of the decoded text. A step ends with the first token by
    which all of its text is there, so that a token which spans a boundary belongs to the step that it
    completes, and two short steps may end in one token. The last step ends with the response, its end token
    included. Indices never fall; there is one for each step. A response without a token has none.
    """
    if not tokens:
        return []

    def length(count: int) -> int:
        text = str(tokenizer.decode(list(tokens[:count]), skip_special_tokens=True))
        # A character of several tokens is shown as U+FFFD until it is whole.
        return len(text.rstrip("\ufffd"))

    ends: list[int] = []
    written = 0
    low = 1
    for step in steps[:-1]:
        written += len(step)
        high = len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if length(middle) >= written else (middle + 1, high)
        ends.append(low - 1)
    return [*ends, len(tokens) - 1]


def within(response: Response, length: int) -> Response:
    """Of a response that is cut to ``length`` tokens the steps that are still whole."""
    if response.step_ends is None:
        return response
    kept = sum(end < length for end in response.step_ends)
    cut = {
        name: values[:kept]
        for name in ("step_ends", "step_labels", "step_rewards", "step_texts")
        if (values := getattr(response, name)) is not None
    }
    return dataclasses.replace(response, **cut)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text that goes on from another, without an end token."""
    ids, _ = render_response(tokenizer, "", text)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
