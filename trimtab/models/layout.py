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
from trimtab.models.scalar_model import ScalarModel
from trimtab.models.tree_model import TreeModel

PROBE_WINDOW = 4
"""Sliding windows are shrunk to this during a check, so that a short probe crosses them."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Where configurations and layers keep such a width."""
FAILURES = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError)
"""What a forward pass raises that was given arguments in a form it does not know."""


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
def short_windows(lm: TreeModel) -> Iterator[None]:
    """Run with every sliding window and attention chunk at PROBE_WINDOW tokens."""
    holders = [lm.config, *lm.model.modules()]
    saved = [
        (h, name, w) for h in holders for name in WINDOWS if isinstance(w := getattr(h, name, None), int)
    ]
    for holder, name, _ in saved:
        setattr(holder, name, PROBE_WINDOW)
    try:
        yield
    finally:
        for holder, name, window in saved:
            setattr(holder, name, window)


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
        lm.chunked_head = True
        if _difference(lm, plain, truth)[0] > tolerance:
            lm.chunked_head = False
            lines.append("the head cannot be run apart from the trunk, so whole logits are computed")
        difference, reason = _difference(lm, tree, truth)
        agrees = difference <= tolerance
        if agrees and _masks_by_place(lm):
            agrees, reason = False, "its layers hold a window over packed places"
    if agrees:
        lm.layout = "tree"
    else:
        name = type(lm.model).__name__
        lines.append(f"{name} does not support the tree layout ({reason}); each response gets its own prompt")
    return "; ".join(lines) or None


def _difference(lm: LanguageModel, batch: TreeBatch, truth: torch.Tensor) -> tuple[float, str]:
    """Largest gap to ``truth``, infinite where the pass fails or gives NaN; and what to say about it."""
    try:
        logps, _ = lm.token_logprobs(batch)
    except FAILURES as error:
        return float("inf"), f"{type(error).__name__} in its forward pass"
    gap = float((logps - truth).abs().max().nan_to_num(float("inf")))
    return gap, f"log-probabilities differ by {gap:.1e}"


def choose_scalar_layout(lm: ScalarModel, tree: TreeBatch, plain: TreeBatch) -> str | None:
    """Set ``lm.layout`` of a critic or reward model; as :func:`choose_layout`, on hidden states.

    A new head is zero or small, so its outputs would agree whatever the trunk did: what is compared is the
    hidden state at every place that is read, in units of the largest.
    """
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2
    with torch.no_grad(), short_windows(lm):
        truth = lm.hidden(plain, _places(plain))
        try:
            found = lm.hidden(tree, _places(tree))
            gap = float(((found - truth).abs().max() / truth.abs().max()).nan_to_num(float("inf")))
            reason = f"hidden states differ by {gap:.1e} of the largest"
        except FAILURES as error:
            gap, reason = float("inf"), f"{type(error).__name__} in its forward pass"
    if gap <= tolerance and _masks_by_place(lm):
        gap, reason = float("inf"), "its layers hold a window over packed places"
    if gap <= tolerance:
        lm.layout = "tree"
        return None
    lm.layout = "plain"
    return (
        f"{type(lm.model).__name__} does not support the tree layout ({reason}); "
        "each response gets its own prompt"
    )


def _places(batch: TreeBatch) -> torch.Tensor:
    """Where values and scores are read, in the same order for either layout."""
    return torch.cat([batch.sources_NT[batch.mask_NT], batch.lasts_N])


def _masks_by_place(lm: TreeModel) -> bool:
    """Some layer holds a square mask of its own that is not plainly causal.

    GPT-Neo's local layers do: a window over places in the row, so that siblings between a response and its
    prompt use it up. It is wider than a probe and cannot be shrunk, so the comparison does not see it.
    """
    for buffer in lm.model.buffers():
        square = buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
        if buffer.dtype == torch.bool and square and not torch.equal(buffer, torch.ones_like(buffer).tril()):
            return True
    return False


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
