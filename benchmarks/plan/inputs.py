"""Writes a model's folder and a method's rows: ``python -m benchmarks.plan.inputs FOLDER NAME``."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.plan.cases import MODELS, PROMPT, RESPONSE, folder_of
from benchmarks.settings import FIRST_WORD_ID, VOCABULARY, to_text

ROWS = 48


def write_rows(file: Path, kind: str, rows: int = ROWS) -> None:
    """Rows of one kind of feedback, every prompt of PROMPT tokens and every response of RESPONSE."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return to_text([draw.randrange(FIRST_WORD_ID, VOCABULARY) for _ in range(tokens)])

    def response() -> str:
        # Rendering adds the end token.
        return text(RESPONSE - 1)

    def row(number: int) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": text(PROMPT)}
        if kind == "demonstrations":
            return prompt | {"completion": response()}
        if kind == "pairs":
            return prompt | {"chosen": response(), "rejected": response()}
        if kind == "labels":
            return prompt | {"completion": response(), "label": number % 2 == 0}
        if kind == "rankings":
            return prompt | {"responses": [response() for _ in range(4)], "ranks": [1, 2, 3, 4]}
        if kind == "steps":
            halves = [text(RESPONSE // 2) for _ in range(2)]
            return prompt | {"completions": halves, "labels": [True, number % 2 == 0]}
        return prompt

    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(rows)), encoding="utf-8")


def write_model(folder: Path, name: str) -> None:
    """The language model in ``folder``, a reward model of its size in ``folder``-reward; random weights."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        Qwen2Tokenizer,
    )

    from benchmarks.inputs import byte_pair_rules

    family, sizes = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, num_labels=1)
    vocabulary, merges = byte_pair_rules()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<end>"}
    for auto, place in (
        (AutoModelForSequenceClassification, folder.with_name(f"{folder.name}-reward")),
        (AutoModelForCausalLM, folder),
    ):
        auto.from_config(config).save_pretrained(place)
        Qwen2Tokenizer(vocabulary, merges, padding_side="left", **special).save_pretrained(place)
    (folder / "whole").touch()


def model_folder(root: Path, name: str) -> Path:
    """Where the model is, or is to be."""
    return root / folder_of(name)


if __name__ == "__main__":
    write_model(model_folder(Path(sys.argv[1]), sys.argv[2]), sys.argv[2])
