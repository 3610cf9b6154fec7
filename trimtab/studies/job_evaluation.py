"""What a run samples beside its training, to measure it on the way: no phase of the plan, but a warning."""

from __future__ import annotations

from typing import Any

from trimtab.planning import rollout
from trimtab.planning.job import Job, Sampling
from trimtab.planning.methods import MOST_ROWS, Card
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.studies.job_batch import limits_of
from trimtab.studies.job_data import Sample

HELDOUT_PROMPTS = 64
"""Held-out prompts that a method with a reward answers (``evaluation/watching/during.py``)."""


def answers_beside(card: Card, config: Any, job: Job, sample: Sample | None) -> list[str]:
    """A line on the keys and values of answers at each evaluation; none where nothing is answered."""
    watch, data = config.watch, config.data
    heldout = bool(data.heldout or data.heldout_fraction)
    if watch.answers or watch.safety:
        drawing, answers = watch.sampling, watch.limit * watch.samples
    elif heldout and hasattr(config, "reward"):
        drawing, answers = None, HELDOUT_PROMPTS
    else:
        return []
    drawing = drawing or getattr(config, "sampling", None) or SamplingConfig()
    if sample is None:
        prompt = limits_of(card, config, job.model, job.layout)[0]
    else:
        prompt = max(len(group.prompt_tokens or ()) for group in sample.groups)
    given = Sampling(
        prompts=answers,
        samples=1,
        prompt=prompt,
        response=drawing.max_new_tokens,
        longest_response=drawing.max_new_tokens,
        longest_prompt=prompt,
        cache_mb=drawing.cache_mb,
        max_rows=drawing.max_rows or MOST_ROWS,
        engine=rollout.engine_of(job.model, drawing.engine),
    )
    held = rollout.cache_of(job, given) / 2**20
    return [
        f"answers of evaluations ([watch], held-out prompts) are in no phase: {answers} of up to "
        f"{prompt + drawing.max_new_tokens} tokens hold {held:,.0f} MiB of keys and values beside"
    ]
