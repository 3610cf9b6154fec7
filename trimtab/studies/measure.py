"""How fast this model runs on this data and this machine: a few seconds of each kind of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from trimtab.data.collate import collate, group_tokens
from trimtab.data.convert import as_pairs
from trimtab.groups import Group
from trimtab.methods.shared.setup import tokens_of
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.studies.recipes import Speeds
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser
from trimtab.training.precision import choose_dtype

PROBE_TOKENS = 2048
"""Tokens of the micro-batch that is timed."""


def measure(lm: LanguageModel, comparisons: Sequence[Group], new: int, load: float) -> Speeds:
    """Time the model on tokenised comparisons: one micro-batch each, after one to warm up.

    ``load``: the seconds that loading it took. Its weights are rounded to what training computes in.
    """
    pairs: list[Group] = []
    for pair in as_pairs(comparisons):
        pairs.append(pair)
        if sum(group_tokens(p, lm.layout) for p in pairs) >= PROBE_TOKENS:
            break
    parameters = sum(p.numel() for p in lm.model.parameters())
    forward_fp32, sampling_fp32 = _forward_seconds(lm, pairs), _sample_seconds(lm, pairs, new)
    dtype, _ = choose_dtype(lm.requested_dtype, lm.config, lm.device, PROBE_TOKENS)
    optimiser = Optimiser(lm.model, TrainConfig(lr=0.0), dtype)
    train, update = _train_seconds(lm, pairs, optimiser)
    forward, sampling = forward_fp32, sampling_fp32
    if dtype not in (torch.float32, torch.float64):
        forward, sampling = _forward_seconds(lm, pairs), _sample_seconds(lm, pairs, new)
    return Speeds(
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        load=load,
        train=train,
        update=update,
        forward=forward,
        sampling=sampling,
        forward_fp32=forward_fp32,
        sampling_fp32=sampling_fp32,
    )


def _timed(run: Callable[[], object]) -> float:
    """Seconds of the faster of two runs, after one that sets memory aside and chooses kernels."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


@torch.no_grad()
def _forward_seconds(lm: LanguageModel, pairs: list[Group]) -> float:
    batch = collate(pairs, layout=lm.layout, device=lm.device)
    return _timed(lambda: float(lm.token_logprobs(batch)[0].sum())) / tokens_of(pairs)


def _train_seconds(lm: LanguageModel, pairs: list[Group], optimiser: Optimiser) -> tuple[float, float]:
    batch = collate(pairs, layout=lm.layout, device=lm.device)

    def backward() -> None:
        optimiser.backward(-lm.token_logprobs(batch)[0].sum() / batch.mask_NT.sum())

    train = _timed(backward)
    updates = []
    for _ in range(2):
        began = time.perf_counter()
        optimiser.step(0.0)
        updates.append(time.perf_counter() - began)
        backward()
    optimiser.clear()
    return train / tokens_of(pairs), updates[-1]


def _sample_seconds(lm: LanguageModel, pairs: list[Group], new: int) -> tuple[float, float]:
    """Seconds of one token for all responses, and for each: from one prompt's eight, and four prompts'."""
    length = min(32, new)
    config = SamplingConfig(max_new_tokens=length, min_new_tokens=length)
    sampler, _ = choose_sampler(lm, config, probe_groups(lm.vocab_size))
    room = max(1, lm.context - length)
    prompts = [
        Group(id=f"probe:{k}", prompt_tokens=(pairs[k % len(pairs)].prompt_tokens or [])[-room:])
        for k in range(4)
    ]

    def draw(count: int) -> float:
        def run() -> None:
            sampler.sample(lm, prompts[:count], 8, config, seed=0, step=0, end_tokens=[])

        return _timed(run) / length

    few, many = draw(1), draw(4)
    each = max(0.0, (many - few) / 24)
    return max(0.0, few - 8 * each), each
