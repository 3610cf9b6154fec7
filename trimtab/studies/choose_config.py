"""What ``trimtab choose`` is told, and the situation that options and data make together."""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.planning.choosing.situation import Answer, Situation, Tuned, parse_have, with_thumbs
from trimtab.planning.job import Model
from trimtab.planning.look import read_size

if TYPE_CHECKING:  # reading needs the data room, and with it PyTorch, which --help does without
    from trimtab.studies.choose_data import Looked

VERIFIERS = ("exact_match", "numeric", "math", "tool_call", "rouge", "code")
"""Built-in reward terms that check an answer by the row's own columns."""
TUNED = ("instruct", "chat", "-it", "sft")
"""What the names of models say that have been through SFT."""


FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
"""A function of a file of the user's own."""
ADDRESS = re.compile(r"https?://\S+")


class ChooseConfig(Section):
    """Options of ``trimtab choose``."""

    model: str = Field("", description="built-in card, folder or hub name")
    data: list[str] = Field(
        [], description="files, folders or hub names of feedback; read for what they hold"
    )
    columns: dict[str, str] = Field({}, description="renamed columns of --data: question=prompt")
    have: str = Field("", description="what there is, without a file: pairs:20000,thumbs:500")
    verifier: str = Field("", description="what checks answers: numeric, math, code, FILE.py:function")
    reward_model: str = Field("", description="folder or hub name of a reward model")
    judge: str = Field("", description='FILE.py:factory, or "ADDRESS MODEL" of an endpoint')
    goal: Literal["policy", "reward"] = Field("policy", description="what is to be made")
    exploration: Answer = Field("unknown", description="answers beyond the data have to be found")
    reasoning: Answer = Field("unknown", description="answers are long chains of reasoning")
    long_horizon: Answer = Field("unknown", description="a token's worth shows late: tools, many turns")
    noisy: str = Field("unknown", description="labels are noisy: yes, no, or the share that is wrong")
    keep_short: Answer = Field("unknown", description="answers must not grow longer")
    reuse: Answer = Field("unknown", description="sampling is dear: many steps on each rollout")
    tuned: Tuned = Field("unknown", description="the model has had SFT; these: on these demonstrations")
    memory: str = Field("", description="of one device: 24GiB; empty takes what --device has")
    device: str = Field("", description="device card, as trimtab plan names it")
    devices: int = Field(1, ge=1, description="how many there are, for a run under torchrun")
    time: str = Field("", description='for the whole run: "30m", "2h"')
    max_new_tokens: int = Field(0, ge=0, description="longest answer; 0 takes the data's, or a default")
    write: str = Field("", description="write the recipe to this file")

    @field_validator("verifier")
    @classmethod
    def _verifier(cls, value: str) -> str:
        if value in ("", "yes", *VERIFIERS) or FUNCTION.fullmatch(value):
            return value
        near = difflib.get_close_matches(value, VERIFIERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(VERIFIERS)}"
        raise ValueError(f"is no verifier; {hint} (or FILE.py:function)")

    @field_validator("judge")
    @classmethod
    def _judge(cls, value: str) -> str:
        if value in ("", "yes") or FUNCTION.fullmatch(value) or ADDRESS.match(value):
            return value
        raise ValueError('is no judge; give FILE.py:factory, or "ADDRESS MODEL" of an endpoint (http://…)')

    @field_validator("noisy")
    @classmethod
    def _noise(cls, value: str) -> str:
        if value not in ("yes", "no", "unknown"):
            try:
                share = float(value)
            except ValueError:
                raise ValueError("takes yes, no, or the share of labels that is wrong, as 0.1") from None
            if not 0 <= share < 0.5:
                raise ValueError("a share of wrong labels is 0 or more and less than 0.5")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ChooseConfig:
        if self.data and self.have:
            raise ValueError("data and have: a file is read for its amounts; give one of them")
        if self.columns and not self.data:
            raise ValueError("columns has no effect without data")
        for name in ("memory", "device"):
            if getattr(self, name) and not self.model:
                raise ValueError(f"{name} has no effect without model: what is to fit?")
        if self.devices > 1 and not self.model:
            raise ValueError("devices has no effect without model: what is to fit?")
        if self.memory:
            read_size(self.memory, "--memory")
        if self.time:
            seconds_of(self.time)
        return self


def situation(config: ChooseConfig, found: Looked | None, model: Model | None) -> Situation:
    """What the options and the data say together; an option has the last word."""
    have, ups, downs = with_thumbs(parse_have(config.have)) if config.have else ({}, None, None)
    noisy: str = config.noisy
    flips = None
    if noisy not in ("yes", "no", "unknown"):
        flips = float(noisy)
        noisy = "yes" if flips >= 0.02 else "no"
    if found is not None:
        have = {kind: count for kind, count in found.rows.items() if kind != "ties"}
        if "thumbs" in have:
            have["thumbs"], ups, downs = found.ups + found.downs, found.ups, found.downs
        flips = found.flips if flips is None and noisy != "no" else flips
        noisy = found.noisy if noisy == "unknown" else noisy
    verifier = config.verifier
    if verifier == "yes" and found is not None:
        verifier = found.verifier() or "yes"
    tuned = config.tuned
    if tuned == "unknown" and any(word in config.model.lower() for word in TUNED):
        tuned = "yes"
    return Situation(
        have=have,
        ups=ups,
        downs=downs,
        verifier=verifier,
        reward_model=config.reward_model,
        judge=config.judge,
        goal=config.goal,
        exploration=config.exploration,
        reasoning=config.reasoning,
        long_horizon=config.long_horizon,
        noisy=noisy,  # type: ignore[arg-type]
        flips=flips if noisy == "yes" else None,
        keep_short=config.keep_short,
        reuse=config.reuse,
        tuned=tuned,
        longer=None if found is None else found.longer_share,
        experts=model is not None and bool(model.experts),
    )


def seconds_of(time: str) -> float:
    """Raises ValueError for what is no time."""
    from trimtab.studies.plan import parse_budget

    with suppress(InputError):
        if seconds := parse_budget(time).seconds:
            return float(seconds)
    raise ValueError(f'time: {time!r} is no time; say "30m", "2h" or "90s"')
