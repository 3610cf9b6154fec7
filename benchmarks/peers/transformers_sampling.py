"""transformers' sampling as a worker: ``… transformers_sampling MODEL_DIR DATA_FILE "WORKLOAD WAY"``.

Ways: ``generate`` (one batch), ``generate-16`` and ``generate-32`` (batches sorted by length, each run to its
longest) and ``generate_batch`` (continuous batching).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks import settings
from benchmarks.protocol import Channel, versions
from benchmarks.workloads import Workload, sorted_batches, workload_of

PAGE_TOKENS = 32
"""Tokens a page of the continuous batching's cache; its default, 256, is longer than most requests here."""
AT_ONCE = 32
"""Requests in a step of the continuous batching. On a CPU its attention reads the keys of all of them for
each query, so that all 128 at once are slower; 8 and 16 are slower too."""
BATCH_TOKENS = 256
"""Tokens in such a step; 1,024 is slower for the same reason."""


def sampling_config(**more: Any) -> GenerationConfig:
    """Plain sampling at the temperature, without an end token, so that every response has its full length."""
    return GenerationConfig(
        do_sample=True,
        temperature=settings.TEMPERATURE,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=settings.PAD_ID,
        **more,
    )


def generate(model: Any, workload: Workload) -> int:
    """One left-padded batch; the number of new tokens."""
    width = max(map(len, workload.prompts))
    ids = torch.tensor([[settings.PAD_ID] * (width - len(p)) + p for p in workload.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in workload.prompts])
    config = sampling_config(max_new_tokens=max(workload.new), num_return_sequences=workload.responses)
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return int(found.shape[0] * (found.shape[1] - width))


def generate_batch(model: Any, workload: Workload) -> int:
    """Continuous batching, every request with its own length; the number of new tokens."""
    requests = [
        (ids, new)
        for ids, new in zip(workload.prompts, workload.new, strict=True)
        for _ in range(workload.responses)
    ]
    pages = max(-(-(len(ids) + new) // PAGE_TOKENS) for ids, new in requests)
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=AT_ONCE * (pages + 1),
        max_requests_per_batch=AT_ONCE,
        max_batch_tokens=BATCH_TOKENS,
    )
    tokens = 0
    with model.continuous_batching_context_manager(
        generation_config=sampling_config(max_new_tokens=max(workload.new)),
        continuous_batching_config=config,
        warmup=False,
    ) as manager:
        for ids, new in requests:
            manager.add_request(ids, max_new_tokens=new, eos_token_id=-1)
        finished = 0
        while finished < len(requests):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the continuous batching's thread ended early")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"a request failed: {result.error}")
                finished += 1
                tokens += len(result.generated_tokens)
    return tokens


def sample(model: Any, workload: Workload, way: str) -> int:
    """One call in the given way; the number of tokens that it drew."""
    if way == "generate_batch":
        return generate_batch(model, workload)
    if way == "generate":
        return generate(model, workload)
    return sum(generate(model, batch) for batch in sorted_batches(workload, int(way.rpartition("-")[2])))


def main(model_dir: str, data_file: str, variant: str) -> None:
    """Sample until told to stop, one call per request."""
    channel = Channel()
    data = json.loads(Path(data_file).read_text())
    way = variant.split()[1]
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    channel.loaded(model.parameters())
    tokens = workload_of(data, variant, 0).tokens
    packages = versions("torch", "transformers")
    channel.ready(threads=torch.get_num_threads(), **packages, tokens_per_step=tokens)
    step = 0
    while channel.wait():
        torch.manual_seed(step)
        with torch.inference_mode():
            drawn = sample(model, workload_of(data, variant, step), way)
        channel.done()
        if drawn < tokens:
            raise RuntimeError(f"expected {tokens} tokens, got {drawn}")
        step += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
