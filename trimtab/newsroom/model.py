"""A new small Llama for the newsroom: large enough to learn copying, small enough for two CPU cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.errors import InputError
from trimtab.newsroom.tokenizer import BOS, EOS, PAD, SPECIALS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def new_model(
    vocab_size: int,
    seed: int,
    *,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    intermediate_size: int | None = None,
    max_positions: int = 256,
    rope_theta: float = 20.0,
) -> LlamaForCausalLM:
    """An untrained Llama in fp32 with tied embeddings; the same weights for the same ``seed``.

    Two layers are the least that can copy: one looks one word back, the other finds the cue so marked.
    ``intermediate_size`` is the feed-forward width, by default twice ``hidden_size``. ``rope_theta`` is
    low because prompts are short: channels that turn faster find the word before sooner. The caller's
    random state is left as it was. Raises InputError for sizes that do not fit together.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % (2 * heads):
        raise InputError(
            f"hidden_size {hidden_size} must be a multiple of twice heads {heads}: rotary positions turn "
            "couples of channels within each head"
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        attention_dropout=0.0,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The default dtype may be another while a caller loads a larger model.
        return LlamaForCausalLM(config).float()
