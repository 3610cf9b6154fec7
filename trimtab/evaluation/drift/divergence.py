"""KL from the reference and entropy, exact over the vocabulary at every state that the model reached.

    D_t = Σ_v π(v|x, y_<t) · log(π(v|x, y_<t) / π_ref(v|x, y_<t))       KL(π‖π_ref) of answers = E_y∼π Σ_t D_t

So the mean over sampled answers of Σ_t D_t is unbiased. It is the Rao-Blackwellised form of the usual
log-ratio Σ_t log π(y_t)/π_ref(y_t): the drawn token is replaced by the expectation over it, which leaves the
mean and can only lower the variance, and no D_t is negative (Amini, Vieira and Cotterell, 2025). k1 and k3
(:mod:`trimtab.objectives.kl`) have the same mean; they need one log-probability a token, this the whole
distribution, computed here a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate
from trimtab.errors import InputError
from trimtab.evaluation.stats.intervals import mean_interval
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.spread.deal import Part, numbers

Floats = npt.NDArray[np.float64]

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk's fp64 logits of one model; about six such tensors are alive at once."""


@dataclass(slots=True)
class AnswerStates:
    """What was found at each token of one answer, before the token was drawn. In nats, ``[T]`` each."""

    prompt: str
    """Name of its prompt, the unit of the intervals."""
    entropy: Floats
    kl: Floats | None = None
    """From the reference; None without one."""
    reference_entropy: Floats | None = None


