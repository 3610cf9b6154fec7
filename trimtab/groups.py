"""Group and Response: the records that every room speaks.

A group is one prompt with one or more responses, each with whatever feedback it has. SFT's group has
one response, DPO's two, GRPO's G. Text comes from files, token ids from a tokenizer or a sampler; a
response that was sampled keeps the ids that were drawn (re-tokenising its text would give others).

Standard library only, so that any room, and any tool outside this package, can read and write it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One chat turn: ``{"role": "user", "content": "…"}`` and whatever the chat template reads besides."""

Text = str | list[Message]
"""Plain text, or a conversation."""


@dataclass(slots=True)
class Response:
    """One answer to a prompt, with the feedback it has received.

    >>> Response(text="Paris.", preferred=True)
    >>> Response(text="4", tokens=[19, 2], sampler_logps=[-0.1, -0.7], finish="stop", reward=1.0)

    Every per-token list is aligned with ``tokens``: entry t belongs to the response's own token t.
    """

    text: Text = ""
    """What was said: plain text, or the messages that follow the prompt's."""
    tokens: list[int] | None = None
    """Token ids as trained; for sampled responses exactly as drawn, end token included."""
    mask: list[bool] | None = None
    """True = the token counts in a loss. None = every token counts."""

    preferred: bool | None = None
    """In a pair: chosen (True) or rejected (False)."""
    label: bool | None = None
    """Thumbs up/down, or allow/deny."""
    rank: float | None = None
    """1 is best; equal ranks are ties."""
    ratings: dict[str, float] | None = None
    """Ratings by attribute; a plain number is filed under "overall"."""
    step_texts: list[str] | None = None
    """Stepwise data: the steps whose concatenation is the response."""
    step_labels: list[float] | None = None
    """One label per step."""
    step_ends: list[int] | None = None
    """Index, among the response's own tokens, of each step's last token; it never falls from step to step.

    Of a sampled response the last one is its last token, the end token included.
    """
    step_rewards: list[float] | None = None
    """One reward per step, from a process reward model or a function that judges steps."""

    reward: float | None = None
    """The scalar reward for the whole response."""
    reward_terms: dict[str, float] = field(default_factory=dict)
    """Each term of a reward mixture, before weighting."""
    advantage: float | None = None
    """What multiplies the policy gradient of every token of this response."""

    finish: str | None = None
    """"stop" (an end token or a stop string), or "length" (cut off)."""
    temperature: float | None = None
    """What its tokens were drawn at, where a group mixes strategies; None is the run's own temperature."""
    sampler_logps: list[float] | None = None
    """Log-probability of each token under the distribution really drawn from, in nats."""
    old_logps: list[float] | None = None
    """Log-probability under the policy when the batch was taken up, at the sampling temperature."""
    ref_logps: list[float] | None = None
    """Log-probability under the frozen reference, at the sampling temperature."""
    old_values: list[float] | None = None
    """The critic's value of the state before each token, when the batch was taken up (PPO)."""
    token_advantages: list[float] | None = None
    """What multiplies the policy gradient of each token (PPO)."""
    returns: list[float] | None = None
    """What the critic learns for the state before each token (PPO)."""


@dataclass(slots=True)
class Group:
    """One prompt with its responses.

    A preference pair from a file, before and after tokenising:

    >>> pair = Group(id="pairs.jsonl:7", prompt="2+2=", responses=[
    ...     Response(text="4", preferred=True), Response(text="5", preferred=False)])
    >>> pair.prompt_tokens = [17, 10, 17, 28]
    """

    id: str
    """Stable name of the row (``source:row``): the key of its noise and of its order in an epoch."""
    prompt: Text = ""
    responses: list[Response] = field(default_factory=list)
    prompt_tokens: list[int] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns that the reader did not claim; they reach the reward functions as keyword arguments."""
    weight: float = 1.0
    """Multiplies the loss of every response of the group."""
    source: str = ""
    """Which of the run's sources the row came from."""

    @property
    def chosen(self) -> Response:
        """The preferred response of a pair."""
        return next(r for r in self.responses if r.preferred)

    @property
    def rejected(self) -> Response:
        """The response of a pair that was not preferred."""
        return next(r for r in self.responses if r.preferred is False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, so that a checkpoint can hold pending groups as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Group:
        """The inverse of :meth:`to_dict`."""
        values = dict(values)
        values["responses"] = [Response(**r) for r in values["responses"]]
        return cls(**values)


def stable_hash(*parts: object) -> int:
    """A 64-bit number that is the same in every process and on every machine (``hash`` is not)."""
    joined = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


def prompt_text(prompt: Text) -> str:
    """The prompt as one string: for reward functions, for splitting by prompt, for reports."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
