"""When a response is finished, and the records that sampling returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.groups import Group, Response
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.rollouts.strategies import Mix


class Transcript:
    """The tokens drawn so far for one response, and whether it has finished."""

    __slots__ = ("finish", "limit", "logps", "text", "tokens")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = []
        self.logps: list[float] = []
        self.finish: str | None = None
        self.text: str | None = None

    def append(
        self, token: int, logp: float, config: SamplingConfig, end_tokens: set[int], tokenizer: Any
    ) -> bool:
        """Add a drawn token; True when the response is finished by it."""
        self.tokens.append(token)
        self.logps.append(logp)
        if token in end_tokens:
            self.finish = "stop"
        elif (text := text_before_stop(self.tokens, config, tokenizer)) is not None:
            self.finish, self.text = "stop", text
        elif len(self.tokens) >= self.limit:
            self.finish = "length"
        return self.finish is not None

    def response(self, tokenizer: Any) -> Response:
        """The record: text for people and reward functions, ids exactly as drawn for training."""
        text = self.text
        if text is None:
            text = tokenizer.decode(self.tokens, skip_special_tokens=True) if tokenizer is not None else ""
        return Response(text=text, tokens=self.tokens, sampler_logps=self.logps, finish=self.finish)


def text_before_stop(tokens: list[int], config: SamplingConfig, tokenizer: Any) -> str | None:
    """The text up to a stop string that the last token completes; None where it completes none."""
    if not config.stop or len(tokens) < config.min_new_tokens:
        return None
    # A stop string may span tokens, and a token may hold more than the string: look at decoded text.
    # A token is at least one byte, so this tail is long enough; the full text is cut once, at the end.
    tail = tokens[-(max(len(s.encode()) for s in config.stop) + 4) :]
    if not any(s in tokenizer.decode(tail, skip_special_tokens=True) for s in config.stop):
        return None
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    places = [at for s in config.stop if (at := whole.find(s)) >= 0]
    return whole[: min(places)] if places else None


def sampled_group(group: Group, row: list[Transcript], tokenizer: Any, mix: Mix | None = None) -> Group:
    """A new group with the sampled responses; the prompt's own record is left as it was."""
    responses = [t.response(tokenizer) for t in row]
    if mix is not None:
        for response, temperature in zip(responses, mix.temperatures, strict=True):
            response.temperature = temperature
    return dataclasses.replace(group, responses=responses)
