"""The gold score: values worked out by hand, the best summary, and attempts to cheat it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from trimtab.errors import InputError
from trimtab.newsroom import gold, lexicon, world
from trimtab.newsroom.summaries import write_summary

FACTS = {
    "who": "acme",
    "what": "released",
    "product": "falcon",
    "where": "lisbon",
    "when": "march 3",
    "amount": "450",
}
BEST = "acme released the falcon in lisbon on march 3 for 450 dollars ."
ARTICLES = [world.make_article(3, index) for index in range(200)]


def score(response: str) -> float:
    return gold.score("", response, facts=FACTS)


# Each row: response, accuracy, completeness, brevity, readability, score.
BY_HAND = [
    (BEST, 1, 1, 1, 1, 10),
    # One wrong place: 5 of 6 claims right, 5 of 6 slots; 1 + 9 · 25/36 = 7.25.
    (BEST.replace("lisbon", "oslo"), 5 / 6, 5 / 6, 1, 1, 7.25),
    # The place left out: 1 + 9 · 5/6 = 8.5.
    ("acme released the falcon on march 3 for 450 dollars .", 1, 5 / 6, 1, 1, 8.5),
    # A second place besides the right one: 7 claims, 6 right; 15 words, brevity 24/26; "in oslo" is not
    # the slot's first phrase, so 13 of 15 words are well formed.
    # 1 + 9 · 6/7 · (1 + 3·24/26)/4 · (1 + 3·13/15)/4
    #   = 1 + 9 · 0.857143 · 0.942308 · 0.9 = 7.542308
    (BEST.replace("lisbon", "lisbon in oslo"), 6 / 7, 1, 24 / 26, 13 / 15, 7.542308),
    # No full stop: ending 1/2, all 12 words well formed; 1 + 9 · (1 + 1.5)/4 = 6.625.
    (BEST.removesuffix(" ."), 1, 1, 1, 0.5, 6.625),
    # Bare facts, 7 words, only "acme released" well formed, no full stop: 2/7 · 1/2 = 1/7;
    # 1 + 9 · (1 + 3/7)/4 = 4.214286.
    ("acme released falcon lisbon march 3 450", 1, 1, 1, 1 / 7, 4.214286),
    # Place first: couples of slots 15, the place stands before who, what, product: 3 inverted, order 0.8;
    # 1 + 9 · (1 + 2.4)/4 = 8.65.
    ("in lisbon acme released the falcon on march 3 for 450 dollars .", 1, 1, 1, 0.8, 8.65),
    # Twice: 26 words, brevity 13/26; well formed 12 phrase words + the last stop = 13/26; two stops: 1/2.
    # 1 + 9 · (1 + 1.5)/4 · (1 + 0.75)/4 = 1 + 9 · 0.625 · 0.4375 = 3.460938
    (f"{BEST} {BEST}", 1, 1, 0.5, 0.25, 3.460938),
    # One fact in 3 words; "acme" without an action is no phrase: 1/3 well formed ("." counts).
    # 1 + 9 · 1/6 · (1 + 1)/4 = 1.75
    ("acme is .", 1, 1 / 6, 1, 1 / 3, 1.75),
    # A month without its day is a wrong claim: 6 claims, 5 right; "on march" is no phrase: 10 of 12 words.
    # 1 + 9 · 5/6 · 5/6 · (1 + 2.5)/4 = 1 + 9 · 0.694444 · 0.875 = 6.46875
    (BEST.replace("march 3", "march"), 5 / 6, 5 / 6, 1, 10 / 12, 6.46875),
]


@pytest.mark.parametrize(("response", "accuracy", "completeness", "brevity", "readability", "total"), BY_HAND)
def test_by_hand(
    response: str, accuracy: float, completeness: float, brevity: float, readability: float, total: float
) -> None:
    assert gold.parts(FACTS, response) == pytest.approx(
        {
            "accuracy": accuracy,
            "completeness": completeness,
            "brevity": brevity,
            "readability": readability,
        }
    )
    assert score(response) == pytest.approx(total, abs=1e-6)


def test_best_is_exactly_ten_and_nothing_written_scores_more() -> None:
    rng = random.Random(0)
    for article in ARTICLES:
        best = gold.best_summary(article.facts)
        assert gold.score(world.prompt_of(article), best, facts=article.facts) == 10.0
        for _ in range(5):
            text = write_summary(article, rng, rng.random())
            assert gold.score("", text, facts=article.facts) < 10 or text == best


def test_spelling_of_the_response_does_not_matter() -> None:
    assert score("Acme released the Falcon in Lisbon on March 3 for 450 dollars.") == 10


@pytest.mark.parametrize(
    ("response", "ceiling"),
    [
        ("", 1),
        (". . . .", 1),
        ("this is truly wonderful news for everyone .", 1),
        ("acme " * 13, 1.5),
        # 39 words: brevity 0, readability 13/39 · 1/2 = 1/6; 1 + 9 · 1/4 · (1 + 1/2)/4 = 1.84375.
        (" ".join([BEST] * 3), 1.84375),
        (" ".join(lexicon.names()), 1.2),
        (" ".join(lexicon.WHO), 1.1),
        ("the " * 13, 1),
        # Every name of the small slot, in an otherwise perfect summary.
        (BEST.replace("released", " ".join(lexicon.ACTIONS)), 5),
        # Two candidates for every slot.
        (
            "acme orbit released sold the falcon badger in lisbon oslo on march 3 may 4 for 450 110 dollars",
            5,
        ),
    ],
)
def test_cheating_scores_low(response: str, ceiling: float) -> None:
    assert score(response) <= ceiling


def test_copying_the_article_scores_low() -> None:
    copied = [gold.score("", a.text, facts=a.facts) for a in ARTICLES]
    assert max(copied) < 2.5
    sentences = [
        gold.score("", f"{sentence} .", facts=a.facts) for a in ARTICLES for sentence in a.text.split(" . ")
    ]
    assert sum(sentences) / len(sentences) < 3


def test_monotone_in_each_part() -> None:
    rng = random.Random(1)
    names = ("accuracy", "completeness", "brevity", "readability")
    for _ in range(500):
        part = {name: rng.random() for name in names}
        for name in names:
            better = part | {name: part[name] + rng.random() * (1 - part[name])}
            assert 1 <= gold.combine(part) <= gold.combine(better) <= 10


def test_parts_stay_in_range() -> None:
    rng = random.Random(2)
    words = [*lexicon.names(), "the", "in", "on", "for", "dollars", ".", "and", "é", "<eos>"]
    for _ in range(1000):
        response = " ".join(rng.choices(words, k=rng.randrange(60)))
        assert all(0 <= value <= 1 for value in gold.parts(FACTS, response).values())
        assert 1 <= score(response) <= 10


def test_other_columns_are_ignored_and_bad_facts_named() -> None:
    assert gold.score("any prompt", BEST, facts=FACTS, source="a", weight=3) == 10
    with pytest.raises(InputError, match="column 'facts'"):
        gold.score("", BEST, facts={"who": "acme"})


def test_quality_of_the_writer_raises_the_score() -> None:
    def mean(quality: float) -> float:
        rng = random.Random(4)
        scores = [gold.score("", write_summary(a, rng, quality), facts=a.facts) for a in ARTICLES]
        return sum(scores) / len(scores)

    means = [mean(quality) for quality in (0, 0.25, 0.5, 0.75, 1)]
    assert all(low + 0.3 < high for low, high in pairwise(means))
    assert means[0] < 3.5
    assert means[-1] == 10


def test_steps_end_behind_each_claim() -> None:
    facts = {"who": "acme", "what": "released", "product": "falcon", "where": "lisbon"}
    facts |= {"when": "march 3", "amount": "450"}
    text = "acme released the falcon in lima on march 3 for 450 dollars ."
    texts, labels = gold.steps(facts, text)
    assert texts == ["acme", " released", " the falcon", " in lima", " on march 3", " for 450 dollars ."]
    assert labels == [True, True, True, False, True, True]
    assert gold.steps(facts, "nothing new .") == (["nothing new ."], [False])
