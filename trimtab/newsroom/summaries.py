"""Writers of varying quality: what people hand in when asked for a summary.

A writer of quality q ∈ [0, 1] makes each fault below with probability (1 − q) times its stated rate, one
fault not hindering another. At q = 1 there is none, and the summary is the one that scores 10; at q = 0
most facts are missing or wrong. The gold score's mean over articles rises with q.
"""

from __future__ import annotations

import random

from trimtab.errors import InputError
from trimtab.newsroom.lexicon import SLOTS, mentions
from trimtab.newsroom.world import Article, draw_facts

DROPS = 0.35
"""Rate, per fact, of leaving it out."""
MISTAKES = 0.25
"""Rate, per fact, of stating another value: mostly one from the article's background."""
FROM_BACKGROUND = 0.8
"""Of the mistakes, the share that takes a value from the article, if it has another for that slot."""
SHUFFLES = 0.25
"""Rate of stating the facts in an order other than the best one."""
BARE = 0.25
"""Rate of leaving out the small words that introduce facts."""
PADDING = 0.7
"""Rate of adding an opening or a closing that says nothing."""
REPEATS = 0.3
"""Rate of saying up to MOST_REPEATED of its facts again."""
MOST_REPEATED = 3
UNFINISHED = 0.3
"""Rate of leaving out the full stop."""

OPENINGS = (
    "this is truly wonderful news :",
    "here is a short summary :",
    "according to the article",
    "it is great to report that",
)
CLOSINGS = (
    "which is truly wonderful news for everyone",
    "and many people were very pleased",
    "as the article says",
    "and more details will follow soon",
)
PHRASES = {
    "who": "{}",
    "what": "{}",
    "product": "the {}",
    "where": "in {}",
    "when": "on {}",
    "amount": "for {} dollars",
}


def write_summary(article: Article, rng: random.Random, quality: float) -> str:
    """One summary of ``article`` by a writer of ``quality`` in [0, 1]; never empty."""
    if not 0 <= quality <= 1:
        raise InputError(f"quality must lie in [0, 1], but is {quality}: give a number between them")
    fault = 1 - quality
    values = _stated_values(article, rng, fault)
    phrases = _phrases(values, rng, fault)
    if rng.random() < REPEATS * fault:
        start = rng.randrange(len(phrases))
        phrases = [*phrases, "and", *phrases[start : start + MOST_REPEATED]]
    if rng.random() < PADDING * fault:
        if rng.random() < 0.5:
            phrases.insert(0, rng.choice(OPENINGS))
        else:
            phrases.append(rng.choice(CLOSINGS))
    if rng.random() >= UNFINISHED * fault:
        phrases.append(".")
    return " ".join(phrases)


def _stated_values(article: Article, rng: random.Random, fault: float) -> dict[str, str]:
    """The facts that the writer remembers, some of them wrongly; at least one."""
    kept = [slot for slot in SLOTS if rng.random() >= DROPS * fault] or [rng.choice(SLOTS)]
    values = {slot: article.facts[slot] for slot in kept}
    for slot in kept:
        if rng.random() < MISTAKES * fault:
            values[slot] = _wrong_value(article, rng, slot)
    return values


def _wrong_value(article: Article, rng: random.Random, slot: str) -> str:
    """Another value for ``slot``: from the article's background, or out of thin air."""
    right = article.facts[slot]
    named = [m.value for m in mentions(article.text.split()) if m.slot == slot and m.value != right]
    if named and rng.random() < FROM_BACKGROUND:
        return rng.choice(named)
    while True:
        value = draw_facts(rng)[slot]
        if value != right:
            return value


def _phrases(values: dict[str, str], rng: random.Random, fault: float) -> list[str]:
    """The facts as phrases, perhaps bare, perhaps in a poor order."""
    slots = list(values)
    if rng.random() < SHUFFLES * fault:
        rng.shuffle(slots)
    if rng.random() < BARE * fault:
        return [values[slot] for slot in slots]
    return [PHRASES[slot].format(values[slot]) for slot in slots]
