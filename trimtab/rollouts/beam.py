"""Beam search: K distinct likely responses to a prompt, for judges to rank. Not a way of sampling.

    s(y) = Σ_t log π(y_t) / |y|^α            |y| in tokens, its end included; α is ``length_power``

Each step every beam is continued by every token; the ``beams`` likeliest continuations by Σ log π go on.
Every ending of a beam is a response, and the K best by s are kept. The search ends when no beam could still
come to be among them: what is left to add to Σ log π is at most 0.

With ``beam_groups`` the beams are split into groups that choose one after the other, a token losing
``diversity`` nats for each beam of an earlier group that has just taken it (diverse beam search, Vijayakumar
et al., 2018, with the Hamming distance); Σ log π and s are without that loss. Each group gives a share of K.

What beam search finds was not drawn, so it has no probability of having been drawn: ``sampler_logps`` stays
None, and everything that forms a ratio refuses it. It goes through the model's own cache.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.rollouts.finish import Transcript, sampled_group, text_before_stop
from trimtab.rollouts.plain import cache_of
from trimtab.rollouts.sampling import SamplingConfig, check_context, limits_of
from trimtab.rollouts.strategies import MixedSampling

ROWS = 64
"""Beams of all prompts that run at once, where nothing is asked for."""


class CandidateSampling(MixedSampling):
    """How candidates for a judge are found: drawn, or by beam search."""

    strategy: Literal["sample", "beam"] = Field(
        "sample", description="draw responses, or search for likely ones"
    )
    beams: int = Field(0, ge=0, description="beams of the search; 0 takes the number of responses")
    length_power: float = Field(
        1.0, ge=0, description="beams are ranked by log-probability / tokens**this; 0 takes the whole sum"
    )
    beam_groups: int = Field(1, ge=1, description="groups of beams that avoid each other's tokens")
    diversity: float = Field(
        0.0, ge=0, description="nats that a token loses for each beam of an earlier group that has it"
    )

    @model_validator(mode="after")
    def _search(self) -> CandidateSampling:
        def changed(*names: str) -> list[str]:
            return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

        if self.strategy == "sample":
            if unused := changed("beams", "length_power", "beam_groups", "diversity"):
                raise ValueError(f'{unused[0]} has no effect without strategy = "beam"')
        elif unused := changed("temperature", "top_k", "top_p", "min_p", "mix", "cache_mb", "engine"):
            raise ValueError(f'{unused[0]} has no effect with strategy = "beam", which draws nothing')
        if (self.beam_groups > 1) != (self.diversity > 0):
            raise ValueError("beam_groups above 1 and diversity above 0 have an effect only together")
        return self

    def width(self, n: int) -> int:
        """Beams of a prompt, for n responses. Raises ValueError for numbers that do not fit each other."""
        width = self.beams or n
        if width < n:
            raise ValueError(f"{width} beams cannot give {n} responses: raise beams")
        if width % self.beam_groups or n % self.beam_groups:
            raise ValueError(
                f"{width} beams and {n} responses do not split evenly into {self.beam_groups} beam_groups"
            )
        return width


class BeamSampler:
    """The n best responses that a beam search finds, best first; fewer where there are not so many."""

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
        """See :class:`trimtab.rollouts.sampling.Sampler`; ``seed`` and ``step`` are not used.

        Raises InputError for a prompt over the context and a model without a key and value cache.
        """
        check_context(lm, groups, config)
        if not isinstance(config, CandidateSampling):
            raise TypeError("beam search takes the options of CandidateSampling")
        longest = limits_of(limits, groups, config)
        together = max(1, (config.max_rows or ROWS) // config.width(n))
        done: list[Group] = []
        for start in range(0, len(groups), together):
            part = slice(start, start + together)
            search = _Search(lm, groups[part], n, config, longest[part], end_tokens)
            search.run()
            for group, row in zip(groups[part], search.best(), strict=True):
                made = sampled_group(group, row, lm.tokenizer)
                for response in made.responses:
                    response.sampler_logps = None
                done.append(made)
                if on_group is not None:
                    on_group(len(done) - 1, made)
        return done


@dataclass(frozen=True)
class _Found:
    """A whole response."""

    score: float
    tokens: list[int]
    finish: str
    text: str | None = None


class _Search:
    """The search for some prompts at once. Axes: prompts P, groups of beams G, beams of a group B."""

    def __init__(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: CandidateSampling,
        limits: list[int],
        ends: list[int],
    ) -> None:
        self.lm, self.prompts, self.n, self.config, self.limits = lm, groups, n, config, limits
        self.ends = sorted(set(ends) | set(config.stop_tokens))
        shape = (len(groups), config.beam_groups, config.width(n) // config.beam_groups)
        self.scores_PGB = torch.full(shape, -torch.inf, dtype=torch.float64, device=lm.device)
        """Σ log π of each beam; −inf where there is none. At first a group's beams are all the same: one."""
        self.scores_PGB[:, :, 0] = 0.0
        self.tokens_RT = torch.zeros((self.scores_PGB.numel(), 0), dtype=torch.long, device=lm.device)
        self.found: list[list[list[_Found]]] = [[[] for _ in range(shape[1])] for _ in groups]
        """By prompt and group of beams, the n best so far, best first."""

    def run(self) -> None:
        """Search until no beam is left."""
        each = self.scores_PGB[0].numel()
        rows = [group.prompt_tokens or [] for group in self.prompts for _ in range(each)]
        width, device = max(map(len, rows)), self.lm.device
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        cache: Any = None
        for _ in range(max(self.limits)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            extra = {"position_ids": positions} if self.lm.takes_positions else {}
            output = self.lm.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
            )
            cache = cache_of(self.lm, output)
            parents_R = self._step(output.logits[:, -1].float().log_softmax(-1).double())
            if not self.scores_PGB.isfinite().any():
                return
            cache.reorder_cache(parents_R)
            ids = self.tokens_RT[:, -1:]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)

    def best(self) -> list[list[Transcript]]:
        """By prompt, the responses found: each group of beams gives its best that no earlier one gave."""
        out = []
        for limit, of_groups in zip(self.limits, self.found, strict=True):
            kept: dict[tuple[int, ...], _Found] = {}
            for found in of_groups:
                new = [item for item in found if tuple(item.tokens) not in kept]
                kept |= {tuple(item.tokens): item for item in new[: self.n // len(of_groups)]}
            out.append([_transcript(item, limit) for item in sorted(kept.values(), key=lambda f: -f.score)])
        return out

    def _step(self, logps_RV: torch.Tensor) -> torch.Tensor:
        """Continue every beam by a token; which row each new beam continues, ``[R]``."""
        count, groups, beams = self.scores_PGB.shape
        t, vocabulary = self.tokens_RT.shape[1], logps_RV.shape[-1]
        totals = self.scores_PGB[..., None] + logps_RV.view(count, groups, beams, vocabulary)
        if t >= self.config.min_new_tokens:
            self._collect_ends(totals[..., self.ends])
        totals[..., self.ends] = -torch.inf
        # How many beams of the earlier groups of a prompt have just taken each token.
        taken_PV = totals.new_zeros(count, vocabulary)
        parents, tokens = [], []
        for g in range(groups):
            of_group = totals[:, g].flatten(1)
            ranked = of_group
            if g:
                ranked = (totals[:, g] - self.config.diversity * taken_PV[:, None]).flatten(1)
            places_PB = ranked.topk(beams, dim=-1).indices
            self.scores_PGB[:, g] = scores_PB = of_group.gather(-1, places_PB)
            tokens.append(places_PB % vocabulary)
            taken_PV.scatter_add_(1, tokens[-1], scores_PB.isfinite().double())
            first = torch.arange(count, device=logps_RV.device)[:, None] * groups + g
            parents.append(first * beams + places_PB // vocabulary)
        parents_R, tokens_R = (torch.stack(x, dim=1).flatten() for x in (parents, tokens))
        self.tokens_RT = torch.cat([self.tokens_RT[parents_R], tokens_R[:, None]], dim=-1)
        self._collect_stopped()
        self._give_up()
        return parents_R

    def _collect_ends(self, totals_PGBE: torch.Tensor) -> None:
        """Every ending of every beam is a response."""
        length = self.tokens_RT.shape[1] + 1
        for place in totals_PGBE.isfinite().nonzero().tolist():
            score = float(totals_PGBE[tuple(place)])
            if self._counts(place[0], place[1], score, length):
                beam, end = self._row(*place[:3]), self.ends[place[3]]
                self._add(place[0], place[1], score, [*self.tokens_RT[beam].tolist(), end], "stop")

    def _collect_stopped(self) -> None:
        """Beams that have just completed a stop string, or are as long as they may be."""
        length = self.tokens_RT.shape[1]
        for p, g, b in self.scores_PGB.isfinite().nonzero().tolist():
            full = length >= self.limits[p]
            if not full and not self.config.stop:
                continue
            tokens = self.tokens_RT[self._row(p, g, b)].tolist()
            text = text_before_stop(tokens, self.config, self.lm.tokenizer)
            if full or text is not None:
                finish = "length" if text is None else "stop"
                self._add(p, g, float(self.scores_PGB[p, g, b]), tokens, finish, text)
                self.scores_PGB[p, g, b] = -torch.inf

    def _give_up(self) -> None:
        """End the beams of groups whose best can no longer be among the n best."""
        best_PG = self.scores_PGB.amax(-1).tolist()
        for p, row in enumerate(best_PG):
            for g, best in enumerate(row):
                # To the sum nothing is added but what is below 0, and a longer one is divided by more.
                if not self._counts(p, g, best, self.limits[p]):
                    self.scores_PGB[p, g] = -torch.inf

    def _counts(self, p: int, g: int, score: float, length: int) -> bool:
        """A response of that Σ log π and length would be among the n best."""
        found = self.found[p][g]
        return len(found) < self.n or score / length**self.config.length_power > found[-1].score

    def _add(
        self, p: int, g: int, score: float, tokens: list[int], finish: str, text: str | None = None
    ) -> None:
        found = self.found[p][g]
        made = _Found(score / len(tokens) ** self.config.length_power, tokens, finish, text)
        bisect.insort(found, made, key=lambda item: -item.score)
        del found[self.n :]

    def _row(self, p: int, g: int, b: int) -> int:
        _, groups, beams = self.scores_PGB.shape
        return (p * groups + g) * beams + b


def _transcript(found: _Found, limit: int) -> Transcript:
    made = Transcript(limit)
    made.tokens, made.finish, made.text = found.tokens, found.finish, found.text
    return made
