"""The in-process engine: samples groups from the very module that is trained, no copy of the weights.

A prompt is run once for all its samples, and what prompts have in common once for all of them. A response
that finishes leaves at once and the next takes its place: every step runs the trunk once, on one packed row
that holds the newest token of every running response.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.kernels.decode import BLOCK, Plan
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import FAILURES, short_windows
from trimtab.rollouts.attention import Decode, Measure, Prefill, Segment, decoding, forward
from trimtab.rollouts.beam import BeamSampler, CandidateSampling
from trimtab.rollouts.cache import Blocks, Node
from trimtab.rollouts.draw import draw_mixed, draw_tokens
from trimtab.rollouts.finish import Transcript, sampled_group, text_before_stop
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import (
    Sampler,
    SamplingConfig,
    check_context,
    limits_of,
    row_keys,
    token_hashes,
)
from trimtab.rollouts.schedule import ROWS, Queue, Rows
from trimtab.rollouts.stack import agree, decode_stack
from trimtab.rollouts.strategies import Mix, mix_of
from trimtab.spread.shard import local_passes

MIB = 2**20  # bytes
PREFILL_TOKENS = 4096
"""Prompt tokens of one forward pass."""


class TreeSampler:
    """Tree decoding with continuous batching.

    The cache's memory stays allocated between calls with the same model; its content does not.
    """

    def __init__(self) -> None:
        self.blocks: Blocks | None = None
        self._made_for: tuple[weakref.ref[torch.nn.Module], torch.dtype, torch.device] | None = None

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
        """See :class:`trimtab.rollouts.sampling.Sampler`.

        Raises InputError for a prompt over the context, and where ``cache_mb`` is too small for one sequence.
        """
        check_context(lm, groups, config)
        mix = mix_of(config, n)
        if n < 1:
            return [sampled_group(group, [], lm.tokenizer) for group in groups]
        with local_passes(lm), decoding(lm.model):
            if not groups:
                return []
            blocks = self._blocks(lm)
            queue = Queue(groups, n, config)
            budget = config.cache_mb * MIB // blocks.block_bytes
            queue.check(budget, blocks.block_bytes, config)
            blocks.begin(queue.demand, budget, lm.version)
            keys = row_keys(groups, n, seed=seed, step=step)
            try:
                ends = set(end_tokens)
                run = _Run(lm, groups, n, config, queue, blocks, keys, ends, on_group, limits, mix)
                run.finish_all()
                assert blocks.live == 0, "the sampling engine holds blocks that nothing uses"
            finally:
                blocks.forget()
        return [run.done[i] for i in range(len(groups))]

    def _blocks(self, lm: LanguageModel) -> Blocks:
        """The pool of blocks in this model's shapes, which a pass over one token shows."""
        made = self._made_for
        if self.blocks is None or made is None or (made[0](), *made[1:]) != (lm.model, lm.dtype, lm.device):
            self.blocks = None
            if not lm.takes_positions:
                raise ValueError("a model without position ids does not take packed prompts")
            measure, one = Measure(), torch.zeros(1, dtype=torch.long, device=lm.device)
            forward(lm.head.trunk, measure, one, one)
            if not measure.shapes:
                raise ValueError("no layer's attention goes through the interface of transformers")
            self.blocks = Blocks(measure.shapes, lm.device)
            self._made_for = (weakref.ref(lm.model), lm.dtype, lm.device)
        return self.blocks


