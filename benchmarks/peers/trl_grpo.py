"""TRL's GRPO as a worker: ``python -m benchmarks.peers.trl_grpo MODEL_DIR DATA_FILE``."""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks import settings
from benchmarks.peers.steps import COMMON_ARGUMENTS, StepOnRequest
from benchmarks.protocol import Channel


def even_share(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The common reward, on the text of what TRL drew.

    Raises RuntimeError if TRL stopped early, since the two sides would then time different work.
    """
    if any(len(ids) != settings.RESPONSE_TOKENS for ids in completion_ids):
        lengths = [len(ids) for ids in completion_ids]
        raise RuntimeError(f"expected {settings.RESPONSE_TOKENS} new tokens, got {lengths}")
    return [settings.reward(text) for text in completions]


def main(model_dir: str, data_file: str) -> None:
    """Train until told to stop, one step per request."""
    channel = Channel()
    with open(data_file) as file:
        prompts = json.load(file)["prompts"]
    config = GRPOConfig(
        **COMMON_ARGUMENTS,
        learning_rate=settings.LEARNING_RATE,
        beta=settings.GRPO_BETA,
        num_generations=settings.GRPO_RESPONSES,
        per_device_train_batch_size=settings.GRPO_PROMPTS * settings.GRPO_RESPONSES,
        max_completion_length=settings.RESPONSE_TOKENS,
        temperature=settings.TEMPERATURE,
        generation_kwargs={"min_new_tokens": settings.RESPONSE_TOKENS},
        shuffle_dataset=False,
        seed=settings.SEED,
    )
    trainer = GRPOTrainer(
        model=model_dir,
        reward_funcs=even_share,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [settings.to_text(ids) for ids in prompts]}),
        callbacks=[StepOnRequest(channel)],
    )
    first = trainer.processing_class(trainer.train_dataset[0]["prompt"])["input_ids"]
    if first != prompts[0]:
        raise RuntimeError("the tokenizer did not give back the prompt's ids")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
