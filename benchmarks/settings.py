"""The models and the numbers that both sides of a benchmark are given; ``inputs.py`` writes them out.

Nothing heavy is imported: the harness reads this file without loading torch, and every peer's environment
can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

VOCABULARY = 8192
PAD_ID, END_ID = 0, 1
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"][:88]
FIRST_WORD_ID = VOCABULARY - len(SYLLABLES) ** 2
"""The last 7,744 ids are the words of two syllables; before them come the end and padding tokens, the 256
bytes, the syllables with and without a leading space, and unused ids."""

QWEN2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1600,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": PAD_ID,
}
"""30,163,456 parameters."""

LARGE_VOCABULARY = 152_064
"""Rows of the embedding in the model ``vocabulary``: Qwen2.5's. The tokenizer stays the same, so only ids
below VOCABULARY occur, as in a pretrained model most rows are rarely met; the work on the logits is that of
all."""

MODEL_SIZES: dict[str, dict[str, Any]] = {
    "3M": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "30M": {},
    "91M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "500M": {
        "hidden_size": 1280,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 10,
    },
}
"""How the models of ``growth`` and ``peak`` differ from QWEN2."""
MODEL_SIZES["124M"] = MODEL_SIZES["91M"] | {"vocab_size": 50_304}

PROMPT_TOKENS = 256
RESPONSE_TOKENS = 64
GRPO_PROMPTS = 4
GRPO_RESPONSES = 8
DPO_PAIRS = 8
STEPS_OF_DATA = 16
"""Distinct steps in the data; a longer run begins again."""

SFT_SEQUENCES = 32
SFT_LENGTHS = (16, 512)
SFT_TOKENS = 8192
"""One draw of as many lengths; the longest are cut or the shortest grown to this sum. Each step is all of
them."""

SAMPLING_PROMPTS = 16
SAMPLING_RESPONSES = 8
REQUESTS = 128
REQUEST_PROMPT = (16, 96)
REQUEST_NEW = (8, 256)

LEARNING_RATE = 1e-6
GRPO_BETA = 0.04
DPO_BETA = 0.1
PPO_BETA = 0.05
CENTRE = 0.01
"""Weight of the reward model's penalty on a mean score, ours by default and TRL's recommendation."""
TEMPERATURE = 1.0
SEED = 0


@dataclass(frozen=True, slots=True)
class Pairs:
    """The shape of one DPO variant's data; ``key`` is its place in data.json."""

    key: str
    prompt: int
    response: int
    steps: int = STEPS_OF_DATA


PAIRS = {
    "shared": Pairs("pairs", PROMPT_TOKENS, RESPONSE_TOKENS),
    "apart": Pairs("pairs_apart", 16, 240),
    "long": Pairs("pairs_long", 256, 256, steps=4),
}


@dataclass(frozen=True, slots=True)
class Rollout:
    """The shape of one PPO variant. One response to each prompt; a mini-batch is one optimiser step."""

    prompts: int
    prompt_tokens: int
    mini_batch: int


ROLLOUTS = {"8": Rollout(8, PROMPT_TOKENS, 4), "32": Rollout(32, 64, 32)}
"""By the number of prompts, which is the first word of PPO's variants."""


def rollout_of(variant: str) -> tuple[Rollout, int, bool]:
    """Shape, epochs, and whether the peer runs as installed: ``"32 4 as-installed"``."""
    prompts, epochs, *rest = variant.split()
    return ROLLOUTS[prompts], int(epochs), rest == ["as-installed"]


def reward(response: str) -> float:
    """The share of a response's characters with an even code: as cheap as a reward can be, never constant."""
    return sum(1 for character in response if ord(character) % 2 == 0) / max(len(response), 1)


def to_text(token_ids: Sequence[int]) -> str:
    """The text that the synthetic tokenizer turns into these ids, all of which must be words."""
    pairs = (divmod(token - FIRST_WORD_ID, len(SYLLABLES)) for token in token_ids)
    return "".join(f" {SYLLABLES[first]}{SYLLABLES[second]}" for first, second in pairs)
