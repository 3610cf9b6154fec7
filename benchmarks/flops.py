"""Counting floating-point operations of a training pass over trees, and the speed of the matrix products in
it.

A multiply and an add are 2. Counted is what the result needs, whatever was computed: backward twice the
forward, a prompt once for all its responses, attention over the tokens that are seen, the head where a
token is predicted. What is recomputed, masked or padded counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional


def head_width(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_shapes(config: Any) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's matrices."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, head_width(config)
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    return [
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]


def tree_flops(config: Any, prompt: int, responses: Sequence[int]) -> int:
    """Forward and backward of the log-probabilities of one prompt's responses, given their lengths."""
    tokens = prompt + sum(responses)
    weights = config.num_hidden_layers * sum(rows * columns for rows, columns in layer_shapes(config))
    # Token i of a sequence sees itself and all before it; a response's tokens see the prompt as well.
    seen = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in responses)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_width(config) * seen
    head = sum(responses) * config.vocab_size * config.hidden_size
    # 2 for multiply and add, 3 for one forward and a backward of two products.
    return 2 * 3 * (tokens * weights + attention + head)


def peak_gflops(config: Any, tokens: int, predicted: int, dtype: torch.dtype, *, rounds: int = 10) -> float:
    """The fastest of the model's own matrix products, forward and backward, best of ``rounds``, in
    GFLOP/s."""
    shapes = {(tokens, *shape) for shape in layer_shapes(config)}
    shapes.add((predicted, config.vocab_size, config.hidden_size))
    best = 0.0
    for rows, outputs, inputs in sorted(shapes):
        x = torch.randn(rows, inputs).to(dtype)
        weight = torch.randn(outputs, inputs).to(dtype)
        grad = torch.randn(rows, outputs).to(dtype)

        def forward(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
            return functional.linear(x, weight)

        def to_input(grad: torch.Tensor = grad, weight: torch.Tensor = weight) -> torch.Tensor:
            return grad @ weight

        def to_weight(grad: torch.Tensor = grad, x: torch.Tensor = x) -> torch.Tensor:
            return grad.t() @ x

        fastest = min(_seconds(product, rounds) for product in (forward, to_input, to_weight))
        best = max(best, 2 * rows * outputs * inputs / fastest / 1e9)
    return best


def _seconds(product: Callable[[], torch.Tensor], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        product()
        found.append(time.perf_counter() - began)
    return min(found)
