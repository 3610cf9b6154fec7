"""The count of operations: against a count by hand, and against PyTorch's own counter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import peak_gflops, tree_flops

TINY = SimpleNamespace(
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=50,
)


def test_count_by_hand() -> None:
    # a layer: q 64, k and v 32 each, o 64, feed-forward 3 × 160; two layers of 672 weights; 3 + 2 + 1 tokens
    weights = 6 * 2 * 672
    # pairs of (token, token it sees): prompt 1 + 2 + 3, responses (4 + 5) and 4
    attention = 2 * (2 * 2 * 4) * (6 + 9 + 4)
    head = 3 * 50 * 8
    assert tree_flops(TINY, 3, [2, 1]) == 6 * (weights + attention + head)


def test_agrees_with_the_counter_of_pytorch_on_one_sequence() -> None:
    """PyTorch counts attention as if nothing were masked, so that part is put in its terms."""
    config = transformers.Qwen2Config(
        **vars(TINY), use_sliding_window=False, tie_word_embeddings=True, attn_implementation="eager"
    )
    model = transformers.Qwen2ForCausalLM(config)
    length = 12
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    # every token is a predicted one here: a response of 11 tokens after a prompt of 1, and one place more
    ours = tree_flops(config, 1, [length - 1]) + 6 * config.vocab_size * config.hidden_size
    heads_width = config.num_hidden_layers * config.num_attention_heads * 4
    unmasked = length * length - length * (length + 1) // 2
    rotary = counter.get_total_flops() - ours - 12 * heads_width * unmasked
    # what is left are the rotary angles, an outer product of positions and half a head's frequencies
    assert 0 <= rotary <= 2 * length * 4


def test_the_prompt_counts_once_for_all_responses() -> None:
    one, eight = tree_flops(TINY, 100, [4]), tree_flops(TINY, 100, [4] * 8)
    assert eight < 2 * one


def test_peak_is_a_speed() -> None:
    assert peak_gflops(TINY, 64, 32, torch.float32, rounds=2) > 0
