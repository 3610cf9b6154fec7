"""The options of a judge: ``[judge]`` in a file, ``args`` of the reward term "judge"."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.rewards.base import OnError

Mode = Literal["pairwise", "listwise", "score"]
Kind = Literal["endpoint", "function", "reward_model", "custom"]

SCORING: tuple[Kind, ...] = ("function", "reward_model")
KINDS: dict[str, tuple[Kind, ...]] = {
    "name": ("function", "custom"),
    "args": ("function", "reward_model", "custom"),
    "margin": SCORING,
    "on_error": SCORING,
}
"""Which kinds an option belongs to; those not named here belong to the endpoint, but for kind and mode."""
MODES: dict[str, tuple[Mode, ...]] = {
    "margin": ("pairwise",),
    "score_min": ("score",),
    "score_max": ("score",),
}


class JudgeConfig(Section):
    """Who judges, and how."""

    kind: Kind = Field(
        description="an endpoint, a reward function, a reward model, or your own judge (custom)"
    )
    mode: Mode = Field("pairwise", description="compare every pair, rank the group, or score each response")
    name: str = Field(
        "", description="reward function, or package.module:factory or path/to/file.py:factory of a judge"
    )
    args: dict[str, Any] = Field(
        {}, description="parameters of the function, the reward model or the factory, by name"
    )
    margin: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="largest difference in score that is a tie, pairwise"
    )
    on_error: OnError = Field(
        "error", description="a response that cannot be scored: stop, or abstain (skip) and count it"
    )
    base_url: str = Field("", description="address below which /chat/completions answers, such as …/v1")
    model: str = Field("", description="name of the judging model at the endpoint")
    api_key_env: str = Field(
        "", description="environment variable that holds the key; empty sends no key (local servers)"
    )
    rubric: str = Field("", description="what a good response is; empty takes a general rubric")
    rubric_file: str = Field("", description="text file with the rubric instead")
    score_min: float = Field(1.0, allow_inf_nan=False, description="lowest score, mode score")
    score_max: float = Field(10.0, allow_inf_nan=False, description="highest score, mode score")
    max_tokens: int = Field(512, ge=0, description="longest answer of the judge; 0 leaves it to the server")
    seed: int = Field(0, ge=0, description="sent with every request, with temperature 0")
    extra: dict[str, Any] = Field(
        {}, description="further keys of the request's body, over those that are sent"
    )
    retries: int = Field(
        4, ge=0, description="further tries of a question that failed, and of one answered with nonsense"
    )
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="longest wait for one answer")
    requests_per_minute: int = Field(
        0, ge=0, description="evenly spaced limit, of all processes; 0 sets none"
    )
    concurrency: int = Field(
        4, ge=1, le=256, description="requests in flight at once, of all processes (at least one each)"
    )
    cache: str = Field(
        "runs/judge-cache.jsonl", description="file of every answer so far, reused; empty keeps none"
    )
    prompt_price: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="price of a million prompt tokens, for the cost"
    )
    completion_price: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="price of a million completion tokens"
    )

    @model_validator(mode="after")
    def _consistent(self) -> JudgeConfig:
        for name, info in type(self).model_fields.items():
            if name in ("kind", "mode") or getattr(self, name) == info.default:
                continue
            if self.kind not in KINDS.get(name, ("endpoint",)):
                raise ValueError(f'{name} has no effect with kind = "{self.kind}"')
            if self.mode not in MODES.get(name, (self.mode,)):
                raise ValueError(f'{name} has no effect with mode = "{self.mode}"')
        if self.kind in KINDS["name"] and not self.name:
            raise ValueError(f'kind = "{self.kind}" needs name')
        if self.kind == "endpoint":
            self._check_endpoint()
        return self

    def _check_endpoint(self) -> None:
        address = urlsplit(self.base_url)
        try:
            whole = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:
            whole = False
        if not whole or address.query or address.fragment:
            raise ValueError('base_url must be an address such as "http://localhost:8000/v1"')
        if address.username is not None or address.password is not None:
            raise ValueError("base_url must not hold a password: name the key's variable in api_key_env")
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env must be the name of an environment variable, not the key itself")
        if not self.model:
            raise ValueError('kind = "endpoint" needs model')
        if self.rubric and self.rubric_file:
            raise ValueError("rubric and rubric_file are both given: leave one out")
        if self.score_min >= self.score_max:
            raise ValueError("score_min must be below score_max")
        taken = sorted({"model", "messages", "stream", "n"} & self.extra.keys())
        if taken:
            raise ValueError(f"extra may not set {taken[0]!r}")
