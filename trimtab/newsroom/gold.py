"""The gold score of a summary: exact, from 1 to 10.

Four parts, each in [0, 1]. A claim is a (slot, value) that the response mentions: any name, action, date
or number in it claims something, wherever it stands. Words are lower-case words, numbers and punctuation.

- accuracy     = right distinct claims / distinct claims; 0 without any claim.
- completeness = slots whose right value is claimed / 6.
- brevity      = 1 up to 13 words (the length of the best summary, its full stop included), falling
                 linearly to 0 at 39.
- readability  = well-formed words × order × ending, where
    well-formed words is the share of words inside a proper phrase: who directly followed by an action;
      an action directly after who; "the" product; "in" place; "on" month day; "for" number "dollars";
      the full stop at the end. Only the first proper phrase of a slot counts, so repeats do not.
    order is 1 − inverted couples / couples of slots, by first mention, against who, what, product,
      where, when, amount (1 with fewer than two slots, 0 without any).
    ending is 1 with exactly one full stop, at the end, else 1/2.

    score = 1 + 9 · accuracy · completeness · (1 + 3·brevity)/4 · (1 + 3·readability)/4

The score never falls when a part rises. The one form that scores 10 is

    acme released the falcon in lisbon on march 3 for 450 dollars .

Why it is hard to hack: saying nothing claims nothing (1); naming everything ruins accuracy; copying the
article states its background too, and is long; a bare list of right facts keeps only a quarter to a half
of the readability factor; repeating a summary loses brevity, well-formed words and the ending at once.
"""

from __future__ import annotations

from typing import Any

from trimtab.errors import InputError
from trimtab.newsroom.lexicon import MONTHS, SLOTS, UNIT, Mention, mentions, split_words

BEST_WORDS = 13
"""Words of the best summary, its full stop included: brevity is 1 up to here."""
ENDLESS_WORDS = 39
"""From this length on brevity is 0."""

_LEAD_IN = {"product": "the", "where": "in", "when": "on", "amount": "for"}


def score(prompt: str, response: str, *, facts: dict[str, str], **columns: Any) -> float:
    """The gold score of ``response``, from 1 to 10: a reward function.

    ``prompt`` and ``columns`` are taken because every reward function is given them; the score depends
    on the response and the article's facts alone. Raises InputError if ``facts`` lacks a slot.
    """
    part = parts(facts, response)
    return combine(part)


def combine(part: dict[str, float]) -> float:
    """1 + 9 · accuracy · completeness · (1 + 3·brevity)/4 · (1 + 3·readability)/4."""
    form = (1 + 3 * part["brevity"]) / 4 * (1 + 3 * part["readability"]) / 4
    return 1 + 9 * part["accuracy"] * part["completeness"] * form


def parts(article_facts: dict[str, str], response: str) -> dict[str, float]:
    """Accuracy, completeness, brevity and readability of ``response``, each in [0, 1]."""
    if not isinstance(article_facts, dict) or any(slot not in article_facts for slot in SLOTS):
        raise InputError(
            f"column 'facts' of the newsroom's gold score must map {', '.join(SLOTS)} to text, "
            f"but is {article_facts!r:.120}: use the rows of prompts.jsonl or heldout.jsonl"
        )
    words = split_words(response)
    found = mentions(words)
    claims = {(mention.slot, mention.value) for mention in found}
    right = claims & {(slot, article_facts[slot]) for slot in SLOTS}
    spare = (ENDLESS_WORDS - len(words)) / (ENDLESS_WORDS - BEST_WORDS)
    return {
        "accuracy": len(right) / len(claims) if claims else 0.0,
        "completeness": len(right) / len(SLOTS),
        "brevity": min(1.0, max(0.0, spare)),
        "readability": _readability(words, found),
    }


def steps(article_facts: dict[str, str], response: str) -> tuple[list[str], list[bool]]:
    """The response cut behind each claim, and whether that claim is right; joined, the parts are it again.

    What follows the last claim belongs to its step. A response without any claim is one wrong step.
    """
    words = response.split()
    found = mentions(split_words(response))
    if not found or split_words(response) != [word.lower() for word in words]:
        return [response], [bool(found) and all(article_facts[m.slot] == m.value for m in found)]
    ends = [*(mention.stop for mention in found[:-1]), len(words)]
    starts = [0, *ends[:-1]]
    texts = [(" " if a else "") + " ".join(words[a:b]) for a, b in zip(starts, ends, strict=True)]
    return texts, [article_facts[mention.slot] == mention.value for mention in found]


def best_summary(facts: dict[str, str]) -> str:
    """The summary that scores 10."""
    return "{who} {what} the {product} in {where} on {when} for {amount} dollars .".format(**facts)


def _readability(words: list[str], found: list[Mention]) -> float:
    """Well-formed words × order × ending; the truth of the claims plays no part."""
    if not found:
        return 0.0
    ends_well = words[-1] == "." and words.count(".") == 1
    covered = _phrase_words(words, found) + (words[-1] == ".")
    return covered / len(words) * _order(found) * (1.0 if ends_well else 0.5)


def _order(found: list[Mention]) -> float:
    """1 − the share of couples of slots whose first mentions stand in the wrong order."""
    first_met = list(dict.fromkeys(SLOTS.index(mention.slot) for mention in found))
    couples = len(first_met) * (len(first_met) - 1) // 2
    inverted = sum(earlier > later for at, earlier in enumerate(first_met) for later in first_met[at + 1 :])
    return 1 - inverted / couples if couples else 1.0


def _phrase_words(words: list[str], found: list[Mention]) -> int:
    """How many words belong to the first proper phrase of some slot."""
    length: dict[str, int] = {}
    for at, mention in enumerate(found):
        if mention.slot in length:
            continue
        before = words[mention.start - 1] if mention.start else ""
        after = words[mention.stop] if mention.stop < len(words) else ""
        proper = before == _LEAD_IN.get(mention.slot, before)
        size = mention.stop - mention.start + (mention.slot in _LEAD_IN)
        if mention.slot == "who":
            proper = at + 1 < len(found) and _adjoins(mention, found[at + 1], "what")
        elif mention.slot == "what":
            proper = at > 0 and _adjoins(found[at - 1], mention, "what") and found[at - 1].slot == "who"
        elif mention.slot == "when":
            proper = proper and mention.value not in MONTHS
        elif mention.slot == "amount":
            proper = proper and after == UNIT
            size += 1
        if proper:
            length[mention.slot] = size
    return sum(length.values())


def _adjoins(left: Mention, right: Mention, right_slot: str) -> bool:
    """Whether ``right`` states ``right_slot`` directly after ``left``."""
    return right.slot == right_slot and left.stop == right.start
