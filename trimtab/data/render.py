"""Groups of text → groups of token ids within stated lengths. Lengths are in tokens throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trimtab.data.chat import render_prompt, render_response
from trimtab.data.steps import within
from trimtab.errors import InputError
from trimtab.groups import Group, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class TokenReport:
    """What a tokenisation gave."""

    groups: int = 0
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Groups left out, by reason."""
    prompts_truncated: int = 0
    responses_truncated: int = 0
    prompt_tokens: int = 0
    """Over all groups kept, each prompt once."""
    response_tokens: int = 0
    longest: int = 0
    """The longest prompt with one response."""

    def __str__(self) -> str:
        text = (
            f"{self.kept:,} of {self.groups:,} groups kept: {self.prompt_tokens:,} prompt tokens, "
            f"{self.response_tokens:,} response tokens, longest sequence {self.longest:,}"
        )
        for reason, count in sorted(self.skipped.items()):
            text += f"; {count:,} skipped ({reason})"
        if self.prompts_truncated or self.responses_truncated:
            text += (
                f"; {self.prompts_truncated:,} prompts and {self.responses_truncated:,} responses truncated"
            )
        return text


@dataclass(frozen=True, slots=True)
class _Limits:
    prompt: int | None
    response: int | None
    total: int | None


class _Skip(Exception):
    """A group that does not fit: the reason to count by, the details and the mend."""

    def __init__(self, reason: str, detail: str, mend: str) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.mend = reason, detail, mend


def tokenise(
    groups: Sequence[Group],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    max_tokens: int | None = None,
    on_long: Literal["error", "skip", "truncate"] = "error",
    completion_only: bool = True,
) -> tuple[list[Group], TokenReport]:
    """New groups with ``prompt_tokens`` and every response's ``tokens`` and ``mask`` filled in.

    Tokens that a group already has, as sampled groups do, are kept as they are.

    ``max_tokens`` bounds a prompt with one response (the model's context). ``on_long`` says what happens
    to a group over a bound: "error"; "skip" leaves it out, counted; "truncate" cuts the prompt to
    ``max_prompt_tokens`` from the left, keeping a leading BOS, then each response from the right to
    ``max_response_tokens`` and to what ``max_tokens`` leaves, and marks it ``finish="length"`` (its end token
    is gone). A prompt that leaves no room in ``max_tokens`` is an error under "truncate" too. Cut groups
    that teach nothing any more (a pair made identical, nothing left under the mask) are left out, counted.

    ``completion_only=False``, for SFT: the loss counts the prompt as well. The prompt keeps its first token,
    which nothing predicts; the rest moves into the response, and the mask is True throughout.

    Raises InputError that names the row; also when no group is left, or when the bounds contradict.
    """
    limits = _Limits(max_prompt_tokens, max_response_tokens, max_tokens)
    _check(limits, on_long)
    report = TokenReport(groups=len(groups))
    kept = []
    for group in groups:
        try:
            filled = _fill(group, tokenizer)
            fitted = _fit(filled, limits, tokenizer.bos_token_id, report if on_long == "truncate" else None)
        except InputError as error:
            raise InputError(f"{group.id}: {error}") from error
        except _Skip as skip:
            if on_long == "error" or (on_long == "truncate" and skip.reason == "prompt too long"):
                raise InputError(f"{skip.detail}, {group.id}: {skip.mend}") from None
            report.skipped[skip.reason] = report.skipped.get(skip.reason, 0) + 1
            continue
        _count(fitted, report)
        kept.append(fitted if completion_only else _count_prompt(fitted))
    if groups and not kept:
        raise InputError(
            f"no group is left after tokenising ({report}): raise the limits or shorten the rows"
        )
    return kept, report


def _check(limits: _Limits, on_long: str) -> None:
    if on_long not in ("error", "skip", "truncate"):
        raise InputError(f'on_long is {on_long!r}: use "error", "skip" or "truncate"')
    for name, value in dataclasses.asdict(limits).items():
        if value is not None and value < 1:
            raise InputError(f"the limit of {name} tokens is {value}: use 1 or more, or leave it out")
    if limits.total is not None and limits.prompt is not None and limits.prompt >= limits.total:
        raise InputError(
            f"max_prompt_tokens {limits.prompt} leaves no room in max_tokens {limits.total}: lower it"
        )


