"""A real model small enough that everything it can say is listed, and the real loops around it.

The vocabulary is the end token and a few words, all of them possible answers, so that no mass lies elsewhere.
What a run made of the policy is read from its saved ``model/`` through transformers alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<eos>"
PROMPT = END
"""One token that no answer goes on from, so that every state of two tokens has a context of its own."""


def save_model(
    folder: Path, words: Sequence[str], first_ref_V: torch.Tensor | None = None, *, spread: float = 0.2
) -> None:
    """A one-layer Llama over END and ``words``; its first token after PROMPT follows ``first_ref_V``."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate([END, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    if first_ref_V is not None:
        with torch.no_grad():
            hidden_D = model.model(input_ids=torch.tensor([[vocabulary[PROMPT]]])).last_hidden_state[0, -1]
            # The shortest weights whose product with this hidden state is the wanted logits.
            wanted_V = first_ref_V.log().float()
            model.lm_head.weight.copy_(wanted_V[:, None] * hidden_D / hidden_D.square().sum())
    model.save_pretrained(folder)


def conditionals(folder: Path, *, length: int) -> torch.Tensor:
    """The saved policy after PROMPT and, for two tokens, after each first token: ``[K, V]``."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, size = 0, model.config.vocab_size
    prefixes = [[prompt], *([prompt, a] for a in range(size) if length == 2)]
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1) for ids in prefixes]
    return torch.stack(rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """JSON lines; returns the path as a configuration wants it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def online_sections(folder: Path, rewards: dict[str, float], train: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a run from ``folder/start`` that learns from the reward of each answer."""
    source = (
        f"REWARDS = {rewards!r}\n\n\ndef score(prompt, response):\n    return REWARDS[response.strip()]\n"
    )
    (folder / "reward.py").write_text(source, encoding="utf-8")
    rows = [{"prompt": PROMPT} for _ in range(train["batch_groups"])]
    return {
        "model": {"path": str(folder / "start"), "dtype": "float32", "device": "cpu"},
        "data": {"sources": [{"path": write_rows(folder / "prompts.jsonl", rows)}]},
        "train": {"grad_clip": 0, "seed": 1, **train},
        "run": {"out": str(folder / "run")},
        "sampling": {"max_new_tokens": max(len(answer.split()) for answer in rewards)},
        "reward": {"terms": [{"name": f"{folder / 'reward.py'}:score"}]},
    }


def metrics(out: Path) -> list[dict[str, float]]:
    """Every step's metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
