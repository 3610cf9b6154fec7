"""Metrics of the answers to static prompts, and the lines of samples.jsonl; all under ``eval_…``.

What could not be measured (no answer had a reward, the judge abstained from all) is NaN, which the log writes
as null: a metric that is asked for stays there under its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.data.collate import group_tokens
from trimtab.errors import InputError
from trimtab.evaluation.drift.divergence import answer_states, divergence_figures
from trimtab.evaluation.judging.judged import judged_win_rate
from trimtab.evaluation.policy import Evaluation, win_rate_against
from trimtab.groups import Group, prompt_text
from trimtab.models.language_model import LanguageModel
from trimtab.parallel.world import world
from trimtab.rewards.base import response_text
from trimtab.rewards.judges import Judge

SAMPLES = "samples.jsonl"
"""In the run directory: every answer of every evaluation."""


def answer_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Mean length in tokens, the end token counted, and the share of answers that were cut off."""
    responses = [r for group in groups for r in group.responses]
    return {
        "eval_response_tokens": sum(len(r.tokens or ()) for r in responses) / len(responses),
        "eval_cut_off": sum(r.finish == "length" for r in responses) / len(responses),
    }


def drift_figures(
    lm: LanguageModel,
    reference: LanguageModel | None,
    groups: Sequence[Group],
    temperature: float,
    max_tokens: int,
) -> dict[str, float]:
    """Entropy of the policy, and KL from the reference, exact over the vocabulary at each token; in nats.

    At temperature 0, where nothing is drawn, both are taken at 1.
    """
    alone = [dataclasses.replace(group, responses=[r]) for group in groups for r in group.responses]
    budget = max([max_tokens, *(group_tokens(group, lm.layout) for group in alone)])
    states = answer_states(lm, groups, temperature or 1.0, reference, max_tokens=budget)
    found = divergence_figures(states)
    figures = {"eval_entropy": found["entropy"]}
    if reference is not None:
        figures |= {"eval_kl": found["kl_per_token"], "eval_kl_sequence": found["kl_per_sequence"]}
    return {name: math.nan if value is None else float(value) for name, value in figures.items()}


def reward_figures(ours: Evaluation) -> dict[str, float]:
    """The mean reward, and how many answers have none if there are any."""
    scores = ours.scores
    figures: dict[str, float] = {"eval_reward": sum(scores) / len(scores) if scores else math.nan}
    return figures | ({"eval_unscored": ours.unscored} if ours.unscored else {})


def win_figures(ours: Evaluation, theirs: Evaluation, seed: int) -> dict[str, float]:
    """By reward, answer against answer to the same prompt; a tie counts half."""
    if not ours.by_place.keys() & theirs.by_place.keys():
        return _rate(None, None)
    rate = win_rate_against(ours, theirs, seed=seed)
    return _rate(rate.rate, rate.ci95)


def judged_figures(judge: Judge, ours: Evaluation, theirs: Evaluation, seed: int) -> dict[str, float]:
    """By a judge, who is not asked to compare answers with themselves."""
    if ours is theirs:
        return _rate(0.5, (0.5, 0.5))
    found = judged_win_rate(judge, ours.groups, theirs.groups, seed=seed)
    figures = _rate(found["win_rate"], found["win_rate_ci95"])
    return figures | ({"eval_abstained": found["abstained"]} if found["abstained"] else {})


def _rate(rate: float | None, ci95: Sequence[float] | None) -> dict[str, float]:
    low, high = ci95 or (math.nan, math.nan)
    return {
        "eval_win_rate": math.nan if rate is None else rate,
        "eval_win_rate_low": low,
        "eval_win_rate_high": high,
    }


def rows_of(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One line an answer; ``reward`` is null where it has none."""
    return [
        {
            "step": step,
            "id": group.id,
            "sample": number,
            "prompt": prompt_text(group.prompt),
            "answer": response_text(response.text),
            "tokens": len(response.tokens or ()),
            "finish": response.finish,
            "reward": response.reward,
        }
        for group in groups
        for number, response in enumerate(group.responses)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append the lines and have them on the disk: no checkpoint is ahead of them. Raises InputError.

    Of several processes, which all have the same lines, the first writes them.
    """
    if not world().first:
        return
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from None
