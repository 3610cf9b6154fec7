"""A device's part of a rollout: how many responses run together, and what the sampler holds for them.

Both samplers of ``rollouts/``: the tree engine, with its blocks and continuous batching, and the plain one,
which runs all responses at once, each behind its own copy of the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from trimtab.planning import activations
from trimtab.planning.job import BYTES, Job, Model, Sampling
from trimtab.planning.numbers import Number, ceil, choose, floor, largest, smallest

MIB = 2**20
BLOCK = 32
"""Tokens of a block of the cache (``kernels/decode.py``)."""
PREFILL = 4096
"""Prompt tokens of one pass (``rollouts/engine.py``)."""
UNCOMPILED, FILTERED = 16, 32
"""Bytes a logit that a draw takes in PyTorch: noise, log-probabilities and their sums in fp32; with top-k,
top-p or min-p what is sorted and added up besides (``rollouts/sampling.py``)."""
CAPPED = ("gemma2",)
"""Not packed for its soft-capping alone, which the tree engine computes."""


def engine_of(model: Model, asked: Literal["auto", "tree", "plain"] = "auto") -> Literal["tree", "plain"]:
    """The sampler that a run takes; it decides by a check on the loaded model (``choose_sampler``)."""
    if asked != "auto":
        return asked
    return "tree" if model.packed or model.family in CAPPED else "plain"


def drawn_by(job: Job) -> Sampling:
    """The job's rollout, of a method that has one."""
    assert job.sampling is not None
    return job.sampling


def share_of(job: Job, groups: Number) -> Number:
    """Of so many groups, which are dealt out whole, the fullest device's part: 1 on one device."""
    return choose(job.devices - 1, ceil(groups / job.devices) / groups, 1)


def prompts_of(job: Job) -> Number:
    """Prompts that one device samples from."""
    return ceil(drawn_by(job).prompts / job.devices)


def answers_of(job: Job) -> Number:
    """Responses that one device draws."""
    return prompts_of(job) * drawn_by(job).samples


def rows_at_once(job: Job) -> Number:
    """Responses that run together: as many as asked for, as there are, as the cache has room for."""
    s = drawn_by(job)
    if s.engine == "plain":
        return answers_of(job)
    room = floor(s.cache_mb * MIB / (token_bytes(job) * (s.longest_response + s.longest_prompt / s.samples)))
    return smallest(s.max_rows, answers_of(job), largest(1, room))


def token_bytes(job: Job) -> Number:
    """Of one token's keys and values in all layers."""
    model, values = job.model, job.model.attended_value
    heads = model.heads if model.latent else model.kv_heads
    if drawn_by(job).engine == "tree":
        # A value's width is rounded up to 16 in each head.
        values = heads * 16 * ceil(values / heads / 16)
    return model.layers * (model.attended_key + values) * BYTES[job.compute]


def cache(job: Job) -> Number:
    """Bytes of keys and values that a rollout comes to hold."""
    s, model = drawn_by(job), job.model
    if s.engine == "plain":
        length = s.longest_prompt + s.longest_response
        windowed = _in_window(model, length)
        # A layer's are copied as they grow.
        kept = length * (model.layers - model.windowed) + windowed * model.windowed + length
        return answers_of(job) * kept * token_bytes(job) / model.layers
    own = ceil((s.longest_response - 1) / BLOCK)
    rows = smallest(s.max_rows, answers_of(job))
    wanted = prompts_of(job) * ceil(s.longest_prompt / BLOCK) + rows * own
    return smallest(wanted * BLOCK * token_bytes(job), s.cache_mb * MIB)


def _in_window(model: Model, length: Number) -> Number:
    """Tokens of so many that a layer with a window keeps."""
    return smallest(length, model.window)


def logits(job: Job) -> Number:
    """Bytes of logits as tokens are drawn; the plain sampler's first pass makes those of whole prompts."""
    s, model, b = drawn_by(job), job.model, BYTES[job.compute]
    drawn = 0
    if s.filtered:
        drawn = FILTERED
    elif job.engine == "gpu" or s.engine == "plain" or job.compute == "float64":
        drawn = UNCOMPILED
    read = s.longest_prompt if s.engine == "plain" else 1
    return rows_at_once(job) * model.vocabulary * (b * read + drawn)


def moment(job: Job) -> Number:
    """Bytes of activations beside :func:`logits` while prompts are read."""
    s, model = drawn_by(job), job.model
    each = activations.layer_moment(job, model, job.compute)
    if s.engine == "tree":
        return smallest(PREFILL, prompts_of(job) * s.prompt) * each
    tokens = answers_of(job) * s.longest_prompt
    # Of a layer's numbers only the last hidden states are left when the logits are made.
    return largest(tokens * BYTES[job.compute] * model.width, tokens * each - logits(job))


def cache_of(job: Job, sampling: Sampling) -> Number:
    """Bytes of keys and values, were the job's policy sampled so."""
    return cache(replace(job, sampling=sampling))
