"""TRL's reward modelling as a worker: ``python -m benchmarks.peers.trl_reward MODEL_DIR DATA_FILE``."""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from trl import RewardConfig, RewardTrainer
from trl.trainer import reward_trainer

from benchmarks import settings
from benchmarks.peers.steps import COMMON_ARGUMENTS, StepOnRequest, watch_loading
from benchmarks.peers.trl_dpo import text_rows
from benchmarks.protocol import Channel


def main(model_dir: str, data_file: str) -> None:
    """Train until told to stop, one step per request."""
    channel = Channel()
    watch_loading(reward_trainer, channel)
    with open(data_file) as file:
        pairs = json.load(file)["pairs"]
    config = RewardConfig(
        **COMMON_ARGUMENTS,
        learning_rate=settings.LEARNING_RATE,
        center_rewards_coefficient=settings.CENTRE,
        per_device_train_batch_size=settings.DPO_PAIRS,
        seed=settings.SEED,
    )
    trainer = RewardTrainer(
        model=model_dir,
        args=config,
        train_dataset=Dataset.from_dict(text_rows(pairs)),
        callbacks=[StepOnRequest(channel)],
    )
    row = trainer.train_dataset[0]
    for side in ("chosen", "rejected"):
        if row[f"{side}_ids"] != pairs[0]["prompt"] + pairs[0][side]:
            raise RuntimeError("TRL's tokenised row is not the pair's ids")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