def chunk_rows(vocab_size: int) -> int:
    """Rows of one chunk of logits."""
    return max(1, CHUNK_BYTES // (8 * vocab_size))


def prompt_names(groups: Sequence[Group]) -> list[str]:
    """A name for each prompt, apart even where two sources gave two prompts one id."""
    return [f"{p}:{group.id}" for p, group in enumerate(groups)]


def same_vocabulary(lm: LanguageModel, reference: LanguageModel) -> bool:
    """Token ids mean the same to both models. Their heads may still be padded to unequal widths."""
    if lm.tokenizer is None or reference.tokenizer is None:
        return lm.vocab_size == reference.vocab_size
    return lm.tokenizer.get_vocab() == reference.tokenizer.get_vocab()


def answer_states(
    lm: LanguageModel,
    groups: Sequence[Group],
    temperature: float,
    reference: LanguageModel | None = None,
    *,
    max_tokens: int = 16384,
) -> list[AnswerStates]:
    """Entropy and KL at every token of every answer, in order of groups and responses.

    ``temperature`` divides both models' logits; an answer that says what it was drawn at keeps its own.
    The reference must have the model's vocabulary (:func:`same_vocabulary`). Raises InputError for logits
    that are not numbers.
    """

    def columns(part: Part) -> list[list[float]]:
        other = None
        if reference is not None:
            other = collate(part.groups, layout=reference.layout, device=reference.device)
        columns_XM = _columns(lm, part.batch, temperature, reference, other)
        ends = np.cumsum(part.batch.mask_NT.sum(-1).cpu().numpy())[:-1]
        # One after the other, a response's in one list: entropy, KL, the reference's entropy.
        return [own_XT.ravel().tolist() for own_XT in np.split(columns_XM, ends, axis=1)]

    found = numbers(lm, groups, max_tokens, columns, divisible=True, beside=reference)
    names = [n for n, group in zip(prompt_names(groups), groups, strict=True) for _ in group.responses]
    shape = (1 if reference is None else 3, -1)
    states = [
        AnswerStates(name, *np.asarray(row, np.float64).reshape(shape))
        for name, row in zip(names, found, strict=True)
    ]
    if not all(np.isfinite(state.entropy).all() for state in states):
        raise InputError("drift: the model's logits are not numbers (NaN); its weights are damaged")
    return states


@torch.no_grad()
def _columns(
    lm: LanguageModel,
    batch: TreeBatch,
    temperature: float,
    reference: LanguageModel | None,
    other: TreeBatch | None,
) -> Floats:
    """Entropy, and with a reference KL and its entropy, of every counted token: ``[1 or 3, M]``."""
    rows = chunk_rows(lm.vocab_size)
    scale_M = torch.ones(int(batch.mask_NT.sum()), dtype=torch.float64, device=lm.device)
    drawn_at = batch.temperature(temperature)
    if isinstance(drawn_at, torch.Tensor):
        scale_M *= drawn_at[:, None].expand(batch.mask_NT.shape)[batch.mask_NT]
    else:
        scale_M *= drawn_at
    # Filled in place: small results kept between large chunks would leave holes that no chunk fits in.
    found_XM = scale_M.new_empty(1 if reference is None else 3, len(scale_M))
    parts = zip(scale_M[:, None].split(rows), found_XM.split(rows, dim=1), strict=True)
    if reference is None or other is None:
        for (scale, out_XC), logits_CV in zip(parts, lm.logits(batch, rows), strict=True):
            out_XC[0] = _entropy(_logps(logits_CV, scale))
    else:
        both = zip(lm.logits(batch, rows), reference.logits(other, rows), strict=True)
        for (scale, out_XC), (logits_CV, ref_CV) in zip(parts, both, strict=True):
            ref_CV = ref_CV.to(logits_CV.device)
            # Heads of one family are padded to unequal widths; no token stands in the padding.
            width = min(logits_CV.shape[-1], ref_CV.shape[-1])
            logps_CV = _logps(logits_CV[:, :width], scale)
            columns = divergence(logps_CV, _logps(ref_CV[:, :width], scale))
            for out_C, column_C in zip(out_XC, columns, strict=True):
                out_C.copy_(column_C)
    return found_XM.cpu().numpy()


def _logps(logits_CV: torch.Tensor, scale_C1: torch.Tensor) -> torch.Tensor:
    # In fp64: a KL near 0 is a small difference of large terms.
    return (logits_CV.double() / scale_C1).log_softmax(-1)


def _entropy(logps_CV: torch.Tensor) -> torch.Tensor:
    # Tokens without probability have log −inf, and 0·(−inf) must be 0 here.
    return -(logps_CV.exp() * logps_CV.clamp_min(torch.finfo(logps_CV.dtype).min)).sum(-1)


def divergence(
    logps_CV: torch.Tensor, ref_logps_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy of π, KL(π‖π_ref) and entropy of π_ref row by row, ``[C]`` each, in nats.

    KL is infinite where π gives probability to a token that π_ref has at 0.
    """
    probs_CV = logps_CV.exp()
    terms_CV = torch.where(probs_CV > 0, probs_CV * (logps_CV - ref_logps_CV), 0.0)
    return _entropy(logps_CV), terms_CV.sum(-1).clamp_min(0.0), _entropy(ref_logps_CV)


def ci95(values: Floats | Sequence[float], clusters: Sequence[str], floor: float = -np.inf) -> Any:
    """``[low, high]`` of the mean, or None where fewer than two prompts say nothing of how prompts vary."""
    if len(set(clusters)) < 2:
        return None
    _, low, high = mean_interval([float(value) for value in values], clusters)
    return [max(low, floor), high]


def divergence_figures(states: Sequence[AnswerStates]) -> dict[str, Any]:
    """KL and entropy over all tokens, over answers, and by position, with intervals over prompts.

    Where KL is infinite at some state, ``kl_infinite_states`` counts them and the means of KL are None.
    """
    sizes = [len(state.entropy) for state in states]
    tokens = [state.prompt for state, size in zip(states, sizes, strict=True) for _ in range(size)]
    answers = [state.prompt for state in states]
    entropy = np.concatenate([state.entropy for state in states])
    found: dict[str, Any] = dict.fromkeys(
        ("kl_per_token", "kl_per_token_ci95", "kl_per_sequence", "kl_per_sequence_ci95", "reference_entropy")
    )
    found |= {"entropy": float(entropy.mean()), "entropy_ci95": ci95(entropy, tokens, 0.0)}
    columns: dict[str, Floats | None] = {"kl": None, "entropy": entropy, "reference_entropy": None}
    kls = [state.kl for state in states if state.kl is not None]
    others = [state.reference_entropy for state in states if state.reference_entropy is not None]
    if kls and others:
        kl, columns["reference_entropy"] = np.concatenate(kls), np.concatenate(others)
        found["reference_entropy"] = float(np.concatenate(others).mean())
        found["entropy_difference_ci95"] = ci95(entropy - np.concatenate(others), tokens)
        found["kl_infinite_states"] = int((~np.isfinite(kl)).sum())
        if not found["kl_infinite_states"]:
            columns["kl"] = kl
            sums = [float(one.sum()) for one in kls]
            found |= {
                "kl_per_token": float(kl.mean()),
                "kl_per_token_ci95": ci95(kl, tokens, 0.0),
                "kl_per_sequence": float(np.mean(sums)),
                "kl_per_sequence_ci95": ci95(sums, answers, 0.0),
            }
    positions = np.concatenate([np.arange(size) for size in sizes])
    found["by_position"] = _by_position(positions, columns)
    return found


def _by_position(positions: npt.NDArray[np.int64], columns: dict[str, Floats | None]) -> list[dict[str, Any]]:
    """Means over the tokens at places 0, 1, 2–3, 4–7, 8–15 … of their answers; ``to`` is the last one."""
    rows = []
    start, width = 0, 1
    while start <= positions.max(initial=-1):
        stop = start + width
        here = (positions >= start) & (positions < stop)
        means = {k: None if v is None else float(v[here].mean()) for k, v in columns.items()}
        last = min(stop - 1, int(positions.max()))
        rows.append({"from": start, "to": last, **means, "tokens": int(here.sum())})
        start, width = stop, max(1, stop)
    return rows
