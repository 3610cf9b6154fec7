"""What a user has, as ``trimtab choose`` sees it: feedback by kind, what can score a new answer, the rest."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import InputError

KINDS = {
    "pairs": "two answers to a prompt, one preferred",
    "rankings": "three or more answers to a prompt, in order",
    "ratings": "several answers to a prompt, each with a number",
    "scores": "one answer to a prompt, with a number",
    "thumbs": "one answer, good or bad (allow or deny)",
    "demonstrations": "answers to imitate",
    "steps": "answers in labelled steps",
    "prompts": "prompts without an answer",
}
"""Kinds of feedback, as ``--have`` names them."""
THUMBS = ("ups", "downs")
"""Thumbs counted apart, in ``--have``."""
Answer = Literal["yes", "no", "unknown"]
Tuned = Literal["yes", "no", "these", "unknown"]


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that the decision looks at. Rows are counted, never read."""

    have: Mapping[str, int] = field(default_factory=dict)
    """Kind (of :data:`KINDS`) → rows."""
    ups: int | None = None
    """Of the thumbs; None where it is not known how many are up."""
    downs: int | None = None
    verifier: str = ""
    """A reward term that checks answers (numeric, math, code, file.py:function); "yes" for one not named."""
    reward_model: str = ""
    """Folder or hub name."""
    judge: str = ""
    """file.py:function or an address and a model; "yes" for one not named."""
    goal: Literal["policy", "reward"] = "policy"
    exploration: Answer = "unknown"
    """Answers that the data do not hold have to be found."""
    reasoning: Answer = "unknown"
    """Answers are long chains of reasoning."""
    long_horizon: Answer = "unknown"
    """What a token is worth shows much later: tools, many turns."""
    noisy: Answer = "unknown"
    flips: float | None = None
    """Share of the labels that are wrong, where it is known."""
    keep_short: Answer = "unknown"
    """Answers must not grow longer."""
    reuse: Answer = "unknown"
    """Sampling is dear: many optimiser steps on each rollout."""
    tuned: Tuned = "unknown"
    """The model has been through SFT; these: on these very demonstrations."""
    longer: float | None = None
    """Share of the comparisons whose better answer is the longer one."""
    experts: bool = False
    """A mixture of experts."""

    def count(self, *kinds: str) -> int:
        """Rows of these kinds together."""
        return sum(self.have.get(kind, 0) for kind in kinds)

    @property
    def comparisons(self) -> int:
        """Rows that compare answers to one prompt."""
        return self.count("pairs", "rankings", "ratings")

    @property
    def lists(self) -> bool:
        """A fifth of the comparisons or more are of several answers."""
        return self.count("rankings", "ratings") * 5 >= max(1, self.comparisons)

    @property
    def both_thumbs(self) -> int:
        """Thumbs, where there are some of both kinds (or it is not known that there are not)."""
        one_sided = self.ups == 0 or self.downs == 0
        return 0 if one_sided else self.count("thumbs")

    @property
    def imitable(self) -> int:
        """Rows with an answer to imitate: given, chosen, the best, or thumbed up."""
        ups = self.count("thumbs") if self.ups is None else self.ups
        return self.count("demonstrations") + self.comparisons + ups

    @property
    def rows(self) -> int:
        """All rows: any of them is a prompt."""
        return self.count(*KINDS)

    @property
    def wrong(self) -> str:
        """The share of wrong labels, in words."""
        return f"{100 * (self.flips or 0):.0f} %"

    @property
    def longer_share(self) -> str:
        """How often the better answer is the longer one, in words."""
        return f"{100 * (self.longer or 0):.0f} %"

    @property
    def scorer(self) -> bool:
        """Something can score an answer that nobody has seen before."""
        return bool(self.verifier or self.reward_model or self.judge)


def parse_have(text: str) -> dict[str, int]:
    """``"pairs:20000,thumbs:500"`` → rows by kind. Raises InputError, with the nearest kind."""
    out: dict[str, int] = {}
    known = [*KINDS, *THUMBS]
    for part in (part.strip() for part in text.split(",")):
        kind, colon, amount = (piece.strip() for piece in part.partition(":"))
        if kind not in known:
            near = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; kinds are {', '.join(known)}"
            raise InputError(f"--have: {kind!r} is no kind of feedback{hint}")
        if kind in out:
            raise InputError(f"--have: {kind} is there twice; add them up")
        out[kind] = parse_amount(amount, kind) if colon else _missing(kind)
    if "thumbs" in out and any(name in out for name in THUMBS):
        raise InputError("--have: give thumbs, or ups and downs, not both")
    return out


def _missing(kind: str) -> int:
    raise InputError(f"--have: how much? write {kind}:NUMBER, as {kind}:20000")


def parse_amount(text: str, kind: str) -> int:
    """``20000``, ``20k``, ``1.5M`` or ``20_000``. Raises InputError for what is no amount above 0."""
    factor = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor != 1 else text
    try:
        value = float(digits.replace("_", "")) * factor
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value != int(value):
        raise InputError(f"--have: {kind}:{text} is no amount; write a whole number, as {kind}:20000")
    if value < 1 and not (value == 0 and kind in THUMBS):
        raise InputError(f"--have: {kind}:{text} is not above 0; leave out what you do not have")
    return int(value)


def with_thumbs(have: Mapping[str, int]) -> tuple[dict[str, int], int | None, int | None]:
    """Rows by kind with ups and downs added up as thumbs, and how many of each, where known."""
    rows = {kind: count for kind, count in have.items() if kind in KINDS}
    if not any(name in have for name in THUMBS):
        return rows, None, None
    ups, downs = have.get("ups", 0), have.get("downs", 0)
    return rows | {"thumbs": ups + downs}, ups, downs


def heldout_needed(accuracy: float, power_z: float = 0.8416, level_z: float = 1.96) -> int:
    """Held-out comparisons that tell an accuracy from a coin: 95 % level, 80 % power.

    n = ((z_α·½ + z_β·√(p(1 − p))) / (p − ½))², the normal approximation for one share.
    """
    spread = level_z * 0.5 + power_z * math.sqrt(accuracy * (1 - accuracy))
    return math.ceil((spread / (accuracy - 0.5)) ** 2)


SHOWN_ACCURACY = 0.6
"""A held-out accuracy that real preferences reach early: DPO 62 % on hh-rlhf (docs/results.md)."""
HELD_OUT = heldout_needed(SHOWN_ACCURACY)
"""194."""
TOO_FEW = 2 * HELD_OUT
"""388 comparisons or labels: below that half of them could not show that the other half taught anything."""
GUIDE_FEW = 10_000
"""What the production guide's FAQ names as the least for noticeable gains with DPO."""
GUIDE_REWARD = 50_000
"""Pairs from which its PPO starter trains a reward model."""
