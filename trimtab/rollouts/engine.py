"""The in-process engine: samples groups from the very module that is trained, no copy of the weights.

A prompt is run once for all its samples and its keys and values are stored once. Requests run in waves that
fit the cache budget; finished responses leave the wave when enough of them have.
"""

from __future__ import annotations

import torch

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import FAILURES, short_windows
from trimtab.rollouts.attention import DecodeCache, decoding
from trimtab.rollouts.finish import Transcript, sampled_groups
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import (
    Sampler,
    SamplingConfig,
    check_context,
    draw,
    exponential_noise,
    row_keys,
    sampler_logprobs,
    token_hashes,
)

COMPACT_BELOW = 0.75
"""A wave is rebuilt when fewer than this share of its rows are still running."""


class TreeSampler:
    """Tree decoding: prompt keys and values computed and stored once per group."""

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
    ) -> list[Group]:
        """See :class:`trimtab.rollouts.sampling.Sampler`. Raises InputError for a prompt over the context."""
        check_context(lm, groups, config)
        # By identity: two prompts under one id share their noise but not their responses.
        done: dict[int, Group] = {}
        for wave in self._waves(lm, groups, n, config):
            transcripts = self._run(lm, wave, n, config, seed, step, set(end_tokens))
            for prompt, group in zip(wave, sampled_groups(wave, transcripts, lm.tokenizer), strict=True):
                done[id(prompt)] = group
        return [done[id(group)] for group in groups]

    @staticmethod
    def _waves(lm: LanguageModel, groups: list[Group], n: int, config: SamplingConfig) -> list[list[Group]]:
        """Prompts of like length together, each wave within the cache budget."""
        per_token = cache_bytes_per_token(lm)
        waves: list[list[Group]] = []
        width = 0
        for group in sorted(groups, key=lambda g: -len(g.prompt_tokens or ())):
            if not waves:
                width = len(group.prompt_tokens or ())
            size = len(waves[-1]) + 1 if waves else 1
            tokens = size * (width + n * config.max_new_tokens)
            if not waves or tokens * per_token > config.cache_mb * 2**20:
                waves.append([])
                width = len(group.prompt_tokens or ())
            waves[-1].append(group)
        return waves

    def _run(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        seed: int,
        step: int,
        ends: set[int],
    ) -> list[list[Transcript]]:
        ends = ends | set(config.stop_tokens)
        device = lm.device
        lengths_P = torch.tensor([len(g.prompt_tokens or ()) for g in groups], device=device)
        cache = DecodeCache(lengths_P, n, config.max_new_tokens, lm.version)
        transcripts = [[Transcript() for _ in range(n)] for _ in groups]
        rows = [t for row in transcripts for t in row]
        keys = row_keys(groups, n, seed=seed, step=step)
        hashes = token_hashes(lm.vocab_size, device)
        with decoding(lm.model, cache):
            hidden_ND = self._prefill(lm, groups, lengths_P).repeat_interleave(n, dim=0)
            for t in range(config.max_new_tokens):
                forbidden = sorted(ends) if t < config.min_new_tokens else None
                logps_NV = sampler_logprobs(lm.head(hidden_ND), config, forbidden=forbidden)
                tokens, logps = draw(logps_NV, exponential_noise(keys, t, hashes))
                for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                    if row.finish is None:
                        row.append(token, logp, config, ends, lm.tokenizer)
                running = sum(row.finish is None for row in rows)
                if running == 0:
                    break
                if running < COMPACT_BELOW * len(rows):
                    keep = self._compact(cache, rows)
                    rows, keys = [rows[i] for i in keep], keys[keep]
                    tokens = tokens[torch.tensor(keep, device=device)]
                hidden_ND = self._decode(lm, cache, tokens)
        return transcripts

    @staticmethod
    def _prefill(lm: LanguageModel, groups: list[Group], lengths_P: torch.Tensor) -> torch.Tensor:
        """Run each prompt once; hidden state of its last token, ``[P, D]``."""
        width = int(lengths_P.max())
        ids = [(g.prompt_tokens or []) + [0] * (width - len(g.prompt_tokens or ())) for g in groups]
        positions = torch.arange(width, device=lm.device).expand(len(groups), width)
        output = lm.head.trunk(
            input_ids=torch.tensor(ids, device=lm.device),
            attention_mask=None,
            use_cache=False,
            **({"position_ids": positions} if lm.takes_positions else {}),
        )
        return output.last_hidden_state[torch.arange(len(groups), device=lm.device), lengths_P - 1]

    @staticmethod
    def _decode(lm: LanguageModel, cache: DecodeCache, tokens_N: torch.Tensor) -> torch.Tensor:
        """One token for every row; hidden states ``[N, D]``."""
        if cache.version != lm.version:
            raise RuntimeError("the weights changed while a cache was in use")
        cache.advance()
        positions = (cache.lengths_P + cache.step).repeat_interleave(cache.samples)[:, None]
        output = lm.head.trunk(
            input_ids=tokens_N[:, None],
            attention_mask=None,
            use_cache=False,
            **({"position_ids": positions} if lm.takes_positions else {}),
        )
        return output.last_hidden_state[:, -1]

    @staticmethod
    def _compact(cache: DecodeCache, rows: list[Transcript]) -> list[int]:
        """Drop finished rows; every prompt that stays keeps as many rows as the one with the most running.

        A prompt with fewer fills up with its finished rows, whose further tokens are ignored.
        """
        n = cache.samples
        running = [[i for i in range(p, p + n) if rows[i].finish is None] for p in range(0, len(rows), n)]
        most = max(map(len, running))
        prompts = [p for p, alive in enumerate(running) if alive]
        kept = []
        for p in prompts:
            ended = [i for i in range(p * n, p * n + n) if rows[i].finish is not None]
            kept.append((running[p] + ended)[:most])
        device = cache.lengths_P.device
        cache.select(torch.tensor(prompts, device=device), torch.tensor(kept, device=device))
        return [i for row in kept for i in row]


