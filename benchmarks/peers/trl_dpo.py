"""TRL's DPO as a worker: ``python -m benchmarks.peers.trl_dpo MODEL_DIR DATA_FILE VARIANT``."""

from __future__ import annotations

import json
import sys

from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from benchmarks import settings
from benchmarks.peers.steps import COMMON_ARGUMENTS, StepOnRequest, watch_loading
from benchmarks.protocol import Channel


def text_rows(pairs: list[dict[str, list[int]]]) -> dict[str, list[str]]:
    """The pairs as TRL reads them: it joins prompt and response, and adds the end token itself."""
    rows: dict[str, list[str]] = {"prompt": [settings.to_text(pair["prompt"]) for pair in pairs]}
    for side in ("chosen", "rejected"):
        rows[side] = [settings.to_text(pair[side][:-1]) for pair in pairs]
    return rows


def main(model_dir: str, data_file: str, variant: str) -> None:
    """Train until told to stop, one step per request."""
    channel = Channel()
    watch_loading(dpo_trainer, channel)
    with open(data_file) as file:
        pairs = json.load(file)[settings.PAIRS[variant].key]
    config = DPOConfig(
        **COMMON_ARGUMENTS,
        learning_rate=settings.LEARNING_RATE,
        beta=settings.DPO_BETA,
        per_device_train_batch_size=settings.DPO_PAIRS,
        seed=settings.SEED,
    )
    trainer = DPOTrainer(
        model=model_dir,
        args=config,
        train_dataset=Dataset.from_dict(text_rows(pairs)),
        callbacks=[StepOnRequest(channel)],
    )
    row = trainer.train_dataset[0]
    if {side: row[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")} != pairs[0]:
        raise RuntimeError("TRL's tokenised row is not the pair's ids")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
