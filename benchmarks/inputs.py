"""Writes the models and the data that both sides of a benchmark read.

``python -m benchmarks.inputs FOLDER NAME…`` writes what is not there yet: ``model`` (a Hugging Face folder
with random fp32 weights and a synthetic tokenizer), ``reward`` (the same architecture and tokenizer with a
head of one score, other random weights), ``vocabulary`` (``model`` with 152,064 rows of embedding), of
``91M`` and ``500M`` a language model in bf16, with a reward head in ``…-reward`` and, as an adapter made by
PEFT, in ``…-reward-adapter``, and always ``data.json``::

    {"prompts": [[id, …], …],
     "pairs": [{"prompt": [id, …], "chosen": [id, …], "rejected": [id, …]}, …],
     "pairs_apart": …, "pairs_long": …,
     "demonstrations": [{"prompt": [id, …], "completion": [id, …]}, …],
     "requests": [{"prompt": [id, …], "new": 137}, …]}

Every response ends with the end token. Prompts and responses are words of the synthetic tokenizer, each of
which is one token (``" bacu"`` ↔ one id), so a peer that takes only text trains on these very ids.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks import settings
from benchmarks.settings import END_ID, FIRST_WORD_ID, PAIRS, SEED, SYLLABLES, VOCABULARY

MODELS = ("model", "reward", "vocabulary", "91M", "500M")


def fingerprint() -> str:
    """Changes with anything that shapes the models or the data, so that no stale copy is reused."""
    shapes = [[name, *map(str, (p.key, p.prompt, p.response, p.steps))] for name, p in PAIRS.items()]
    facts = [settings.QWEN2, settings.PROMPT_TOKENS, settings.RESPONSE_TOKENS, settings.GRPO_PROMPTS]
    facts += [settings.DPO_PAIRS, settings.STEPS_OF_DATA, SEED, settings.LARGE_VOCABULARY, shapes]
    facts += [settings.SFT_SEQUENCES, settings.SFT_LENGTHS, settings.SFT_TOKENS]
    facts += [settings.REQUESTS, settings.REQUEST_PROMPT, settings.REQUEST_NEW]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def make_data() -> dict[str, list]:
    """The rows of the module's docstring."""
    rng = random.Random(SEED)

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD_ID, VOCABULARY) for _ in range(count)]

    def ended(count: int) -> list[int]:
        return [*words(count - 1), END_ID]

    prompts = [words(settings.PROMPT_TOKENS) for _ in range(settings.GRPO_PROMPTS * settings.STEPS_OF_DATA)]
    data: dict[str, list] = {"prompts": prompts}
    for shape in PAIRS.values():
        data[shape.key] = [
            {
                "prompt": words(shape.prompt),
                "chosen": ended(shape.response),
                "rejected": ended(shape.response),
            }
            for _ in range(settings.DPO_PAIRS * shape.steps)
        ]
    # A quarter of a demonstration is its prompt.
    data["demonstrations"] = [
        {"prompt": words(length // 4), "completion": ended(length - length // 4)}
        for length in mixed_lengths()
    ]
    data["requests"] = [
        {"prompt": words(rng.randint(*settings.REQUEST_PROMPT)), "new": rng.randint(*settings.REQUEST_NEW)}
        for _ in range(settings.REQUESTS)
    ]
    return data


def mixed_lengths() -> list[int]:
    """SFT_SEQUENCES lengths, uniform between the bounds, then moved by single tokens to the sum
    SFT_TOKENS."""
    rng = random.Random(SEED)
    low, high = settings.SFT_LENGTHS
    lengths = [rng.randint(low, high) for _ in range(settings.SFT_SEQUENCES)]
    while (missing := settings.SFT_TOKENS - sum(lengths)) != 0:
        at = rng.randrange(len(lengths))
        lengths[at] = min(max(lengths[at] + (1 if missing > 0 else -1), low), high)
    return lengths


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


def write_model(folder: Path, name: str = "model") -> None:
    """A Hugging Face folder: the random model called ``name`` in fp32 and its synthetic tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Tokenizer

    reward = name == "reward"
    torch.manual_seed(SEED + reward)
    model: Any
    if name in settings.MODEL_SIZES:
        model = Qwen2ForCausalLM(Qwen2Config(**(settings.QWEN2 | settings.MODEL_SIZES[name]))).bfloat16()
        write_rewards(folder, model)
    elif reward:
        model = Qwen2ForSequenceClassification(Qwen2Config(**(settings.QWEN2 | {"num_labels": 1})))
    else:
        rows = {"vocab_size": settings.LARGE_VOCABULARY} if name == "vocabulary" else {}
        model = Qwen2ForCausalLM(Qwen2Config(**(settings.QWEN2 | rows)))
    model.save_pretrained(folder)
    vocabulary, merges = byte_pair_rules()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<end>"}
    for place in (folder, *folder.parent.glob(f"{folder.name}-*")):
        if place.is_dir():
            Qwen2Tokenizer(vocabulary, merges, padding_side="left", **special).save_pretrained(place)


def write_rewards(folder: Path, model: Any) -> None:
    """Two reward models on the model's trunk, beside its folder: a whole one, and an adapter by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForSequenceClassification

    model.config.num_labels, model.config.pad_token_id = 1, 0
    scorer = Qwen2ForSequenceClassification(model.config).bfloat16()
    scorer.model = model.model
    scorer.save_pretrained(folder.with_name(f"{folder.name}-reward"))
    scorer.name_or_path = str(folder.resolve())
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=16, lora_alpha=32)
    adapter = get_peft_model(scorer, lora)
    adapter.save_pretrained(folder.with_name(f"{folder.name}-reward-adapter"))
    adapter.unload()


def missing(folder: Path, names: Collection[str]) -> list[str]:
    """What of these :func:`write` has yet to do under ``folder``."""
    there = [name for name in MODELS if (folder / f"{name}.done").exists()]
    absent = sorted(set(names) - set(there))
    return absent if (folder / "data.json").exists() else [*absent, "data.json"]


def write(folder: Path, names: Collection[str] = ("model", "reward")) -> None:
    """Write the models and ``data.json`` under ``folder``; each counts as there only once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in missing(folder, names):
        if name == "data.json":
            (folder / "data.partial").write_text(json.dumps(make_data()))
            (folder / "data.partial").rename(folder / "data.json")
        else:
            write_model(folder / name, name)
            (folder / f"{name}.done").touch()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
