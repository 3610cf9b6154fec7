"""TRL's trainers on given rows: ``python -m benchmarks.peers.parity_offline TASK_FILE…``, one case each.

A task holds the rows in the order of training, with the ids that they have to become. The curves of loss and
gradient norm are written beside it as ``peer.json``; so is what went wrong, as ``error``.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks.peers.parity_tasks import Task, arguments, curves_of, run_tasks

Row = dict[str, Any]


def _pair(row: Row) -> Row:
    chosen, rejected = sorted(row["responses"], key=lambda r: not r["preferred"])
    return {"prompt": row["prompt"], "chosen": chosen["text"], "rejected": rejected["text"]}


def _ranked(row: Row) -> Row:
    chosen, rejected = sorted(row["responses"], key=lambda r: r["rank"])
    return {"prompt": row["prompt"], "chosen": chosen["text"], "rejected": rejected["text"]}


def _with_margin(row: Row) -> Row:
    return {**_ranked(row), "margin": row["columns"]["margin"]}


def _single(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["responses"][0]["text"]}


def _thumb(row: Row) -> Row:
    return {**_single(row), "label": bool(row["responses"][0]["label"])}


def _ids(row: Row, side: int) -> list[int]:
    """Prompt and response; of a pair 0 is the better one."""
    better = sorted(row["responses"], key=lambda r: (not r["preferred"], r["rank"] or 0))
    return [*row["prompt_ids"], *better[side]["ids"]]


def _check(trainer: Any, rows: list[Row]) -> None:
    """Raises RuntimeError unless every row of the trainer's has the ids of ours."""
    for number, (theirs, row) in enumerate(zip(trainer.train_dataset, rows, strict=True)):
        prompt = theirs.get("prompt_ids", [])
        if "chosen_input_ids" in theirs:
            found = [theirs["chosen_input_ids"], theirs["rejected_input_ids"]]
        elif "chosen_ids" in theirs:
            found = [prompt + theirs["chosen_ids"], prompt + theirs["rejected_ids"]]
        elif "completion_ids" in theirs:
            found = [prompt + theirs["completion_ids"]]
        else:
            found = [theirs["input_ids"]]
            if "labels" in theirs:
                trained = [
                    i for i, label in zip(theirs["input_ids"], theirs["labels"], strict=True) if label != -100
                ]
                # Of a whole text TRL labels the first token too, which nothing predicts.
                if trained not in (row["responses"][0]["ids"], _ids(row, 0)):
                    raise RuntimeError(
                        f"row {number}: TRL trains on {trained}, not on {row['responses'][0]['ids']}"
                    )
        for side, ids in enumerate(found):
            if list(ids) != _ids(row, side):
                raise RuntimeError(f"row {number}: TRL's ids are {list(ids)}, ours {_ids(row, side)}")


TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "dpo": (DPOConfig, DPOTrainer, _pair),
    "cpo": (CPOConfig, CPOTrainer, _pair),
    "orpo": (ORPOConfig, ORPOTrainer, _pair),
    "reward": (RewardConfig, RewardTrainer, _ranked),
    "reward-margin": (RewardConfig, RewardTrainer, _with_margin),
    "sft": (SFTConfig, SFTTrainer, _single),
    "kto": (KTOConfig, KTOTrainer, _thumb),
}


def run(task: Task) -> dict[str, list[float]]:
    """Train as the task says; the curves."""
    config_class, trainer_class, columns = TRAINERS[task.trainer]
    rows = [row for batch in task.batches for row in batch]
    config = config_class(
        **arguments(
            task, per_device_train_batch_size=len(task.batches[0]), train_sampling_strategy="sequential"
        ),
        **task.options,
    )
    given = [columns(row) for row in rows]
    more: dict[str, Any] = {}
    if task.trainer.startswith("reward"):
        more["model"] = AutoModelForSequenceClassification.from_pretrained(task.model, dtype="float32")
        more["processing_class"] = AutoTokenizer.from_pretrained(task.model)
    elif task.trainer in ("cpo", "orpo"):
        from transformers import AutoModelForCausalLM

        more["model"] = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
        more["processing_class"] = AutoTokenizer.from_pretrained(task.model)
    else:
        more["model"] = task.model
    trainer = trainer_class(args=config, train_dataset=Dataset.from_list(given), **more)
    _check(trainer, rows)
    trainer.train()
    return curves_of(trainer)


if __name__ == "__main__":
    run_tasks(run, sys.argv[1:])
