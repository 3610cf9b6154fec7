"""What both sides of every case start from: a small trained Llama, rows of the newsroom, fixed rollouts.

``build(folder)`` writes, once::

    model/             a Llama of two layers after a short supervised training, with the newsroom's tokenizer
    reward/            the same trunk under a head of one score, random, for reward models and critics
    pairs.jsonl, short.jsonl (the pairs behind prompts of one token), demonstrations.jsonl, thumbs.jsonl,
    prompts.jsonl
    rollouts.json      {kind: {prompt: [{"tokens", "text", "finish", "reward"}, …]}}

Rollouts are drawn once from ``model/``: of kind "mixed" with lengths as they come, of kind "even" all of the
same length. A reward is how many of the response's words its prompt has, in eighths: a group's mean is then
exact in fp32, so that what a peer's advantages add up to is 0 and not a rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

SEED = 0
STEPS = 50
BATCH = 8
"""Groups (pairs, demonstrations, thumbs) in a step of what learns from given rows."""
ROWS = 64
"""Rows of each file: a pass is ROWS / BATCH steps."""
PROMPTS = 4
"""Prompts in a step of what samples."""
RESPONSES = 4
"""Sampled to each prompt."""
NEW_TOKENS = 16
EVEN_TOKENS = 10
POOL = 40
"""Prompts with rollouts."""
WIDTH = 64
SFT_STEPS = 150
_FACTS = [SEED, ROWS, RESPONSES, NEW_TOKENS, EVEN_TOKENS, POOL, WIDTH, SFT_STEPS, "4"]


def place(cache: Path) -> Path:
    """Where :func:`build` writes under ``cache``: another folder for other constants."""
    return cache / f"parity-{hashlib.sha256(json.dumps(_FACTS).encode()).hexdigest()[:12]}"


def build(folder: Path) -> Path:
    """Write the folder unless it is whole; returns it."""
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    from trimtab.newsroom.files import write_world

    counts: dict[str, Any] = {"demonstrations": 1600, "pairs": ROWS, "prompts": POOL, "heldout": 0}
    files = write_world(folder / "world", seed=SEED, rankings=0, ratings=0, **counts)
    _write_models(folder, files["demonstrations"])
    rows = {name: _read(files[name]) for name in ("demonstrations", "pairs", "prompts")}
    rows["demonstrations"] = rows["demonstrations"][:ROWS]
    rows["short"] = [{**row, "prompt": ":"} for row in rows["pairs"]]
    rows["pairs"] = [row | {"margin": k % 4 / 4} for k, row in enumerate(rows["pairs"])]
    # Two thumbs up to one down, in an order that leaves no batch with one class alone.
    rows["thumbs"] = [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if k % 3 == 1 else "chosen"],
            "label": k % 3 != 1,
        }
        for k, row in enumerate(rows["pairs"])
    ]
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "rollouts.json").write_text(json.dumps(_draw(folder / "model", rows["prompts"])))
    (folder / "complete").touch()
    return folder


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write_models(folder: Path, demonstrations: Path) -> None:
    """``model/`` by our own SFT, and ``reward/`` on its trunk."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from trimtab.methods import sft
    from trimtab.newsroom.model import new_model
    from trimtab.newsroom.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    # Some of TRL's trainers put a tokenizer's BOS before a prompt even where the tokenizer adds none.
    tokenizer.bos_token = None
    start = new_model(len(tokenizer), SEED, hidden_size=WIDTH)
    start.config.bos_token_id = start.generation_config.bos_token_id = None
    start.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    train = {"steps": SFT_STEPS, "batch_groups": 32, "lr": 5e-3, "schedule": "constant", "kernels": "off"}
    sections = {
        "model": {"path": str(folder / "start"), "dtype": "float32"},
        "data": {"sources": [{"path": str(demonstrations)}]},
        "train": train,
        "run": {"out": str(folder / "sft")},
    }
    with contextlib.redirect_stdout(sys.stderr):
        sft.train(sft.Config.model_validate(sections))
    shutil.copytree(folder / "sft" / "model", folder / "model")
    torch.manual_seed(SEED + 1)
    scorer: Any = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(scorer.score.weight, std=0.1)
    scorer.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def words_taken(prompt: str, response: str) -> float:
    """How many of a response's words are in its prompt, divided by 8."""
    return sum(word in prompt.split() for word in response.split()) / 8


def _draw(model: Path, prompts: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """RESPONSES fixed answers to every prompt, of both kinds."""
    import torch

    from trimtab.groups import Group
    from trimtab.models.load import ModelConfig, load_model
    from trimtab.rollouts.engine import TreeSampler
    from trimtab.rollouts.sampling import SamplingConfig

    lm = load_model(ModelConfig(path=str(model), dtype="float32"))
    lm.cast(torch.float32)
    ends = [lm.tokenizer.eos_token_id]
    kinds = {
        "mixed": SamplingConfig(max_new_tokens=NEW_TOKENS),
        "even": SamplingConfig(max_new_tokens=EVEN_TOKENS, min_new_tokens=EVEN_TOKENS),
    }
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind, config in kinds.items():
        groups = [
            Group(id=str(k), prompt=row["prompt"], prompt_tokens=lm.tokenizer(row["prompt"])["input_ids"])
            for k, row in enumerate(prompts)
        ]
        sampled = TreeSampler().sample(lm, groups, RESPONSES, config, seed=SEED, end_tokens=ends)
        out[kind] = {
            row["prompt"]: [
                {
                    "tokens": r.tokens,
                    "text": r.text,
                    "finish": r.finish,
                    "reward": words_taken(row["prompt"], str(r.text)),
                }
                for r in group.responses
            ]
            for row, group in zip(prompts, sampled, strict=True)
        }
    return out