def cache_bytes_per_token(lm: LanguageModel) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    config = lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * lm.dtype.itemsize


def choose_sampler(
    lm: LanguageModel, config: SamplingConfig, probes: list[Group]
) -> tuple[Sampler, str | None]:
    """The tree engine where it reproduces the training forward's numbers on this model; else the plain one.

    ``probes`` are tokenised prompts with random ids. Returns the sampler and a line to show, or None.
    Raises InputError when the tree engine was asked for by name and fails.
    """
    if config.engine == "plain":
        return PlainSampler(), None
    greedy = SamplingConfig(max_new_tokens=6)
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2
    try:
        with short_windows(lm):
            tree = TreeSampler().sample(lm, probes, 3, greedy, seed=0, end_tokens=[])
            difference = _largest_difference(lm, tree)
        if difference <= tolerance:
            return TreeSampler(), None
        reason = f"log-probabilities differ by {difference:.1e}"
    except FAILURES as error:
        reason = f"{type(error).__name__} in its forward pass"
    line = f"{type(lm.model).__name__} does not take the tree engine ({reason})"
    if config.engine == "tree":
        raise InputError(f'{line}; set sampling.engine = "auto" or "plain"')
    return PlainSampler(), f"{line}; sampling repeats the prompt for every response"


def _largest_difference(lm: LanguageModel, groups: list[Group]) -> float:
    """Largest gap between sampler_ log-probabilities and the model's own, one plain sequence at a time."""
    worst = 0.0
    for group in groups:
        for response in group.responses:
            prompt, tokens = group.prompt_tokens or [], response.tokens or []
            ids = torch.tensor([prompt + tokens], device=lm.device)
            with torch.no_grad():
                logps = lm.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            for t, (token, logp) in enumerate(zip(tokens, response.sampler_logps or [], strict=True)):
                worst = max(worst, abs(float(logps[len(prompt) - 1 + t, token]) - logp))
    return worst
