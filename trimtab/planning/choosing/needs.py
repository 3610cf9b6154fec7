"""What each method cannot do without, as data: whoever lacks it rules the method out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trimtab.planning.choosing.situation import TOO_FEW, Situation

ORDER = (
    *("dpo", "rank", "kto", "ipo", "simpo", "orpo", "sft", "mixed", "spin", "online-dpo", "reward"),
    *("process-reward", "rloo", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "ppo"),
)
"""All methods; among equals the first is taken."""
RELATIVE = ("grpo", "dr-grpo", "rloo", "dapo", "gspo", "cispo")
ONLINE = (*RELATIVE, "ppo", "online-dpo")
"""Methods that learn from answers of the policy's own, which something has to score."""
PAIRWISE = ("dpo", "ipo", "simpo", "orpo")
OFFLINE = (*PAIRWISE, "kto", "rank", "mixed")
REWARDS = ("reward", "process-reward")

Met = Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Need:
    """What a method cannot do without."""

    methods: tuple[str, ...]
    met: Met
    without: Callable[[Situation], str]
    """Why it is ruled out, in one line."""


def learns_a_reward(s: Situation) -> str:
    """The stage that makes a scorer where there is none: reward, process-reward, or nothing."""
    if s.scorer:
        return ""
    if s.comparisons >= TOO_FEW or s.count("scores") >= TOO_FEW:
        return "reward"
    return "process-reward" if s.count("steps") >= TOO_FEW else ""


def samples_scored(s: Situation) -> bool:
    """The policy's own answers get a score: something gives it, or is to be learned in order to explore."""
    return s.scorer or (s.exploration == "yes" and bool(learns_a_reward(s)))


def kinds_of(s: Situation) -> list[str]:
    """The kinds that ``mixed`` learns from, those that are there."""
    have = {
        "comparisons": s.comparisons,
        "thumbs": s.both_thumbs,
        "demonstrations": s.count("demonstrations"),
    }
    return [kind for kind, rows in have.items() if rows]


def preferences(s: Situation) -> bool:
    """Comparisons or thumbs enough to learn from."""
    return s.comparisons >= TOO_FEW or s.both_thumbs >= TOO_FEW


def _few(what: str, rows: int) -> str:
    if not rows:
        return f"needs {what}; there are none"
    return f"{rows:,} {what} are too few: {TOO_FEW} at least, half of them held out to show anything"


def _for_policy(s: Situation) -> bool:
    return s.goal == "policy"


POLICIES = tuple(name for name in ORDER if name not in REWARDS)

NEEDS = (
    Need(POLICIES, _for_policy, lambda s: "makes a policy; a reward model is what is asked for"),
    Need(
        ("reward",),
        lambda s: s.goal == "reward",
        lambda s: "makes a reward model, not a policy (a stage before one, where it is needed)",
    ),
    Need(
        ("reward",),
        lambda s: s.comparisons >= TOO_FEW or s.count("scores") >= TOO_FEW,
        lambda s: _few("comparisons or ratings", max(s.comparisons, s.count("scores"))),
    ),
    Need(
        ("process-reward",),
        lambda s: s.goal == "reward",
        lambda s: "makes a reward model of steps, not a policy (a stage before one, where it is needed)",
    ),
    Need(
        ("process-reward",),
        lambda s: s.count("steps") >= TOO_FEW,
        lambda s: _few("answers in labelled steps", s.count("steps")),
    ),
    Need(("sft",), lambda s: s.imitable > 0, lambda s: "has nothing to imitate: no demonstrations"),
    Need(
        ("spin",),
        lambda s: s.count("demonstrations") > 0,
        lambda s: "plays against demonstrations; there are none",
    ),
    Need(
        ("dpo",),
        lambda s: s.comparisons >= TOO_FEW or (not s.comparisons and s.both_thumbs >= TOO_FEW),
        lambda s: _few("pairs", s.comparisons),
    ),
    Need(
        ("ipo", "simpo", "orpo"),
        lambda s: s.comparisons >= TOO_FEW,
        lambda s: _few("pairs", s.comparisons),
    ),
    Need(
        ("kto",),
        lambda s: max(s.comparisons, s.both_thumbs) >= TOO_FEW,
        lambda s: (
            "thumbs of one kind alone tell nothing apart"
            if s.count("thumbs") and not s.both_thumbs
            else _few("thumbs", s.both_thumbs)
        ),
    ),
    Need(
        ("rank",),
        lambda s: s.count("rankings", "ratings") > 0,
        lambda s: "is for rankings or ratings of several answers; on pairs it is DPO",
    ),
    Need(
        ("rank",),
        lambda s: s.comparisons >= TOO_FEW,
        lambda s: _few("rankings", s.count("rankings", "ratings")),
    ),
    Need(
        ("mixed",),
        lambda s: len(kinds_of(s)) > 1,
        lambda s: "is for two kinds of feedback or more",
    ),
    Need(
        ("mixed",),
        lambda s: s.comparisons + s.both_thumbs >= TOO_FEW,
        lambda s: _few("comparisons and thumbs", s.comparisons + s.both_thumbs),
    ),
    Need(
        ("online-dpo",),
        lambda s: s.scorer,
        lambda s: "nothing scores its samples: it needs a judge, a reward model or a verifier",
    ),
    Need(
        (*RELATIVE, "ppo"),
        lambda s: bool(s.scorer or learns_a_reward(s)),
        lambda s: "nothing scores its samples, and there is too little to learn a reward from",
    ),
    Need(ONLINE, lambda s: s.rows > 0, lambda s: "has no prompts to answer"),
)
