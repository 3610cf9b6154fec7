"""Generated news articles whose facts are known.

An article has 40 to 70 words (about 50): one event, told in sentences of varied form and order, among
background sentences that name other organisations, products, places, dates and amounts. What tells the
event from the background is the word just before a name, never its position:

| slot | the event | the background |
|---|---|---|
| who | company, founder | rival, supplier, analyst, manager |
| what | "was", or after the name of who acted | had |
| product | new | older |
| where | in | near, from |
| when | on | since, until |
| amount | for | lost, earned |

Two attention layers can learn this (find the cue, copy the word after it), and nothing short of reading
the article can: with 56 × 8 × 40 × 30 × 336 × 40 combinations, no fact can be guessed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trimtab.groups import stable_hash
from trimtab.newsroom.lexicon import (
    ACTIONS,
    AMOUNTS,
    DAYS,
    MONTHS,
    ORGANISATIONS,
    PEOPLE,
    PLACES,
    PRODUCTS,
    WHO,
)

MARKER = "summary :"
"""Ends every prompt."""

FEWEST_WORDS, MOST_WORDS = 40, 70

TITLE, PERSON_TITLE = "the company", "the founder"

# The sentence that carries who, what and product; {tail} takes any of the other three facts.
LEADS = (
    "{title} {who} {what} the new {product} {tail} .",
    "the new {product} was {what} by {title} {who} {tail} .",
    "{tail} {title} {who} {what} the new {product} .",
    "as expected {title} {who} {what} the new {product} {tail} .",
)
TAILS = {"where": ("in {where}",), "when": ("on {when}",), "amount": ("for {amount} dollars",)}
# One sentence for a fact that the lead left out.
FOLLOW_UPS = {
    "where": (
        "the event took place in {where} .",
        "crowds gathered in {where} to watch .",
        "it all happened in {where} .",
    ),
    "when": ("the news came on {when} .", "it happened on {when} .", "the day was set on {when} ."),
    "amount": (
        "it sells for {amount} dollars .",
        "the papers say it went for {amount} dollars .",
        "the deal was made for {amount} dollars .",
    ),
}
BACKGROUND = (
    "the rival {organisation} had {what} the older {product} .",
    "the rival {organisation} lost {amount} dollars a share .",
    "the supplier {organisation} earned {amount} dollars a share last year .",
    "the older {product} had been kept back since {when} .",
    "workers from {where} had waited since {when} .",
    "a second plant near {where} stays closed until {when} .",
    "shops near {where} earned {amount} dollars .",
    "the analyst {person} had {what} the older {product} near {where} .",
    "this is a bold step , said the manager {person} .",
    "the older {product} lost {amount} dollars a unit .",
    "visitors from {where} praised the plan until {when} .",
    "we are proud of the team , said the manager {person} .",
)
FILLERS = (
    "many people were pleased with the news .",
    "more details will follow soon .",
    "the market was calm .",
    "the rain did not stop the crowd .",
    "nobody had seen a thing like it before .",
    "it was a long day to all of us .",
    "the team thanked its friends .",
    "few had thought that it could be done .",
)
MOST_BACKGROUND = 2
"""Sentences of background in an article; what is still too short is filled up with FILLERS."""


@dataclass(frozen=True, slots=True)
class Article:
    """A news article and the six facts it reports (keys: :data:`~trimtab.newsroom.lexicon.SLOTS`).

    >>> make_article(seed=0, index=0).facts["when"]
    'may 3'
    """

    id: str
    text: str
    """Lower-case words and punctuation marks, separated by single spaces."""
    facts: dict[str, str]


def make_article(seed: int, index: int) -> Article:
    """Article number ``index`` of the world ``seed``; the same on every machine."""
    rng = random.Random(stable_hash("newsroom article", seed, index))
    facts = draw_facts(rng)
    while True:
        sentences = _event(rng, facts)
        target = rng.randint(42, 50)
        background = rng.sample(BACKGROUND, rng.randint(1, MOST_BACKGROUND))
        for template in background + rng.sample(FILLERS, len(FILLERS)):
            if sum(len(sentence.split()) for sentence in sentences) >= target:
                break
            sentences.append(template.format(**_other_facts(rng, facts)))
        rng.shuffle(sentences)
        text = " ".join(sentences)
        if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
            return Article(f"newsroom-{seed}-{index}", text, facts)


def prompt_of(article: Article) -> str:
    """The article followed by the marker after which its summary is written."""
    return f"{article.text} {MARKER}"


def draw_facts(rng: random.Random) -> dict[str, str]:
    """One value for every slot, each drawn uniformly (persons are about a quarter of ``who``)."""
    return {
        "who": rng.choice(WHO),
        "what": rng.choice(ACTIONS),
        "product": rng.choice(PRODUCTS),
        "where": rng.choice(PLACES),
        "when": f"{rng.choice(MONTHS)} {rng.choice(DAYS)}",
        "amount": rng.choice(AMOUNTS),
    }


def templates() -> list[str]:
    """Every template of an article: the tokenizer's source for its ordinary words."""
    nested = ((TITLE, PERSON_TITLE), LEADS, *TAILS.values(), *FOLLOW_UPS.values(), BACKGROUND, FILLERS)
    return [template for group in nested for template in group] + [MARKER]


def _event(rng: random.Random, facts: dict[str, str]) -> list[str]:
    """The sentences that state the six facts, in random order and distribution."""
    rest = ["where", "when", "amount"]
    rng.shuffle(rest)
    in_lead = rest[: rng.randint(0, 3)]
    tail = " ".join(rng.choice(TAILS[slot]) for slot in in_lead)
    title = PERSON_TITLE if facts["who"] in PEOPLE else TITLE
    lead = rng.choice(LEADS).replace("{tail}", tail)
    follow_ups = [rng.choice(FOLLOW_UPS[slot]) for slot in rest[len(in_lead) :]]
    filled = [sentence.format(title=title, **facts) for sentence in (lead, *follow_ups)]
    return [" ".join(sentence.split()) for sentence in filled]


def _other_facts(rng: random.Random, facts: dict[str, str]) -> dict[str, str]:
    """Values for a background sentence, none equal to the event's."""
    while True:
        others = draw_facts(rng) | {"organisation": rng.choice(ORGANISATIONS), "person": rng.choice(PEOPLE)}
        if not set(others.values()) & set(facts.values()):
            return others
