"""The plain sampler: each response with its own copy of the prompt, through the model's own cache.

It is the oracle that the tree engine is tested against, and what runs where an architecture does not
take the tree engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.rollouts.finish import Transcript, sampled_group
from trimtab.rollouts.sampling import (
    SamplingConfig,
    check_context,
    draw,
    exponential_noise,
    limits_of,
    row_keys,
    sampler_logprobs,
    token_hashes,
)
from trimtab.rollouts.strategies import Mix, mix_of
from trimtab.spread.shard import local_passes


class PlainSampler:
    """Sampling through ``past_key_values``, left-padded, one row per response."""

    @torch.no_grad()
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
        """See :class:`trimtab.rollouts.sampling.Sampler`. Raises InputError for a prompt over the context.

        Also for a model without a key and value cache (Mamba).
        """
        check_context(lm, groups, config)
        with local_passes(lm):
            ends = set(end_tokens)
            return self._sample(lm, groups, n, config, seed, step, ends, on_group, limits) if groups else []

    def _sample(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        seed: int,
        step: int,
        end_tokens: set[int],
        on_group: Callable[[int, Group], None] | None,
        limits: list[int] | None,
    ) -> list[Group]:
        mix = mix_of(config, n)
        rows = [group.prompt_tokens or [] for group in groups for _ in range(n)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=lm.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=lm.device)
        keys, hashes = row_keys(groups, n, seed=seed, step=step), token_hashes(lm.vocab_size, lm.device)
        ends = end_tokens | set(config.stop_tokens)
        transcripts = [Transcript(limit) for limit in limits_of(limits, groups, config) for _ in range(n)]
        done: dict[int, Group] = {}
        cache = None
        for t in range(config.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            extra = {"position_ids": positions} if lm.takes_positions else {}
            output = lm.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
            )
            cache = cache_of(lm, output)
            forbidden = sorted(ends) if t < config.min_new_tokens else None
            logps_NV = _drawn_from(output.logits[:, -1], config, mix, forbidden)
            tokens, logps = draw(logps_NV, exponential_noise(keys, t, hashes))
            for row, token, logp in zip(transcripts, tokens.tolist(), logps.tolist(), strict=True):
                if row.finish is None:
                    row.append(token, logp, config, ends, lm.tokenizer)
            for p, group in enumerate(groups):
                own = transcripts[p * n : (p + 1) * n]
                if p not in done and all(transcript.finish for transcript in own):
                    done[p] = sampled_group(group, own, lm.tokenizer, mix)
                    if on_group is not None:
                        on_group(p, done[p])
            if len(done) == len(groups):
                break
            ids = tokens[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        return [done[p] for p in range(len(groups))]


def cache_of(lm: LanguageModel, output: Any) -> Any:
    """The key and value cache that a forward pass gives. Raises InputError where there is none."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise InputError(
            f"{type(lm.model).__name__} gives no key and value cache, without which Trimtab does not "
            "sample; it can be trained by methods that do not sample (sft, dpo)"
        )
    return cache


def _drawn_from(
    logits_NV: torch.Tensor, config: SamplingConfig, mix: Mix | None, forbidden: list[int] | None
) -> torch.Tensor:
    """Log-probabilities ``[N, V]`` of what each row is drawn from; row k is sample k mod n of its group."""
    if mix is None:
        return sampler_logprobs(logits_NV, config, forbidden=forbidden)
    slots = mix.slots.tolist()
    ways = [mix.ways[slots[row % len(slots)]] for row in range(len(logits_NV))]
    rows = [sampler_logprobs(logits_NV[i : i + 1], way, forbidden=forbidden) for i, way in enumerate(ways)]
    return torch.cat(rows)
