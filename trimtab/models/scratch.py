"""A new tokenizer and a new small model, for trials without any download."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.config import Section
from trimtab.errors import InputError


class ScratchConfig(Section):
    """A Llama-style model with random weights and a byte-level BPE tokenizer trained on the study's text."""

    vocab_size: int = Field(
        4096, ge=260, description="tokens of the tokenizer, 256 bytes and 3 specials included"
    )
    hidden_size: int = Field(256, ge=8, description="width")
    layers: int = Field(4, ge=1, description="decoder layers")
    heads: int = Field(4, ge=1, description="attention heads")
    kv_heads: int = Field(0, ge=0, description="key and value heads; 0 takes heads")
    intermediate_size: int = Field(0, ge=0, description="width of the MLP; 0 takes 8/3 of hidden_size")
    context: int = Field(1024, ge=16, description="longest sequence")

    @model_validator(mode="after")
    def _divides(self) -> ScratchConfig:
        if self.hidden_size % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ValueError("heads must divide hidden_size, and kv_heads must divide heads")
        return self


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text is representable and decodes to itself. Specials: <pad>, <bos>, <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_model(folder: Path, config: ScratchConfig, texts: list[str], seed: int) -> Path:
    """Train the tokenizer, draw the weights, save both; loads like any other model. Raises InputError."""
    if not texts:
        raise InputError("scratch: there is no text to train a tokenizer on")
    tokenizer = train_tokenizer(texts, config.vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size or -(-8 * config.hidden_size // 3 // 32) * 32,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            max_position_embeddings=config.context,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
