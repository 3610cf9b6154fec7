"""What is planned and measured: models of three architectures, settings, and every method's own options.

No torch here: the command reads this file, and so does each worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL, LARGE = 8192, 152_064
"""Rows of the embedding."""
CONTEXT = 2048
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": SMALL}
QWEN2: dict[str, Any] = {
    **ENDS,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
LLAMA: dict[str, Any] = {
    **ENDS,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {**ENDS, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": CONTEXT}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 82M": ("qwen2", QWEN2),
    "qwen2 192M, vocabulary 152k": ("qwen2", QWEN2 | {"vocab_size": LARGE}),
    "qwen2 144M": (
        "qwen2",
        QWEN2 | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
    ),
    "qwen2 506M": (
        "qwen2",
        QWEN2
        | {
            "hidden_size": 1280,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 20,
            "num_key_value_heads": 10,
        },
    ),
    "llama 60M": ("llama", LLAMA),
    "llama 147M, vocabulary 152k, tied": (
        "llama",
        LLAMA | {"vocab_size": LARGE, "tie_word_embeddings": True},
    ),
    "gpt2 93M": ("gpt2", GPT2),
}
"""Name → ``model_type`` and the arguments of its configuration; random weights in fp32."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One configuration, which every method is run in."""

    model: str
    options: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    """The methods that it is for; none: all."""

    @property
    def name(self) -> str:
        """The model, and the options by their values."""
        return ", ".join([self.model, *(f"{k} {v}" for k, v in self.options.items())])


LORA = {"adapter.kind": "lora"}
AGAIN = {"train.activation_mb": "300"}
SLIM = ("mixed", "gspo", "rloo")
"""Methods of which a run or two of the others hold less than the 1 GB from which a row counts."""
SETTINGS = (
    Setting("qwen2 82M"),
    Setting("qwen2 82M", AGAIN),
    Setting("qwen2 82M", LORA),
    Setting("qwen2 192M, vocabulary 152k"),
    Setting("qwen2 192M, vocabulary 152k", LORA),
    Setting("qwen2 144M"),
    Setting("qwen2 144M", LORA | AGAIN),
    Setting("llama 60M"),
    Setting("llama 60M", LORA),
    Setting("llama 147M, vocabulary 152k, tied", AGAIN),
    Setting("gpt2 93M"),
    Setting("qwen2 506M", LORA),
    Setting("qwen2 506M", AGAIN, ("sft", "dpo", "grpo")),
    Setting("llama 60M", AGAIN, SLIM),
    Setting("gpt2 93M", AGAIN, SLIM),
)

PROMPT, RESPONSE = 256, 64
"""Tokens."""
STEPS = 2
"""Optimiser steps (spin's iterations begin anew, and have as many each): the second is the first with the
optimiser's states in place.
"""
OFFLINE = {"train.batch_groups": "12"}
SAMPLED = {
    "sampling.max_new_tokens": str(RESPONSE),
    "sampling.min_new_tokens": str(RESPONSE),
    "train.batch_groups": "4",
}
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "sft": ("demonstrations", OFFLINE),
    "reward": ("pairs", OFFLINE),
    "process-reward": ("steps", OFFLINE),
    "dpo": ("pairs", OFFLINE),
    "ipo": ("pairs", OFFLINE),
    "simpo": ("pairs", OFFLINE),
    "orpo": ("pairs", OFFLINE),
    "kto": ("labels", OFFLINE),
    "rank": ("rankings", {"train.batch_groups": "8"}),
    "mixed": ("pairs and labels", OFFLINE),
    "spin": (
        "demonstrations",
        {**SAMPLED, "train.batch_groups": "12", "spin.iterations": "2", "train.steps": str(2 * STEPS)},
    ),
    "online-dpo": ("prompts", {**SAMPLED, "train.batch_groups": "8"}),
    "ppo": ("prompts", {**SAMPLED, "train.batch_groups": "12"}),
    "grpo": ("prompts", SAMPLED),
    "dr-grpo": ("prompts", SAMPLED),
    "rloo": ("prompts", SAMPLED),
    "dapo": ("prompts", SAMPLED),
    "gspo": ("prompts", SAMPLED),
    "cispo": ("prompts", SAMPLED),
}
"""Method → the rows it learns from, and its options here beside its defaults."""
REWARDED = ("ppo", "online-dpo")
"""With a learned reward model of the policy's size in memory; the others by the length of the answer."""


def settings_of(method: str) -> list[Setting]:
    """The configurations that the method is run in."""
    return [setting for setting in SETTINGS if not setting.only or method in setting.only]


def folder_of(model: str) -> str:
    """A model's folder name."""
    return model.replace(",", "").replace(" ", "-")
