"""The choice of layout, by measurement on the loaded model.

Recurrent layers, ALiBi and some positional schemes cannot express a tree. Rather than keep a list of
architectures, a small random batch is run both ways on the very model, attention kernel included.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from trimtab.batch import Layout, TreeBatch
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.models.attention import NAME
from trimtab.models.language_model import LanguageModel
from trimtab.models.scalar_model import ScalarModel
from trimtab.models.tree_model import TreeModel

PROBE_WINDOW = 4
"""Sliding windows are shrunk to this during a check, so that a short probe crosses them."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Where configurations and layers keep such a width."""
MOST = 1.0
"""Nats: a gap that no rounding excuses. Wrong positions, or siblings in sight, give a sharp model several."""
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


def choose_layout(
    lm: LanguageModel, batches: Mapping[Layout, TreeBatch], requested: str = "auto"
) -> str | None:
    """Set ``lm.layout`` and ``lm.chunked_head`` by comparing forms; returns a line to show, or None.

    ``batches`` are the same groups (from ``probe_groups``) in every layout. The plain form is compared with
    the model's own logits, the others with those. With "auto", the first of packed, tree and plain that
    agrees; a layout asked for by name is taken if it agrees. Raises InputError where it does not.
    """
    lines = []
    with torch.no_grad(), short_windows(lm):
        lm.layout, lm.chunked_head = "plain", False
        truth = _own_logps(lm, batches["plain"])
        allowed = tolerance(lm)
        if not _wide(lm):  # in half the bits a gap depends on how sharp the model is
            rounding, _ = _difference(lm, batches["plain"], truth)
            allowed = min(MOST, max(allowed, 2 * rounding))
        lm.chunked_head = True
        if _difference(lm, batches["plain"], truth)[0] > allowed:
            lm.chunked_head = False
            lines.append("the head cannot be run apart from the trunk, so whole logits are computed")
        line = _first_that_agrees(
            lm, batches, requested, lambda batch: _difference(lm, batch, truth), allowed
        )
    return "; ".join([*lines, *([line] if line else [])]) or None


def choose_scalar_layout(
    lm: ScalarModel, batches: Mapping[Layout, TreeBatch], requested: str = "auto"
) -> str | None:
    """Set ``lm.layout`` of a critic or reward model; as :func:`choose_layout`, on hidden states.

    A new head is zero or small, so its outputs would agree whatever the trunk did: what is compared is the
    hidden state at every place that is read, in units of the largest.
    """
    with torch.no_grad(), short_windows(lm):
        lm.layout = "plain"
        truth = lm.hidden(batches["plain"], _places(batches["plain"]))

        def difference(batch: TreeBatch) -> tuple[float, str]:
            try:
                found = lm.hidden(batch, _places(batch))
            except FAILURES as error:
                return float("inf"), f"{type(error).__name__} in its forward pass"
            gap = float(((found - truth).abs().max() / truth.abs().max()).nan_to_num(float("inf")))
            return gap, f"hidden states differ by {gap:.1e} of the largest"

        return _first_that_agrees(lm, batches, requested, difference, tolerance(lm))


def tolerance(lm: TreeModel) -> float:
    """How far two exact forms may lie apart by rounding: in nats, a scalar model in shares of the largest."""
    if _wide(lm):
        return 1e-4
    return 0.2 if isinstance(lm, ScalarModel) else 5e-2


def _wide(lm: TreeModel) -> bool:
    return lm.dtype in (torch.float32, torch.float64)


def _first_that_agrees(
    lm: TreeModel,
    batches: Mapping[Layout, TreeBatch],
    requested: str,
    difference: Callable[[TreeBatch], tuple[float, str]],
    allowed: float,
) -> str | None:
    """Leave ``lm`` in the layout to use; a line where it is not the fastest, or why it was asked for."""
    if requested == "plain":
        return "layout plain, as configured"
    wanted: list[Layout] = ["packed", "tree"] if requested == "auto" else [cast(Layout, requested)]
    reason = ""
    kernel = attention_kernel(lm)
    for layout in wanted:
        if layout == "packed" and kernel not in ("sdpa", NAME):
            reason = f"its attention is {kernel}"
            continue
        set_attention_kernel(lm, NAME if layout == "packed" else kernel)
        gap, reason = difference(batches[layout])
        if gap <= allowed and _masks_by_place(lm):
            gap, reason = float("inf"), "its layers hold a window over packed places"
        if gap <= allowed:
            lm.layout = layout
            return None
    set_attention_kernel(lm, kernel)
    lm.layout = "plain"
    what = requested if requested != "auto" else "tree"
    line = f"{type(lm.model).__name__} does not support the {what} layout ({reason})"
    if requested != "auto":
        raise InputError(f'{line}; set model.layout = "auto"')
    return f"{line}; each response gets its own prompt"


def attention_kernel(lm: TreeModel) -> str:
    """The name of the attention function that the model's layers call."""
    return str(getattr(lm.config, "_attn_implementation", None) or "eager")


def set_attention_kernel(lm: TreeModel, name: str) -> None:
    """Have the model's layers call another attention function."""
    if name != attention_kernel(lm):
        lm.config._attn_implementation = name


def _difference(lm: LanguageModel, batch: TreeBatch, truth: torch.Tensor) -> tuple[float, str]:
    """Largest gap to ``truth``, infinite where the pass fails or gives NaN; and what to say about it."""
    try:
        logps, _ = lm.token_logprobs(batch)
    except FAILURES as error:
        return float("inf"), f"{type(error).__name__} in its forward pass"
    gap = float((logps - truth).abs().max().nan_to_num(float("inf")))
    return gap, f"log-probabilities differ by {gap:.1e}"


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
