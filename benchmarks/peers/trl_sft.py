"""TRL's SFT as a worker: ``python -m benchmarks.peers.trl_sft MODEL_DIR DATA_FILE WAY``.

The ways are those by which TRL can meet sequences of mixed lengths. A step has the same tokens in each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from benchmarks import settings
from benchmarks.peers.steps import COMMON_ARGUMENTS, StepOnRequest, watch_loading
from benchmarks.protocol import Channel

PACK_TOKENS = 1024
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "padded": (settings.SFT_SEQUENCES, {}),
    "grouped": (8, {}),
    "packed": (1, {"packing": True, "max_length": PACK_TOKENS}),
    # Without packing TRL takes a flattened batch only where no length is enforced.
    "padding-free": (4, {"padding_free": True, "max_length": None}),
}
"""Name → sequences (packed: packs) in a batch, and options. Batches are accumulated to one step."""
REPEATS = 64
"""Copies of the demonstrations in the data set, so that packs fill up and epochs are long."""


def text_rows(demonstrations: list[dict[str, list[int]]]) -> dict[str, list[str]]:
    """The rows as TRL reads them: it joins prompt and completion, and adds the end token itself."""
    return {
        "prompt": [settings.to_text(row["prompt"]) for row in demonstrations],
        "completion": [settings.to_text(row["completion"][:-1]) for row in demonstrations],
    }


def main(model_dir: str, data_file: str, way: str) -> None:
    """Train until told to stop, one step per request."""
    channel = Channel()
    watch_loading(sft_trainer, channel)
    with open(data_file) as file:
        rows = json.load(file)["demonstrations"]
    batch, options = WAYS[way]
    if way in ("grouped", "padding-free"):
        rows.sort(key=lambda row: len(row["prompt"]) + len(row["completion"]))
    a_step = settings.SFT_TOKENS // PACK_TOKENS if way == "packed" else settings.SFT_SEQUENCES
    config = SFTConfig(
        **COMMON_ARGUMENTS,
        **options,
        learning_rate=settings.LEARNING_RATE,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=a_step // batch,
        train_sampling_strategy="sequential",
        seed=settings.SEED,
    )
    trainer = SFTTrainer(
        model=model_dir,
        args=config,
        train_dataset=Dataset.from_dict(text_rows(rows * REPEATS)),
        callbacks=[StepOnRequest(channel, tokens_per_step=settings.SFT_TOKENS)],
    )
    if way != "packed" and trainer.train_dataset[0]["input_ids"] != rows[0]["prompt"] + rows[0]["completion"]:
        raise RuntimeError("TRL's tokenised row is not the demonstration's ids")
    if way == "packed" and len(trainer.train_dataset) > 1.05 * REPEATS * a_step:
        raise RuntimeError(
            f"{len(trainer.train_dataset)} packs: a step of {a_step} would have too few tokens"
        )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