def _fill(group: Group, tokenizer: Tokenizer) -> Group:
    prompt = group.prompt_tokens or render_prompt(tokenizer, group.prompt)
    responses = []
    for response in group.responses:
        if response.tokens is None:
            ids, mask = render_response(tokenizer, group.prompt, response.text)
            response = dataclasses.replace(response, tokens=ids, mask=mask)
        responses.append(response)
    return dataclasses.replace(group, prompt_tokens=list(prompt), responses=responses)


def _fit(group: Group, limits: _Limits, bos: int | None, cut: TokenReport | None) -> Group:
    """The group within the limits, cut where ``cut`` is the report to count in. Raises `_Skip`."""
    prompt = list(group.prompt_tokens or [])
    prompts_cut = responses_cut = 0
    if limits.prompt is not None and len(prompt) > limits.prompt:
        if cut is None:
            detail = f"a prompt of {len(prompt)} tokens exceeds max_prompt_tokens {limits.prompt}"
            raise _Skip("prompt too long", detail, 'raise it, or set on_long to "skip" or "truncate"')
        prompt = _cut_left(prompt, limits.prompt, bos)
        prompts_cut = 1
    if limits.total is not None and len(prompt) >= limits.total:
        detail = f"a prompt of {len(prompt)} tokens leaves no room in max_tokens {limits.total}"
        raise _Skip("prompt too long", detail, 'set max_prompt_tokens with on_long "truncate", or "skip"')
    room = [limits.response] if limits.response is not None else []
    if limits.total is not None:
        room.append(limits.total - len(prompt))
    responses = []
    for response in group.responses:
        tokens = response.tokens or []
        if room and len(tokens) > min(room):
            if cut is None:
                detail = f"a response of {len(tokens)} tokens exceeds the {min(room)} left to it"
                raise _Skip(
                    "response too long", detail, 'raise the limit, or set on_long to "skip" or "truncate"'
                )
            response = _cut_right(response, min(room))
            responses_cut += 1
        responses.append(response)
    fitted = dataclasses.replace(group, prompt_tokens=prompt, responses=responses)
    if responses_cut:
        _check_cut(fitted)
    if cut is not None:
        cut.prompts_truncated += prompts_cut
        cut.responses_truncated += responses_cut
    return fitted


def _cut_left(prompt: list[int], length: int, bos: int | None) -> list[int]:
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - length + 1 :]]
    return prompt[len(prompt) - length :]


def _cut_right(response: Response, length: int) -> Response:
    """The response's beginning, every per-token list cut alike."""
    lists = ("tokens", "mask", "sampler_logps", "old_logps", "ref_logps")
    values = {name: getattr(response, name) for name in lists}
    short = {name: value[:length] for name, value in values.items() if value is not None}
    return within(dataclasses.replace(response, finish="length", **short), length)


def _check_cut(group: Group) -> None:
    """Raises `_Skip` for a group that cutting has made useless."""
    if any(response.mask is not None and not any(response.mask) for response in group.responses):
        raise _Skip(
            "nothing left under the mask", "cut before the assistant's first token", "raise the limits"
        )
    if any(response.step_ends == [] for response in group.responses):
        raise _Skip("no whole step left", "cut before the end of the first step", "raise the limits")
    sides = {r.preferred: r.tokens for r in group.responses if r.preferred is not None}
    if len(sides) == 2 and sides[True] == sides[False]:
        raise _Skip(
            "identical after truncation", "chosen and rejected are cut to the same", "raise the limits"
        )


def _count(group: Group, report: TokenReport) -> None:
    prompt = len(group.prompt_tokens or [])
    lengths = [len(response.tokens or []) for response in group.responses]
    report.kept += 1
    report.prompt_tokens += prompt
    report.response_tokens += sum(lengths)
    report.longest = max(report.longest, prompt + max(lengths, default=0))


def _count_prompt(group: Group) -> Group:
    """The group with its prompt under the loss."""
    if len(group.responses) != 1:
        raise InputError(
            f"{group.id} has {len(group.responses)} responses: completion_only = false needs one, as in SFT"
        )
    prompt, [response] = list(group.prompt_tokens or []), group.responses
    if response.sampler_logps or response.old_logps or response.ref_logps:
        raise InputError(
            f"{group.id} holds log-probabilities of its response alone: set completion_only = true"
        )
    tokens = prompt[1:] + list(response.tokens or [])
    moved = dataclasses.replace(response, tokens=tokens, mask=[True] * len(tokens))
    return dataclasses.replace(group, prompt_tokens=prompt[:1], responses=[moved])
