"""The choice of layout, by measurement on the loaded model.

Recurrent layers, ALiBi and some positional schemes cannot express a tree. Rather than keep a list of
architectures, a small random batch is run both ways on the very model, attention kernel included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trimtab.batch import TreeBatch
from trimtab.groups import Group, Response
from trimtab.models.language_model import LanguageModel

PROBE_WINDOW = 4
"""Sliding windows are shrunk to this during a check, so that a short probe crosses them."""


def probe_groups(vocab_size: int, *, seed: int = 0) -> list[Group]:
    """Two small random groups with unequal prompts and responses, one of them a single token."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(n)]

    def group(name: str, prompt: int, lengths: list[int]) -> Group:
        responses = [Response(tokens=tokens(n)) for n in lengths]
        return Group(id=name, prompt_tokens=tokens(prompt), responses=responses)

    return [group("a", 9, [7, 4, 11]), group("b", 3, [1, 5])]


@contextmanager
def short_windows(lm: LanguageModel) -> Iterator[None]:
    """Run with every sliding window at PROBE_WINDOW tokens."""
    holders = [lm.config, *lm.model.modules()]
    saved = [(h, w) for h in holders if isinstance(w := getattr(h, "sliding_window", None), int)]
    for holder, _ in saved:
        holder.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        for holder, window in saved:
            holder.sliding_window = window


def choose_layout(lm: LanguageModel, tree: TreeBatch, plain: TreeBatch) -> str | None:
    """Set ``lm.layout`` and ``lm.chunked_head`` by comparing forms; returns a line to show, or None.

    ``tree`` and ``plain`` are the same groups in both layouts (from ``probe_groups``). The plain form is
    compared with the model's own logits, the tree form with the plain one.
    """
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2
    lines = []
    with torch.no_grad(), short_windows(lm):
        lm.layout = "plain"
        truth = _own_logps(lm, plain)
        got, _ = lm.token_logprobs(plain)
        if (got - truth).abs().max() > tolerance:
            lm.chunked_head = False
            lines.append("the head cannot be run apart from the trunk, so whole logits are computed")
        try:
            treed, _ = lm.token_logprobs(tree)
            difference = float((treed - truth).abs().max())
            reason = f"log-probabilities differ by {difference:.1e}"
            agrees = difference <= tolerance
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            agrees, reason = False, f"{type(error).__name__} in its forward pass"
    if agrees:
        lm.layout = "tree"
    else:
        name = type(lm.model).__name__
        lines.append(f"{name} does not support the tree layout ({reason}); each response gets its own prompt")
    return "; ".join(lines) or None


def _own_logps(lm: LanguageModel, plain: TreeBatch) -> torch.Tensor:
    """Each response's token log-probabilities from one ordinary call of the model, without padding."""
    out = torch.zeros(plain.mask_NT.shape)
    for n, ids_L in enumerate(plain.input_ids_BL):
        length = int((plain.segments_BL[n] >= 0).sum())
        logits = lm.model(input_ids=ids_L[None, :length], use_cache=False).logits[0].float()
        keep = plain.mask_NT[n]
        places = plain.sources_NT[n][keep] - n * plain.input_ids_BL.shape[1]
        logps = logits[places].log_softmax(-1).gather(-1, plain.targets_NT[n][keep][:, None])[:, 0]
        out[n, keep] = logps.cpu()
    return out.to(plain.mask_NT.device)
