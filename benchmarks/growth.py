"""One point of ``growth`` as a worker: ``python -m benchmarks.growth growth MODEL DATA "30M 8192 8 256"``.

The model is made here, so the folder and the file that workers are given are not read. A step is what a GRPO
update computes before its optimiser moves: log-probabilities and entropy of every response, a loss, its
gradient added up in fp32.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.growth_points import PROMPTS, RESPONSE_TOKENS, Point
from benchmarks.ours import facts_of
from benchmarks.peak import new_model, random_groups
from benchmarks.protocol import Channel
from trimtab.data.collate import collate, microbatches
from trimtab.methods.shared.setup import settle_layout
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser


def main(name: str, model_dir: str, data_file: str, variant: str) -> None:
    """Forward and backward until told to stop."""
    channel = Channel()
    point = Point.parse(variant)
    lm = new_model(point.config)
    channel.loaded(lm.model.parameters())
    settle_layout(lm, "auto")
    # The budget holds the base's 8 responses beside any prompt: with less a long prompt would be computed
    # again for each tree that its responses are spread over.
    sizes = TrainConfig(micro_batch_tokens=max(4096, point.prompt + Point().group * RESPONSE_TOKENS))
    optimiser = Optimiser(lm.model, sizes, torch.bfloat16)
    groups = random_groups(PROMPTS, point.prompt, point.group, RESPONSE_TOKENS)
    tokens = PROMPTS * (point.prompt + point.group * RESPONSE_TOKENS)
    channel.ready(**facts_of(lm), tokens_per_step=tokens)
    while channel.wait():
        for part in microbatches(groups, sizes.micro_batch_tokens, layout=lm.layout, divisible=True):
            batch = collate(part, layout=lm.layout)
            policy_logps_NT, _ = lm.token_logprobs(batch, entropy=True)
            ratio_NT = (policy_logps_NT - policy_logps_NT.detach()).exp()
            loss = ratio_NT.masked_fill(~batch.mask_NT, 0).sum() / tokens
            optimiser.backward(loss)
        optimiser.clear()
        channel.done()


if __name__ == "__main__":
    main(*sys.argv[1:])