class _Run:
    """One call of the engine."""

    def __init__(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        queue: Queue,
        blocks: Blocks,
        keys: np.ndarray,
        ends: set[int],
        on_group: Callable[[int, Group], None] | None,
        limits: list[int] | None,
        mix: Mix | None,
    ) -> None:
        self.lm, self.groups, self.n, self.config, self.mix = lm, groups, n, config, mix
        self.queue, self.blocks, self.keys, self.on_group = queue, blocks, keys, on_group
        self.stack = decode_stack(lm, blocks) if blocks.stack_agrees is not False else None
        self.limits = limits_of(limits, groups, config)
        self.ends = np.array(sorted(ends | set(config.stop_tokens)), dtype=np.int64)
        self.hashes = token_hashes(lm.vocab_size, lm.device)
        self.rows = Rows(min(config.max_rows or ROWS, len(groups) * n), config.max_new_tokens)
        self.most = len(self.rows.key)
        self.transcripts: list[list[Transcript | None]] = [[None] * n for _ in groups]
        self.left = [n] * len(groups)
        self.hidden: dict[int, torch.Tensor] = {}
        """By group, of its prompt's last token; until its last sample is let in."""
        self.done: dict[int, Group] = {}

    def finish_all(self) -> None:
        """Sample until nothing waits and nothing runs."""
        rows, plan = self.rows, None
        hidden_RD: torch.Tensor | None = None
        while True:
            if fresh := self._admit():
                hidden_RD = torch.cat([*([hidden_RD] if hidden_RD is not None else []), *fresh])
                plan = None
            if hidden_RD is None:
                return
            logits_RV, r = self.lm.head(hidden_RD), slice(0, rows.count)
            noise = (self.hashes, rows.key[r], rows.drawn[r], self.ends)
            if self.mix is None:
                tokens, logps = draw_tokens(logits_RV, self.config, *noise)
            else:
                tokens, logps = draw_mixed(logits_RV, self.mix, rows.request[r] % self.n, *noise)
            rows.record(tokens, logps)
            if self._retire(tokens):
                plan = None
            hidden_RD = None
            if rows.count:
                plan = plan or self.queue.plan(rows)
                hidden_RD = self._decode(plan)

    def _admit(self) -> list[torch.Tensor]:
        """Let in what fits; the hidden states that its first tokens are drawn from, ``[·, D]``."""
        if not self.queue.waiting or self.rows.count == self.most:
            return []
        admitted, nodes = self.queue.admit(self.blocks, self.rows.count, self.most)
        if nodes:
            self._prefill(nodes, {id(self.queue.leaves[group]): group for group, _ in admitted})
        fresh = []
        for group, samples in admitted:
            requests = range(group * self.n + samples.start, group * self.n + samples.stop)
            keys = self.keys[requests.start : requests.stop]
            prompt = len(self.groups[group].prompt_tokens or ())
            self.rows.add(group, requests, keys, prompt, self.limits[group])
            last = samples.stop == self.n
            hidden_D = self.hidden.pop(group) if last else self.hidden[group]
            fresh.append(hidden_D.expand(len(samples), -1))
        return fresh

    def _prefill(self, nodes: list[Node], leaves: dict[int, int]) -> None:
        """Compute the nodes' keys and values, several in a pass; keep the hidden states of prompts' ends."""
        for segments in _passes(nodes):
            self.blocks.check(self.lm.version)
            ids = [t for s in segments for t in s.node.tokens[s.begin : s.begin + s.length]]
            places = [s.node.start + s.begin + i for s in segments for i in range(s.length)]
            ids_L, positions_L = torch.tensor([ids, places], device=self.lm.device)
            hidden_LD = forward(self.lm.head.trunk, Prefill(self.blocks, segments), ids_L, positions_L)
            end = 0
            for s in segments:
                end += s.length
                if s.begin + s.length == len(s.node.tokens) and id(s.node) in leaves:
                    self.hidden[leaves[id(s.node)]] = hidden_LD[end - 1 : end].clone()

    def _decode(self, plan: Plan) -> torch.Tensor:
        """The trunk on the newest token of every row: hidden states ``[R, D]``."""
        self.blocks.check(self.lm.version)
        rows = self.rows
        r = slice(0, rows.count)
        rows.extend(self.blocks)
        ids = rows.tokens[rows.slot[r], rows.drawn[r] - 1]
        pair = torch.from_numpy(np.stack([ids, rows.position[r]])).to(self.lm.device)
        if self.stack is not None and self.blocks.stack_agrees:
            hidden_RD = self.stack(plan, pair[0], pair[1])
        else:
            hidden_RD = forward(self.lm.head.trunk, Decode(self.blocks, plan), pair[0], pair[1])
            if self.stack is not None and self.blocks.stack_agrees is None:
                # Once for a model. Whichever is chosen takes the step last, so that what is drawn, and the
                # keys left, do not depend on whether this was the time: a resumed run compares again.
                ours_RD = self.stack(plan, pair[0], pair[1])
                self.blocks.stack_agrees = agree(ours_RD, hidden_RD)
                if self.blocks.stack_agrees:
                    hidden_RD = ours_RD
                else:
                    hidden_RD = forward(self.lm.head.trunk, Decode(self.blocks, plan), pair[0], pair[1])
        rows.stored[r] += 1
        rows.position[r] += 1
        return hidden_RD

    def _retire(self, tokens_R: np.ndarray) -> bool:
        """Take out the rows that their newest token finishes; True where there are any."""
        rows, config = self.rows, self.config
        stopped = np.isin(tokens_R, self.ends)
        texts: dict[int, str] = {}
        if config.stop:
            for row in np.flatnonzero(~stopped).tolist():
                text = text_before_stop(rows.transcript(row).tokens, config, self.lm.tokenizer)
                if text is not None:
                    texts[row] = text
                    stopped[row] = True
        finished = np.flatnonzero(stopped | (rows.drawn[: rows.count] >= rows.limit[: rows.count]))
        if not len(finished):
            return False
        complete = []
        for row in finished.tolist():
            made = rows.transcript(row)
            made.finish, made.text = "stop" if stopped[row] else "length", texts.get(row)
            group, sample = divmod(int(rows.request[row]), self.n)
            self.transcripts[group][sample] = made
            self.left[group] -= 1
            if self.left[group] == 0:
                complete.append(group)
        rows.remove(finished, self.blocks)
        for group in complete:
            self.queue.release(group, self.blocks)
            row_of = [t for t in self.transcripts[group] if t is not None]
            self.done[group] = sampled_group(self.groups[group], row_of, self.lm.tokenizer, self.mix)
            if self.on_group is not None:
                self.on_group(group, self.done[group])
        return True


def _passes(nodes: list[Node]) -> list[list[Segment]]:
    """The nodes in passes of up to PREFILL_TOKENS; a node is cut, at a block's end, where it does not fit."""
    passes: list[list[Segment]] = [[]]
    room = PREFILL_TOKENS
    for node in nodes:
        begin = 0
        while begin < len(node.tokens):
            length = len(node.tokens) - begin
            if length > room:
                length = room // BLOCK * BLOCK
            if length == 0:
                passes.append([])
                room = PREFILL_TOKENS
                continue
            passes[-1].append(Segment(node, begin, length))
            begin, room = begin + length, room - length
    return passes


def choose_sampler(
    lm: LanguageModel, config: SamplingConfig, probes: list[Group]
) -> tuple[Sampler, str | None]:
    """The tree engine where it reproduces the training forward's numbers on this model; else the plain one.

    ``probes`` are tokenised prompts with random ids. Returns the sampler and a line to show, or None.
    Raises InputError when the tree engine was asked for by name and fails.
    """
    if isinstance(config, CandidateSampling) and config.strategy == "beam":
        return BeamSampler(), None
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
