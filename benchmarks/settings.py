"""The model, the data and the numbers that both sides of a benchmark are given.

``python -m benchmarks.settings FOLDER`` writes them once: ``FOLDER/model`` (a Hugging Face folder with
random fp32 weights and a synthetic tokenizer), ``FOLDER/reward`` (the same architecture and tokenizer with
a head of one score, other random weights: a reward model) and ``FOLDER/data.json``::

    {"prompts": [[id, …], …], "pairs": [{"prompt": [id, …], "chosen": [id, …], "rejected": [id, …]}, …]}

Every prompt has exactly PROMPT_TOKENS ids, every chosen and rejected response exactly RESPONSE_TOKENS,
the last of them the end token. Prompts and responses are words of the synthetic tokenizer, each of which
is one token (``" bacu"`` ↔ one id), so a peer that takes only text trains on these very ids.

Nothing heavy is imported at the top: the harness reads this file without loading torch.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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

PROMPT_TOKENS = 256
RESPONSE_TOKENS = 64
GRPO_PROMPTS = 4
GRPO_RESPONSES = 8
DPO_PAIRS = 8
PPO_PROMPTS = 8
"""One response each: a rollout."""
PPO_MINI_BATCH = 4
"""Responses in one optimiser step; each pass over a rollout takes them all."""
STEPS_OF_DATA = 16
"""Distinct steps in the data; a longer run begins again."""

LEARNING_RATE = 1e-6
GRPO_BETA = 0.04
DPO_BETA = 0.1
PPO_BETA = 0.05
TEMPERATURE = 1.0
SEED = 0


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One line of ``python -m benchmarks list``, and what the harness needs to run it."""

    name: str
    summary: str
    setting: str
    environment: str
    """Key of ``environments.ENVIRONMENTS``."""
    peer_module: str
    """Run with ``python -m`` inside that environment."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Name → the last argument of both sides' workers. Each is a case of its own with every allocator."""
    runs: int = 7
    """Timed steps a side and case, unless the command says otherwise."""
    warm_up: int = 2
    """Steps before them, which are dropped."""


_MODEL = (
    "Qwen2 with 30.2M parameters (8 layers, hidden 512, intermediate 1,600, 8 heads over 4 key-value heads, "
    "vocabulary 8,192, tied embeddings, random weights); "
)
_COMMON = _MODEL + (
    "fp32 master weights, bf16 computation, AdamW at "
    "1e-6, gradient norm clipped at 1, no dropout, no logging, nothing saved; both sides on the same ids. "
)
_PEER = (
    "Peer: TRL 1.16.0 with transformers 5.23.0, its defaults save that gradient checkpointing, on by default "
    "and by its documentation about 20 % slower, is off, as on our side, and that the data is not shuffled "
    "(GRPO); attention sdpa, fused AdamW. "
)
_READING = (
    "A step is one whole turn of the training loop, batch to optimiser; seconds are medians; a peak is the "
    "worker's VmHWM in MB of 2^20 bytes; speedup is peer over ours, memory_ratio ours over peer."
)
_GRPO = (
    "One GRPO step: 4 prompts × 8 responses, prompts of 256 tokens, exactly 64 new tokens, temperature 1, "
    "one update per rollout, reward the share of characters with an even code, group-normalised "
    "advantages, β 0.04 (TRL's default is 0, which needs no reference: with 0.04 both sides compute one). "
)
_DPO = (
    "One DPO step: 8 pairs, prompts of 256 tokens, responses of 64, sigmoid loss, β 0.1, the reference "
    "computed in the step. "
)
_PPO = (
    "One PPO step = one rollout: 8 prompts of 256 tokens, one response of exactly 64 tokens to each at "
    "temperature 1, scored by a reward model, token advantages by GAE (γ 1, λ 0.95) and whitened, KL "
    "coefficient 0.05, then 1 or 4 epochs over it in mini-batches of 4 responses, each one optimiser step of "
    "the policy and of the critic; ratio and values clipped at 0.2. Policy, reference, reward model and "
    "critic (begun from the reward model) are each a "
)
_PPO_COMMON = (
    "the two last with a head of one number; fp32 master weights, bf16 computation, AdamW at 1e-6, no "
    "dropout, nothing saved; both sides on the same prompt ids. A response reaches our reward model as text, "
    "the peer's as ids. "
)
_PPO_PEER = (
    "Peer: PPO of TRL 1.12.0 (trl.experimental.ppo) with transformers 5.23.0, its defaults save that its "
    "sample generations, a debugging aid, are off. In its favour: mixed precision is given to its "
    "Accelerator, which does not see the configuration's bf16; sampling and the rollout's values, which it "
    "computes in fp32, run under bf16 autocast too; reference and reward model are loaded in bf16. It clips "
    "no gradient (ours: norm 1), trains policy and critic with one optimiser on a sum of losses (ours: two) "
    "and takes the old log-probabilities from its sampler (ours: a forward of its own); fused AdamW. "
    "Peer as installed: 4 epochs with bf16 = True in its configuration and no such help, as its users run "
    "it; with this version of transformers that option reaches nothing, and it computes in fp32. "
)
_PPO_READING = (
    "A step is everything from fetching the prompts to the last optimiser step on them; seconds are medians; "
    "a peak is the worker's VmHWM in MB of 2^20 bytes; speedup is peer over ours, memory_ratio ours over "
    "peer."
)

