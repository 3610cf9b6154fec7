"""Two policies compared by a judge: their answers to the same prompts, one to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trimtab.errors import InputError
from trimtab.evaluation.intervals import paired_win_rate
from trimtab.groups import Group, prompt_text, stable_hash
from trimtab.rewards.base import response_text
from trimtab.rewards.judges import Judge


def judged_win_rate(
    judge: Judge, ours: Sequence[Group], theirs: Sequence[Group], *, seed: int = 0
) -> dict[str, Any]:
    """How often the judge prefers ours, a tie counting half, with a 95 % interval over prompts.

    Both sides hold the same prompts under the same ids, each with as many responses; response k of one is
    compared with response k of the other. Which of the two is shown as the first is drawn by a hash of
    (seed, id, k), so that a judge's love of a place favours neither side. The judge must be pairwise.

    Returns ``win_rate`` and ``win_rate_ci95`` (None if the judge abstained from everything), ``wins``,
    ``losses``, ``ties``, ``abstained`` (left out of the rate), ``order_inconsistent``, ``comparisons``
    (all that were asked for), ``longer_preferred`` (of the decided comparisons between texts of unequal
    length, the share won by the longer; None without any), ``abstentions`` (reasons and their counts) and
    ``costs``: the judge's counts for this comparison. Raises InputError where the sides do not match.
    """
    if judge.mode != "pairwise":
        raise InputError(f'a judged win rate needs a judge with mode = "pairwise", not {judge.mode!r}')
    couples, flipped = _couples(ours, theirs, seed)
    before = judge.costs.facts()
    judgements = judge.judge(couples)
    costs = {key: value - before.get(key, 0.0) for key, value in judge.costs.facts().items()}

    outcomes: list[float] = []
    clusters: list[str] = []
    longer: list[float] = []
    reasons: dict[str, int] = {}
    inconsistent = 0
    for couple, flip, judgement in zip(couples, flipped, judgements, strict=True):
        [pair] = judgement.pairs()
        inconsistent += pair.inconsistent
        if pair.outcome is None:
            reasons[pair.reason] = reasons.get(pair.reason, 0) + 1
            continue
        outcomes.append(1 - pair.outcome if flip else pair.outcome)
        clusters.append(couple.id.rpartition("#")[0])
        sizes = [len(response_text(r.text)) for r in couple.responses]
        if pair.outcome != 0.5 and sizes[0] != sizes[1]:
            longer.append(float((pair.outcome == 1.0) == (sizes[0] > sizes[1])))
    found: dict[str, Any] = {
        "win_rate": None,
        "win_rate_ci95": None,
        "wins": outcomes.count(1.0),
        "losses": outcomes.count(0.0),
        "ties": outcomes.count(0.5),
        "abstained": sum(reasons.values()),
        "order_inconsistent": inconsistent,
        "comparisons": len(couples),
        "longer_preferred": sum(longer) / len(longer) if longer else None,
        "abstentions": reasons,
        "costs": costs,
    }
    if outcomes:
        rate = paired_win_rate(outcomes, [0.5] * len(outcomes), clusters=clusters, seed=seed)
        found |= {"win_rate": rate.rate, "win_rate_ci95": list(rate.ci95)}
    return found


def _couples(ours: Sequence[Group], theirs: Sequence[Group], seed: int) -> tuple[list[Group], list[bool]]:
    """A group of two for each comparison, and whether theirs comes first in it."""
    other = {group.id: group for group in theirs}
    if not ours or len(other) != len(theirs) or sorted(other) != sorted(group.id for group in ours):
        raise InputError(
            f"a judged win rate needs the same prompts on both sides, each once: {len(ours)} prompts of ours "
            f"and {len(theirs)} of theirs do not match by id"
        )
    couples, flipped = [], []
    for group in ours:
        rival = other[group.id]
        sizes = len(group.responses), len(rival.responses)
        if sizes[0] != sizes[1] or not sizes[0] or prompt_text(group.prompt) != prompt_text(rival.prompt):
            raise InputError(
                f"{group.id}: the two sides must answer one prompt with as many responses each; there are "
                f"{sizes[0]} and {sizes[1]}, or the prompts differ"
            )
        for k, pair in enumerate(zip(group.responses, rival.responses, strict=True)):
            flip = bool(stable_hash("side", seed, group.id, k) % 2)
            couple = dataclasses.replace(
                group, id=f"{group.id}#{k}", responses=list(pair[::-1] if flip else pair)
            )
            couples.append(couple)
            flipped.append(flip)
    return couples, flipped
