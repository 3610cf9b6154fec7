"""TRL's experimental PPO as a worker: ``python -m benchmarks.peers.trl_ppo MODEL_DIR DATA_FILE VARIANT``.

Its loop calls ``on_step_end`` once per rollout, after the last epoch on it, so that a request is one whole
update: sampling, scoring, advantages, and all optimiser steps.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import settings
from benchmarks.peers.steps import COMMON_ARGUMENTS, StepOnRequest
from benchmarks.protocol import Channel

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# TRL's PPO makes an Accelerator of its own, which reads this and not the configuration's bf16.
os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if sys.argv[-1].endswith("as-installed") else "bf16"
from trl.experimental.ppo import PPOConfig, PPOTrainer

AS_INSTALLED = sys.argv[-1].endswith("as-installed")


def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computing in bf16 where that is safe; weights are rounded once a call."""

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments, **keywords)

    return call


def load_models(model_dir: str) -> dict[str, Any]:
    """Policy and value model in fp32, as their optimiser's masters; the reference and the reward in bf16.

    As installed, all four are loaded as they were saved, in fp32.

    TRL puts only the pass that trains under autocast. Sampling and the rollout's values get it here too,
    since ours are in bf16: a step of one epoch is about a sixth shorter for it.
    """
    reward_dir = str(Path(model_dir).with_name("reward"))
    causal, scalar = AutoModelForCausalLM.from_pretrained, AutoModelForSequenceClassification.from_pretrained
    policy: Any = causal(model_dir, dtype=torch.float32)
    value: Any = scalar(reward_dir, dtype=torch.float32)
    if not AS_INSTALLED:
        policy.generate = under_autocast(policy.generate)
        value.model.forward = under_autocast(value.model.forward)
    frozen = torch.float32 if AS_INSTALLED else torch.bfloat16
    return {
        "model": policy,
        "ref_model": causal(model_dir, dtype=frozen).eval(),
        "value_model": value,
        "reward_model": scalar(reward_dir, dtype=frozen).eval(),
    }


def main(model_dir: str, data_file: str, variant: str) -> None:
    """Train until told to stop, one rollout per request."""
    channel = Channel()
    shape, epochs, _ = settings.rollout_of(variant)
    prompts = [ids[: shape.prompt_tokens] for ids in json.loads(Path(data_file).read_text())["prompts"]]
    # One optimiser step per mini-batch: TRL takes one per gradient_accumulation_steps micro-batches, whatever
    # num_mini_batches says, so the batch is one micro-batch here, which the mini-batches cut.
    config = PPOConfig(
        **COMMON_ARGUMENTS,
        learning_rate=settings.LEARNING_RATE,
        total_episodes=1_000_000 * shape.prompts,
        per_device_train_batch_size=shape.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=shape.prompts // shape.mini_batch,
        num_ppo_epochs=epochs,
        response_length=settings.RESPONSE_TOKENS,
        temperature=settings.TEMPERATURE,
        kl_coef=settings.PPO_BETA,
        num_sample_generations=0,
        seed=settings.SEED,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[: shape.prompts]}),
        callbacks=[StepOnRequest(channel)],
        **load_models(model_dir),
    )
    if not AS_INSTALLED and trainer.accelerator.mixed_precision != "bf16":
        raise RuntimeError(f"expected bf16 autocast, got {trainer.accelerator.mixed_precision}")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
