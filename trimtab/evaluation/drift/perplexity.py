"""Perplexity on held-out text, of a model and of its reference on the same windows.

    perplexity = exp(mean over counted tokens of −log π(token | what precedes it in its window))

A document is cut into windows of the context's length, one behind the other without overlap, and no window
holds two documents. A window's first token follows nothing and is not counted, as in the loss that
transformers computes for the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.data.convert import as_demonstrations
from trimtab.data.render import tokenise
from trimtab.errors import InputError
from trimtab.evaluation.drift.config import TextSource
from trimtab.evaluation.drift.divergence import same_vocabulary
from trimtab.evaluation.stats.intervals import mean_interval
from trimtab.groups import Group, Response
from trimtab.models.language_model import LanguageModel
from trimtab.spread.deal import Part, numbers

MAX_WINDOW = 4096
"""Tokens of a window where nothing is asked for, at most: the cost of attention grows with the square."""


@dataclass(slots=True)
class Windows:
    """A text as the models read it."""

    groups: list[Group]
    """One for each window: its first token the prompt, the others the response, the mask what counts."""
    documents: list[int]
    """Which document each window comes from."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents and rows that could not be measured, by reason."""
    cut: bool = False
    """Only the first ``text_tokens`` tokens were read."""


def window_size(models: Sequence[LanguageModel], asked: int) -> int:
    """Tokens of a window. Raises InputError for one that does not fit the models' contexts."""
    context = min(lm.context for lm in models)
    if asked > context:
        raise InputError(f"drift.window is {asked} but a model's context holds {context} tokens; lower it")
    return asked or min(context, MAX_WINDOW)


def read_windows(source: TextSource, tokenizer: Any, size: int, most: int) -> Windows:
    """The windows of a text's first ``most`` tokens (0: all). Raises InputError for one that is unreadable.

    Of rows with ``text`` the document is what the tokenizer makes of it, its own special tokens included; of
    rows with a prompt it is prompt and (best) answer as trained, of which the answer counts.
    """
    found = Windows([], [])
    left = most or math.inf
    for number, (ids, mask) in enumerate(_documents(source, tokenizer, found.skipped)):
        if left <= 0:
            found.cut = True
            break
        found.cut |= len(ids) > left
        ids, mask = ids[: int(min(left, len(ids)))], mask[: int(min(left, len(ids)))]
        left -= len(ids)
        before = len(found.groups)
        for start in range(0, len(ids), size):
            window, counted = ids[start : start + size], mask[start : start + size]
            if any(counted[1:]):
                response = Response(tokens=window[1:], mask=counted[1:])
                name = f"{source.title}:{number}+{start}"
                found.groups.append(Group(id=name, prompt_tokens=window[:1], responses=[response]))
        if len(found.groups) == before:
            _count(found.skipped, "too short to predict a token")
        found.documents += [number] * (len(found.groups) - before)
    if not found.groups:
        raise InputError(f"drift.text {source.title}: no token of it can be predicted; give a longer text")
    return found


def _documents(source: TextSource, tokenizer: Any, skipped: dict[str, int]) -> Any:
    """Token ids and what counts, one document after another."""
    if source.plain:
        ids = _encode(tokenizer, plain_text(source.path))
        yield ids, [True] * len(ids)
        return
    groups, report = source.read()
    for reason, count in report.skipped.items():
        _count(skipped, reason, count)
    answered = as_demonstrations(groups)
    _count(skipped, "no text to measure in the row", len(groups) - len(answered))
    for group in answered:
        if group.prompt == "" and isinstance(group.responses[0].text, str):
            ids = _encode(tokenizer, group.responses[0].text)
            yield ids, [True] * len(ids)
            continue
        [made], _ = tokenise([group], tokenizer)
        prompt, response = made.prompt_tokens or [], made.responses[0]
        tokens = response.tokens or []
        yield prompt + tokens, [False] * len(prompt) + (response.mask or [True] * len(tokens))


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose: a document longer than the context is no mistake here.
    return list(tokenizer(text, verbose=False)["input_ids"])


def plain_text(path: str) -> str:
    """A file's text. Raises InputError where it cannot be read."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"drift.text: {path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"drift.text: cannot read {path}: {error.strerror or error}") from None


def _count(reasons: dict[str, int], reason: str, count: int = 1) -> None:
    if count:
        reasons[reason] = reasons.get(reason, 0) + count


def window_losses(lm: LanguageModel, windows: Sequence[Group], max_tokens: int) -> list[list[float]]:
    """−log π of every counted token of every window, in nats, in the order of ``windows``."""
    longest = max(1 + len(group.responses[0].tokens or ()) for group in windows)

    def losses(part: Part) -> list[list[float]]:
        logps_NT, _ = lm.token_logprobs(part.batch)
        return part.batch.ragged(-logps_NT)

    return numbers(lm, windows, max(max_tokens, longest), losses)


def perplexity_entry(
    lm: LanguageModel,
    reference: LanguageModel | None,
    source: TextSource,
    *,
    window: int = 0,
    text_tokens: int = 0,
    max_tokens: int = 16384,
) -> dict[str, Any]:
    """One text's entry under ``perplexity``.

    ``ratio`` is the model's perplexity over the reference's; its interval is that of the mean difference of
    log-probabilities, by document, or by window where the text is one document (``unit`` says which). A
    reference with another vocabulary reads other tokens, so that perplexities cannot be compared: it is
    left out.
    """
    if reference is not None and not same_vocabulary(lm, reference):
        reference = None
    size = window_size([lm, *([reference] if reference else [])], window)
    windows = read_windows(source, lm.tokenizer, size, text_tokens)
    unit = "document" if len(set(windows.documents)) > 1 else "window"
    keys = windows.documents if unit == "document" else range(len(windows.groups))
    ours = window_losses(lm, windows.groups, max_tokens)
    clusters = [str(key) for key, losses in zip(keys, ours, strict=True) for _ in losses]
    entry: dict[str, Any] = {
        "value": _exp(_flat_mean(ours)),
        **dict.fromkeys(("reference", "ratio", "ratio_ci95")),
        "tokens": len(clusters),
        "documents": len(set(windows.documents)),
        "windows": len(windows.groups),
        "window": size,
        "unit": unit,
        "cut": windows.cut,
        "skipped": windows.skipped,
    }
    if reference is not None:
        theirs = window_losses(reference, windows.groups, max_tokens)
        both = zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True)
        change = [a - b for a, b in both]
        entry |= {"reference": _exp(_flat_mean(theirs)), "ratio": _exp(sum(change) / len(change))}
        if len(set(clusters)) > 1:
            _, low, high = mean_interval(change, clusters)
            bounds = [_exp(low), _exp(high)]
            entry["ratio_ci95"] = None if None in bounds else bounds
    return entry


def _flat_mean(rows: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def _exp(value: float) -> float | None:
    """None for what is no number or beyond one: JSON has neither."""
    return math.exp(value) if value < 700 else None
