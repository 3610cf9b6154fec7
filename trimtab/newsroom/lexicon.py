"""The closed lexicon of the newsroom: the names that facts are made of, and how to find them in a text.

Every name belongs to one slot only, so that a word says by itself which fact it claims; no name is also
an ordinary word of an article or a summary. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SLOTS = ("who", "what", "product", "where", "when", "amount")
"""The six facts of an article, in the order in which a good summary states them."""


def _listed(text: str) -> tuple[str, ...]:
    """The words of ``text``: long lists stay readable."""
    return tuple(text.split())


ORGANISATIONS = _listed(
    "acme aldor belmar brisk calder cobalt corvex dalton delphi elmont fabrix ferrow galvan glenco harlow "
    "helix indigo jarvik kestor kinetic lumen maxell meridian nimbus norvik octavia orbit pelham quantum "
    "ravens solaris stanton tessera trident umbra vantage vertex wexford zenith zephyr"
)
PEOPLE = _listed("ada anton bruno clara elena felix greta hugo ivan lena marco nina oscar petra rosa viktor")
WHO = ORGANISATIONS + PEOPLE
ACTIONS = ("announced", "bought", "leased", "recalled", "released", "sold", "tested", "unveiled")
PRODUCTS = _listed(
    "anchor arrow badger beacon bison canyon cedar comet condor coral dolphin ember falcon fern glacier "
    "granite hammer harbor hornet jaguar juniper lantern lynx mantis maple marble nebula otter panther pearl "
    "pioneer raptor rocket saffron sparrow summit tiger topaz walnut willow"
)
PLACES = _listed(
    "athens berlin boston cairo chicago dakar delhi denver dublin geneva hanoi lagos lima lisbon london "
    "madrid milan moscow nairobi osaka oslo paris prague quito rome seoul sydney tokyo vienna warsaw"
)
MONTHS = _listed("january february march april may june july august september october november december")
DAYS = tuple(str(day) for day in range(1, 29))
AMOUNTS = tuple(str(amount) for amount in range(110, 910, 20))
UNIT = "dollars"

_SLOT_OF = (
    dict.fromkeys(WHO, "who")
    | dict.fromkeys(ACTIONS, "what")
    | dict.fromkeys(PRODUCTS, "product")
    | dict.fromkeys(PLACES, "where")
)
_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")


@dataclass(frozen=True, slots=True)
class Mention:
    """One claim found in a text: words[start:stop] state ``value`` for ``slot``."""

    slot: str
    value: str
    start: int
    stop: int


def split_words(text: str) -> list[str]:
    """Lower-case words, numbers and punctuation marks, each one entry."""
    return _WORD.findall(text.lower())


def mentions(words: list[str]) -> list[Mention]:
    """Every claim that ``words`` makes, in order.

    A month takes the number after it as its day; any other number claims an amount. A month without a
    day is a claim of its own, which no fact equals.

    >>> [(m.slot, m.value) for m in mentions("acme sold 110 on march 3".split())]
    [('who', 'acme'), ('what', 'sold'), ('amount', '110'), ('when', 'march 3')]
    """
    found: list[Mention] = []
    at = 0
    while at < len(words):
        word, stop = words[at], at + 1
        if word in MONTHS:
            if stop < len(words) and words[stop].isdecimal():
                stop += 1
            found.append(Mention("when", " ".join(words[at:stop]), at, stop))
        elif word.isdecimal():
            found.append(Mention("amount", word, at, stop))
        elif word in _SLOT_OF:
            found.append(Mention(_SLOT_OF[word], word, at, stop))
        at = stop
    return found


def names() -> list[str]:
    """Every word that can be part of a fact."""
    return [*WHO, *ACTIONS, *PRODUCTS, *PLACES, *MONTHS, *DAYS, *AMOUNTS]
