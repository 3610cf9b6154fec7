"""What a token is drawn from, and with which noise.

The distribution is softmax(logits / temperature) with the tokens that top-k, top-p, min-p or a minimum
length forbid taken out and the rest renormalised. ``sampler_`` log-probabilities are those of that
distribution: of what was really drawn from.

Drawing is by the Gumbel-max trick: argmax(log p + noise), where the noise of a token is a pure function of
(seed, prompt, sample, step, position, token). Nothing depends on how requests were batched, in which
order they ran, or on a generator's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.groups import Group, stable_hash
from trimtab.models.language_model import LanguageModel


class SamplingConfig(Section):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 takes the most likely token")
    top_k: int = Field(0, ge=0, description="keep the k most likely tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="drop tokens below this share of the likeliest's probability"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest response, in tokens")
    min_new_tokens: int = Field(0, ge=0, description="no end token before this many tokens")
    stop_tokens: list[int] = Field([], description="further token ids that end a response")
    stop: list[str] = Field([], description="strings that end a response (cut from its text)")
    cache_mb: int = Field(2048, ge=1, description="budget of the key and value cache, in MiB")
    max_rows: int = Field(0, ge=0, description="responses that run at once; 0 takes up to 256")
    engine: Literal["auto", "tree", "plain"] = Field(
        "auto", description="tree shares a prompt's keys among its samples; plain is the slow oracle"
    )

    @model_validator(mode="after")
    def _lengths(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is larger than max_new_tokens")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise ValueError("top_k, top_p and min_p have no effect at temperature 0")
        return self

    @property
    def truncated(self) -> bool:
        """The distribution drawn from is not the policy's own at this temperature."""
        return self.filtered or self.min_new_tokens > 0

    @property
    def filtered(self) -> bool:
        """Top-k, top-p or min-p take tokens out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


class Sampler(Protocol):
    """Prompts in, sampled groups out; the in-process engine is one, a remote engine another."""

    def sample(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        *,
        seed: int,
        step: int = 0,
        end_tokens: list[int],
        on_group: Callable[[int, Group], None] | None = None,
        limits: list[int] | None = None,
    ) -> list[Group]:
        """For each tokenised prompt a new group with n responses (text, tokens, sampler_logps, finish).

        ``on_group(i, group)`` is called from within as soon as all n responses of ``groups[i]`` are finished,
        with the very group that the result holds. What it raises comes out of ``sample``, which can be called
        again. ``limits`` are the groups' own longest responses, in tokens, each at most max_new_tokens.

        Of many processes each samples groups of its own, or none. Where the model is spread over them, all
        of them call it, since its weights are gathered then.
        """
        ...


def limits_of(limits: list[int] | None, groups: list[Group], config: SamplingConfig) -> list[int]:
    """The longest response of each group, in tokens. Raises ValueError for limits that do not fit."""
    if limits is None:
        return [config.max_new_tokens] * len(groups)
    if len(limits) != len(groups) or not all(1 <= limit <= config.max_new_tokens for limit in limits):
        raise ValueError("limits: one number from 1 to max_new_tokens is needed for every group")
    return limits


def check_context(lm: LanguageModel, groups: list[Group], config: SamplingConfig) -> None:
    """Raises InputError for an empty prompt, and one that leaves too little of the context to sample in."""
    for group in groups:
        if not group.prompt_tokens:
            raise InputError(f"{group.id}: the prompt has no tokens to sample from")
        room = lm.context - len(group.prompt_tokens or ())
        if room < config.max_new_tokens:
            raise InputError(
                f"{group.id}: the prompt leaves {room} of the model's {lm.context} tokens of context but "
                f"max_new_tokens is {config.max_new_tokens}; lower it or data.max_prompt_tokens"
            )


def row_keys(groups: list[Group], n: int, *, seed: int, step: int) -> np.ndarray:
    """One 64-bit key per response, ``[P · n]``, from (seed, prompt, sample, step)."""
    keys = [stable_hash(seed, group.id, sample, step) for group in groups for sample in range(n)]
    return np.array(keys, dtype=np.uint64)


def exponential_noise(keys: np.ndarray, position: int | np.ndarray, vocab: torch.Tensor) -> torch.Tensor:
    """Standard exponential variates ``[N, V]``: a hash of (row key, position, token id), in fp32.

    ``vocab`` holds ``token_hashes``. argmin(E / p) over independent exponentials E is a draw from p.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix(keys + _splitmix(np.asarray(position, dtype=np.uint64) + np.uint64(1)))
    halves = torch.from_numpy(mixed.view(np.int32).reshape(-1, 2).copy()).to(vocab.device)
    x = (vocab[None, :] ^ halves[:, :1]) * (halves[:, 1:] | 1)
    x = _mix32(x)
    # 31 bits: small uniforms keep their full relative precision, and only small ones win an argmin.
    uniform = x.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    # fp32 rounds the largest to 1, whose noise is infinite: then not even the only token allowed would win.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def token_hashes(vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """int32 ``[V]``, fixed: spreads neighbouring token ids over all 32 bits before the noise hash."""
    return _mix32(torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device) * -1640531527)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    # MurmurHash3's 32-bit finaliser; torch shifts int32 arithmetically, so the sign bits are masked off.
    x = x.clone()
    scratch = torch.empty_like(x)
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x ^= scratch.bitwise_and_((1 << (32 - shift)) - 1)
        if factor != 1:
            x *= factor
    return x


def _splitmix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sampler_logprobs(
    logits_NV: torch.Tensor, config: SamplingConfig, *, forbidden: list[int] | None = None
) -> torch.Tensor:
    """Log-probabilities of the distribution that is drawn from, fp32 ``[N, V]``; −inf where excluded.

    Filters apply in the order top-k, top-p, min-p, each to the distribution at the temperature.
    ``forbidden`` ids are taken out first (end tokens before the minimum length).
    """
    z = logits_NV.to(torch.float32, copy=True)
    if forbidden:
        z[:, forbidden] = -torch.inf
    if config.temperature == 0:
        best = torch.full_like(z, -torch.inf)
        return best.scatter_(-1, z.argmax(-1, keepdim=True), 0.0)
    if config.temperature != 1.0:
        z /= config.temperature
    if config.top_k and config.top_k < z.shape[-1]:
        kth = z.topk(config.top_k, dim=-1).values[:, -1:]
        z.masked_fill_(z < kth, -torch.inf)
    if config.top_p < 1.0:
        ordered, places = z.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token is dropped when the likelier ones already hold top_p, so the first always stays.
        drop = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, places, before >= config.top_p)
        z.masked_fill_(drop, -torch.inf)
    if config.min_p > 0:
        logp = z.log_softmax(-1)
        z.masked_fill_(logp < logp.amax(-1, keepdim=True) + float(np.log(config.min_p)), -torch.inf)
    return z.log_softmax(-1)


def draw(logps_NV: torch.Tensor, noise_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[N]`` and their log-probabilities ``[N]``: argmax(log p − log E), the Gumbel-max trick."""
    tokens = (logps_NV - noise_NV.log()).argmax(-1)
    return tokens, logps_NV.gather(-1, tokens[:, None])[:, 0]