BENCHMARKS = {
    "grpo": Benchmark(
        name="grpo",
        summary="one GRPO step, sampling included, against TRL 1.16.0",
        setting=_GRPO + _COMMON + _PEER + _READING,
        environment="trl-1.16.0",
        peer_module="benchmarks.peers.trl_grpo",
    ),
    "dpo": Benchmark(
        name="dpo",
        summary="one DPO step against TRL 1.16.0",
        setting=_DPO + _COMMON + _PEER + _READING,
        environment="trl-1.16.0",
        peer_module="benchmarks.peers.trl_dpo",
    ),
    "ppo": Benchmark(
        name="ppo",
        summary="one PPO rollout, sampling and scoring included, against TRL 1.12.0's experimental PPO",
        setting=_PPO + _MODEL + _PPO_COMMON + _PPO_PEER + _PPO_READING,
        environment="trl-1.12.0",
        peer_module="benchmarks.peers.trl_ppo",
        variants={"1 epoch": "1", "4 epochs": "4", "peer as installed": "4 as-installed"},
        runs=3,
        warm_up=1,
    ),
}


def reward(response: str) -> float:
    """The share of a response's characters with an even code: as cheap as a reward can be, never constant."""
    return sum(1 for character in response if ord(character) % 2 == 0) / max(len(response), 1)


def to_text(token_ids: Sequence[int]) -> str:
    """The text that the synthetic tokenizer turns into these ids, all of which must be words."""
    pairs = (divmod(token - FIRST_WORD_ID, len(SYLLABLES)) for token in token_ids)
    return "".join(f" {SYLLABLES[first]}{SYLLABLES[second]}" for first, second in pairs)


def fingerprint() -> str:
    """Changes with anything that shapes the models or the data, so that no stale copy is reused."""
    facts = [QWEN2, PROMPT_TOKENS, RESPONSE_TOKENS, GRPO_PROMPTS, DPO_PAIRS, STEPS_OF_DATA, SEED, "reward"]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def make_data() -> dict[str, list]:
    """The prompts and pairs of the module's docstring."""
    rng = random.Random(SEED)

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD_ID, VOCABULARY) for _ in range(count)]

    def response() -> list[int]:
        return [*words(RESPONSE_TOKENS - 1), END_ID]

    prompts = [words(PROMPT_TOKENS) for _ in range(GRPO_PROMPTS * STEPS_OF_DATA)]
    pairs = [
        {"prompt": words(PROMPT_TOKENS), "chosen": response(), "rejected": response()}
        for _ in range(DPO_PAIRS * STEPS_OF_DATA)
    ]
    return {"prompts": prompts, "pairs": pairs}


def byte_pair_rules() -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a byte-level BPE in which every word of two syllables is one token.

    Letters join into syllables, a leading space (written Ġ) with the first syllable, and that with the
    second; no other two pieces ever join, so the outcome is unique. A plain word list would be simpler,
    but transformers loads any Qwen2 folder's tokenizer as byte-level BPE, whatever the folder says.
    """
    from tokenizers import pre_tokenizers

    spaced = [f"Ġ{syllable}" for syllable in SYLLABLES]
    pieces = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *SYLLABLES, *spaced]
    pieces += [f"<unused{index}>" for index in range(FIRST_WORD_ID - len(pieces))]
    pieces += [first + second for first in spaced for second in SYLLABLES]
    merges = [(syllable[0], syllable[1]) for syllable in SYLLABLES]
    merges += [("Ġ", syllable) for syllable in SYLLABLES]
    merges += [(first, second) for first in spaced for second in SYLLABLES]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def write_model(folder: Path, *, reward: bool = False) -> None:
    """A Hugging Face folder: the random model in fp32 and its synthetic tokenizer.

    ``reward`` makes it a reward model: a head of one score in place of the language model's, other weights.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Tokenizer

    torch.manual_seed(SEED + reward)
    model: Any
    if reward:
        model = Qwen2ForSequenceClassification(Qwen2Config(**(QWEN2 | {"num_labels": 1})))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN2))
    model.save_pretrained(folder)
    vocabulary, merges = byte_pair_rules()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<end>"}
    Qwen2Tokenizer(vocabulary, merges, padding_side="left", **special).save_pretrained(folder)


def write(folder: Path) -> None:
    """Write the models and ``data.json`` under ``folder``; data.json comes last and marks completion."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_model(folder / "reward", reward=True)
    (folder / "data.json").write_text(json.dumps(make_data()))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
