"""Articles: deterministic, of the stated length, and unambiguous about their facts."""

from __future__ import annotations

import re

from trimtab.newsroom import lexicon, world
from trimtab.newsroom.lexicon import SLOTS, mentions

ARTICLES = [world.make_article(7, index) for index in range(300)]

# How the event, and nothing in the background, introduces each fact.
EVENT = {
    "who": r"the (?:company|founder) (\w+)",
    "what": r"(?:the (?:company|founder) \w+|was) (\w+ed|sold|bought)\b",
    "product": r"the new (\w+)",
    "where": r"\bin (\w+)",
    "when": r"\bon (\w+ \d+)",
    "amount": r"\bfor (\d+) dollars",
}


def test_same_seed_and_index_give_the_same_article() -> None:
    assert world.make_article(7, 3) == ARTICLES[3]
    assert world.make_article(8, 3).text != ARTICLES[3].text
    assert len({article.text for article in ARTICLES}) == len(ARTICLES)


def test_an_article_does_not_change_between_versions() -> None:
    # Held-out scores that people publish mean something only while the world stays as it is.
    article = world.make_article(0, 0)
    assert article.text == (
        "many people were pleased with the news . the deal was made for 850 dollars . "
        "the older arrow lost 670 dollars a unit . nobody had seen a thing like it before . "
        "the day was set on may 3 . the company nimbus released the new beacon in oslo ."
    )
    assert list(article.facts.values()) == ["nimbus", "released", "beacon", "oslo", "may 3", "850"]


def test_lengths() -> None:
    lengths = [len(article.text.split()) for article in ARTICLES]
    assert min(lengths) >= 40
    assert max(lengths) <= 70
    assert 45 <= sum(lengths) / len(lengths) <= 55


def test_text_is_in_normal_form() -> None:
    for article in ARTICLES:
        assert article.text == " ".join(lexicon.split_words(article.text))
    assert world.prompt_of(ARTICLES[0]).endswith(" . summary :")


def test_facts_can_be_read_off_their_cues_and_are_not_ambiguous() -> None:
    for article in ARTICLES:
        for slot in SLOTS:
            assert set(re.findall(EVENT[slot], article.text)) == {article.facts[slot]}, (slot, article)


def test_articles_have_background_of_every_slot() -> None:
    wrong = dict.fromkeys(SLOTS, 0)
    for article in ARTICLES:
        for mention in mentions(article.text.split()):
            wrong[mention.slot] += mention.value != article.facts[mention.slot]
    assert all(count >= 30 for count in wrong.values()), wrong


def test_order_varies() -> None:
    orders = {tuple(m.slot for m in mentions(article.text.split())) for article in ARTICLES}
    assert len(orders) > 100


def test_names_belong_to_one_slot_and_are_no_ordinary_words() -> None:
    names = lexicon.names()
    assert len(set(names)) == len(names)
    ordinary = {word for template in world.templates() for word in template.split()}
    assert not ordinary & set(names)


def test_mentions() -> None:
    words = lexicon.split_words("Acme sold 110 on March 3 may")
    found = [(m.slot, m.value, m.start, m.stop) for m in mentions(words)]
    assert found == [
        ("who", "acme", 0, 1),
        ("what", "sold", 1, 2),
        ("amount", "110", 2, 3),
        ("when", "march 3", 4, 6),
        ("when", "may", 6, 7),
    ]
