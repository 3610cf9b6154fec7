"""From the feedback that the user has to the feedback that a method reads.

So a run may mix sources of different feedback: a ranking is several pairs, the chosen answer of a pair
is a demonstration, and any row is a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import combinations

from trimtab.errors import InputError
from trimtab.groups import Group, Response, prompt_text, stable_hash


def as_demonstrations(groups: Iterable[Group]) -> list[Group]:
    """One response a group: the given, the chosen, the best ranked or rated, or a thumbs-up."""
    out = []
    for group in groups:
        best = _best(group)
        if best is not None:
            out.append(dataclasses.replace(group, responses=[best]))
    return out


def as_pairs(groups: Iterable[Group]) -> list[Group]:
    """Two responses a group, chosen first. A ranking or ratings of K give every pair without a tie."""
    out = []
    for group in groups:
        if any(r.preferred for r in group.responses):
            out.append(dataclasses.replace(group, responses=[group.chosen, group.rejected]))
            continue
        scored = [(merit, r) for r in group.responses if (merit := _merit(r)) is not None]
        for number, ((a, first), (b, second)) in enumerate(combinations(scored, 2)):
            if a == b:
                continue
            better, worse = (first, second) if a > b else (second, first)
            pair = [
                dataclasses.replace(better, preferred=True),
                dataclasses.replace(worse, preferred=False),
            ]
            out.append(dataclasses.replace(group, id=f"{group.id}/{number}", responses=pair))
    return out


def as_comparisons(groups: Iterable[Group]) -> list[Group]:
    """All ranked responses of a group in one, each with a ``rank`` (1 is best, equal ranks are ties).

    A pair is a ranking of two; ratings and rewards are ranked. Groups that order nothing are left out.
    """
    out = []
    for group in groups:
        if any(r.preferred for r in group.responses):
            found = [(1.0, group.chosen), (0.0, group.rejected)]
        else:
            found = [(merit, r) for r in group.responses if (merit := _merit(r)) is not None]
        merits = [merit for merit, _ in found]
        if len(set(merits)) < 2:
            continue
        ranked = [
            dataclasses.replace(r, rank=1.0 + sum(other > merit for other in merits)) for merit, r in found
        ]
        out.append(dataclasses.replace(group, responses=ranked))
    return out


def as_labelled(groups: Iterable[Group]) -> list[Group]:
    """One response a group, with its ``label``. Of a pair the chosen is a thumbs-up, the rejected a down."""
    out = []
    for group in groups:
        found = [r for r in group.responses if r.label is not None]
        if any(r.preferred for r in group.responses):
            found = [dataclasses.replace(r, label=r.preferred) for r in (group.chosen, group.rejected)]
        for number, response in enumerate(found):
            id = group.id if len(found) == 1 else f"{group.id}/{number}"
            out.append(dataclasses.replace(group, id=id, responses=[response]))
    return out


def pairs_or_labels(groups: Iterable[Group]) -> list[Group]:
    """Pairs, of preferences and rankings; of rows without those every labelled response, as a group."""
    out = []
    for group in groups:
        out += as_pairs([group]) or as_labelled([group])
    return out


def by_feedback(groups: Iterable[Group]) -> list[Group]:
    """Each row as what its feedback is: pairs, else labelled responses, else a demonstration (no label).

    A demonstration has no feedback at all: what is ranked or rated and orders nothing (a tie, one response
    alone), and labelled steps, say nothing that a response is to be imitated for, and are left out.
    """
    out = []
    for group in groups:
        judged = any(_merit(r) is not None or r.step_labels for r in group.responses)
        out += pairs_or_labels([group]) or ([] if judged else as_demonstrations([group]))
    return out


def pair_labels(groups: Iterable[Group], *, seed: int) -> list[Group]:
    """Pairs of labelled responses: each thumbs-up with every thumbs-down of its prompt.

    Where its prompt has no thumbs-down, with one random response to another prompt, whatever its label: a
    pure function of (seed, the thumbs-up's id, the responses there are). Never with a text that has a
    thumbs-up at the same prompt. A thumbs-up that nothing can be paired with is left out, and so is a
    thumbs-down alone. Groups of two responses, which are pairs already, stay. The weight is the thumbs-up's.

    ``groups`` are those of one source and of one side of the held-out split, so that no text crosses it.
    """
    groups = list(groups)
    labelled = [group for group in groups if len(group.responses) == 1]
    asked: dict[str, list[Group]] = {}
    for group in labelled:
        asked.setdefault(prompt_text(group.prompt), []).append(group)
    pool = [group.responses[0] for group in labelled]
    out = []
    for group in groups:
        if len(group.responses) != 1:
            out.append(group)
            continue
        if not group.responses[0].label:
            continue
        same = [other.responses[0] for other in asked[prompt_text(group.prompt)]]
        ups = [prompt_text(r.text) for r in same if r.label]
        downs = [r for r in same if not r.label and prompt_text(r.text) not in ups]
        if not downs:
            known = {prompt_text(r.text) for r in same}
            first = stable_hash("random negative", seed, group.id) % len(pool)
            around = (pool[(first + k) % len(pool)] for k in range(len(pool)))
            downs = [r for r in around if prompt_text(r.text) not in known][:1]
        for number, down in enumerate(downs):
            pair = [
                dataclasses.replace(group.responses[0], preferred=True),
                dataclasses.replace(down, preferred=False),
            ]
            out.append(dataclasses.replace(group, id=f"{group.id}/{number}", responses=pair))
    return out


def as_prompts(groups: Iterable[Group]) -> list[Group]:
    """No responses: what online methods sample from."""
    return [dataclasses.replace(group, responses=[]) for group in groups]


def convert(groups: list[Group], to: Callable[[Iterable[Group]], list[Group]], what: str) -> list[Group]:
    """Apply one of the above. Raises InputError when a source holds nothing of the kind that is needed."""
    out = to(groups)
    if not out:
        source = groups[0].source if groups else "data"
        raise InputError(f"{source}: none of its rows gives {what}; see docs/data.md for the formats")
    return out


def _best(group: Group) -> Response | None:
    if not group.responses:
        return None
    if any(r.preferred for r in group.responses):
        return group.chosen
    scored = [(merit, r) for r in group.responses if (merit := _merit(r)) is not None]
    if scored:
        return max(scored, key=lambda pair: pair[0])[1]
    if len(group.responses) == 1 and group.responses[0].label is not False:
        return group.responses[0]
    return None


def _merit(response: Response) -> float | None:
    """Larger is better, on the scale of whichever feedback there is."""
    if response.rank is not None:
        return -response.rank
    if response.reward is not None:
        return response.reward
    if response.ratings:
        return sum(response.ratings.values()) / len(response.ratings)
    return None
