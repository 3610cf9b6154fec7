"""How near a training pass comes to the machine's peak: ``python -m benchmarks.peak peak MODEL DATA "124M 8
2"``.

The variant is the model's size, the number of prompts and of responses to each. The model is made here, so
the folder and the file that workers are given are not read.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import settings
from benchmarks.flops import peak_gflops, tree_flops
from benchmarks.ours import facts_of
from benchmarks.protocol import Channel
from trimtab.data.collate import collate, microbatches
from trimtab.groups import Group, Response
from trimtab.methods.shared.setup import settle_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import wrap
from trimtab.training.config import TrainConfig


def new_model(config: dict[str, Any]) -> LanguageModel:
    """A model with random weights in fp32 and no tokenizer."""
    torch.manual_seed(settings.SEED)
    return wrap(Qwen2ForCausalLM(Qwen2Config(**config)), None)


def random_groups(prompts: int, prompt: int, responses: int, response: int) -> list[Group]:
    """Trees of random ids."""
    rng = random.Random(settings.SEED)

    def ids(count: int) -> list[int]:
        return [rng.randrange(settings.FIRST_WORD_ID, settings.VOCABULARY) for _ in range(count)]

    return [
        Group(
            id=str(p),
            prompt_tokens=ids(prompt),
            responses=[Response(tokens=ids(response)) for _ in range(responses)],
        )
        for p in range(prompts)
    ]


def main(name: str, model_dir: str, data_file: str, variant: str) -> None:
    """Forward and backward until told to stop."""
    channel = Channel()
    size, prompts, responses = variant.split()
    lm = new_model(settings.QWEN2 | settings.MODEL_SIZES[size])
    channel.loaded(lm.model.parameters())
    lm.cast(torch.bfloat16)
    settle_layout(lm, "auto")
    groups = random_groups(int(prompts), settings.PROMPT_TOKENS, int(responses), settings.RESPONSE_TOKENS)
    lengths = [settings.RESPONSE_TOKENS] * int(responses)
    flops = len(groups) * tree_flops(lm.config, settings.PROMPT_TOKENS, lengths)
    parts = microbatches(groups, TrainConfig().micro_batch_tokens, layout=lm.layout, divisible=True)
    batches = [collate(part, layout=lm.layout) for part in parts]
    tokens = batches[0].input_ids_BL.numel()
    peak = peak_gflops(lm.config, tokens, int(batches[0].mask_NT.sum()), lm.dtype)
    channel.ready(**facts_of(lm), flops_per_step=flops, peak_gflops=peak)
    while channel.wait():
        for batch in batches:
            logps_NT, _ = lm.token_logprobs(batch)
            logps_NT.sum().backward()
        lm.model.zero_grad(set_to_none=True)
        channel.done()


if __name__ == "__main__":
    main(*sys.argv[1:])
