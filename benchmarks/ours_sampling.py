"""Our sampling as a worker: ``python -m benchmarks.ours_sampling sampling MODEL_DIR DATA_FILE "WORKLOAD
WAY"``.

A step is one call of the sampler on a model computing in bf16. The way is the peer's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import settings
from benchmarks.ours import facts_of
from benchmarks.protocol import Channel
from benchmarks.workloads import Workload, workload_of
from trimtab.groups import Group
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.layout import probe_groups
from trimtab.models.load import ModelConfig, load_model
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig


def to_groups(prompts: list[list[int]], step: int) -> list[Group]:
    """The prompts as tokenised groups."""
    return [Group(id=f"{step}/{i}", prompt_tokens=ids) for i, ids in enumerate(prompts)]


def check(groups: list[Group], workload: Workload) -> None:
    """Raises RuntimeError unless every response has the length that was asked for."""
    lengths = [[len(response.tokens or ()) for response in group.responses] for group in groups]
    if lengths != [[new] * workload.responses for new in workload.new]:
        raise RuntimeError(f"expected {workload.new} new tokens, got {lengths}")


def main(name: str, model_dir: str, data_file: str, variant: str) -> None:
    """Sample until told to stop, one call per request."""
    channel = Channel()
    data = json.loads(Path(data_file).read_text())
    lm = load_model(ModelConfig(path=model_dir, dtype="bfloat16"))
    channel.loaded(lm.model.parameters())
    lm.cast(torch.bfloat16)
    settle_layout(lm, "auto")
    workload = workload_of(data, variant, 0)
    longest = max(workload.new)
    config = SamplingConfig(temperature=settings.TEMPERATURE, max_new_tokens=longest)
    sampler, line = choose_sampler(lm, config, probe_groups(lm.vocab_size))
    facts: dict[str, Any] = {**facts_of(lm), "engine": type(sampler).__name__, "note": line}
    channel.ready(**facts, tokens_per_step=workload.tokens)
    step = 0
    while channel.wait():
        workload = workload_of(data, variant, step)
        # As after a weight update: nothing of an earlier call may be reused.
        lm.version += 1
        limits: dict[str, Any] = {} if len(set(workload.new)) == 1 else {"limits": workload.new}
        groups = to_groups(workload.prompts, step)
        found = sampler.sample(lm, groups, workload.responses, config, seed=step, end_tokens=[], **limits)
        channel.done()
        check(found, workload)
        step += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
