"""The rules by which ``trimtab choose`` decides, as data: what speaks for a method, and against it.

A method whose needs (``needs.py``) are not met is ruled out. Of the others the one with the most
points is chosen, the next is the runner-up; with equal points the one that stands first in ``ORDER``: fewer
models, fewer stages. The points are our own judgement; what they rest on is named with each rule, and where
sources disagree ``words.py`` says so. docs/choose.md shows these tables; a test holds it to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimtab.planning.choosing.needs import (
    OFFLINE,
    ONLINE,
    Met,
    kinds_of,
    learns_a_reward,
    preferences,
    samples_scored,
)
from trimtab.planning.choosing.situation import GUIDE_FEW, HELD_OUT, TOO_FEW, Situation

GUIDE = "the production guide"
CHAPTER = "the textbook chapter"
NEWSROOM = "measured by us: docs/results.md, The family"


@dataclass(frozen=True, slots=True)
class Rule:
    """What speaks for some methods, and against others, where it applies."""

    name: str
    when: Met
    condition: str
    """The same in words, for docs and traces."""
    points: Mapping[str, int]
    because: Callable[[Situation], str]
    source: str


def _facts(*names: str) -> str:
    return "; ".join(names)


RULES = (
    Rule(
        "verifier",
        lambda s: bool(s.verifier),
        "a verifier checks answers",
        {
            "grpo": 8,
            "dr-grpo": 7,
            "dapo": 6,
            "gspo": 5,
            "cispo": 5,
            "rloo": 5,
            "ppo": 4,
            "online-dpo": 1,
        },
        lambda s: "a verifier scores any answer, so that the policy can learn from its own",
        _facts(
            f"{CHAPTER}, selection guide: GRPO for reasoning tasks with verifiable rewards",
            f"{NEWSROOM}: from a verifier gold 8.9, from choices 7.8",
        ),
    ),
    Rule(
        "reward model",
        lambda s: bool(s.reward_model and not s.verifier),
        "a reward model, no verifier",
        {"rloo": 5, "ppo": 5, "grpo": 4, "online-dpo": 3, "dr-grpo": 2, "gspo": 1, "cispo": 1},
        lambda s: "a reward model scores new answers",
        _facts(
            f"{CHAPTER} and {GUIDE}: PPO for learned rewards",
            "Ahmadian et al., 2024: RLOO does as well or better without a critic",
            f"{NEWSROOM}, and KL and reward over β: RLOO 7.87 [7.82, 7.92], PPO 7.84 [7.73, 7.94]",
        ),
    ),
    Rule(
        "judge",
        lambda s: bool(s.judge and not s.verifier and not s.reward_model),
        "a judge, no verifier and no reward model",
        {"online-dpo": 7, "grpo": 5, "rloo": 3, "ppo": 2},
        lambda s: "a judge compares new answers, two to a prompt",
        _facts(
            "Guo et al., 2024 (online AI feedback)",
            f"{GUIDE}, GRPO: a judge ranks each group",
            f"{NEWSROOM}: online DPO 7.97 [7.87, 8.07], DPO on given choices 7.77 [7.71, 7.83]",
        ),
    ),
    Rule(
        "several rewards",
        lambda s: bool(s.verifier and s.reward_model),
        "a verifier and a reward model",
        {"ppo": 5},
        lambda s: "several rewards are to be added up",
        f"{GUIDE}, When to use PPO: several reward terms in a weighted mixture",
    ),
    Rule(
        "a reward can be learned",
        lambda s: learns_a_reward(s) == "reward",
        "no scorer, and comparisons or single ratings enough to learn one from",
        {"rloo": 3, "ppo": 3, "grpo": 2},
        lambda s: "a reward model can be learned from what there is, which is a stage more",
        _facts(
            f"{GUIDE}, PPO starter: a reward model first",
            "measured by us: docs/results.md, Quickstart: PPO, GRPO and DPO level on the same choices",
        ),
    ),
    Rule(
        "labelled steps",
        lambda s: s.count("steps") >= TOO_FEW and not s.scorer,
        f"{TOO_FEW} answers in labelled steps or more, no scorer",
        {"process-reward": 6, "grpo": 4},
        lambda s: f"{s.count('steps'):,} answers have labelled steps, which a reward model of steps learns",
        "Lightman et al., 2023; Wang et al., 2024 (Math-Shepherd); DeepSeekMath, 2024, section "
        "4.1.3: GRPO on it",
    ),
    Rule(
        "a reward model is wanted",
        lambda s: s.goal == "reward" and s.comparisons + s.count("scores") > 0,
        "the goal is a reward model; comparisons or ratings",
        {"reward": 7},
        lambda s: f"{s.comparisons + s.count('scores'):,} comparisons or ratings explain a score",
        "Bradley and Terry, 1952; Stiennon et al., 2020",
    ),
    Rule(
        "exploration",
        lambda s: s.exploration == "yes",
        "answers beyond the data are needed",
        {**dict.fromkeys(ONLINE, 4), "ppo": 5, **dict.fromkeys((*OFFLINE, "sft", "spin"), -3)},
        lambda s: "answers beyond the data are needed, and only methods that sample can find them",
        _facts(
            f"{GUIDE}: DPO has no exploration, PPO for exploration",
            f"{CHAPTER}: DPO cannot generate new responses",
        ),
    ),
    Rule(
        "no exploration",
        lambda s: s.exploration == "no",
        "the data hold answers that are good enough",
        dict.fromkeys(OFFLINE, 3),
        lambda s: "the data hold answers that are good enough: nothing has to be sampled",
        f"{GUIDE}, Choosing the right method: DPO for speed, simplicity and low cost",
    ),
    Rule(
        "long reasoning",
        lambda s: s.reasoning == "yes" and bool(s.verifier or s.reward_model),
        "answers are long reasoning; a verifier or a reward model",
        {"dapo": 4, "cispo": 2, "gspo": 1},
        lambda s: "answers are long: token-level loss, a soft limit of length, groups that differ",
        _facts(
            "Yu et al., 2025 (DAPO): 30 with naive GRPO, 50 with DAPO",
            f"{CHAPTER}: GRPO for reasoning",
        ),
    ),
    Rule(
        "mixture of experts",
        lambda s: s.experts and samples_scored(s),
        "the model is a mixture of experts; samples are scored",
        {"gspo": 5},
        lambda s: "the model is a mixture of experts, whose routing makes token ratios jump",
        "Zheng et al., 2025 (GSPO), section 5",
    ),
    Rule(
        "many steps a rollout",
        lambda s: s.reuse == "yes" and samples_scored(s),
        "sampling is dear: many steps on each rollout; samples are scored",
        {"cispo": 5},
        lambda s: "many steps are taken on a rollout, and a clip would silence tokens after the first",
        "MiniMax-M1, 2025",
    ),
    Rule(
        "long horizon",
        lambda s: s.long_horizon == "yes",
        "a token's worth shows much later (tools, many turns)",
        {"grpo": 3, "dr-grpo": 3, "rloo": 3, "ppo": 3, "dpo": -1},
        lambda s: "what a token is worth shows much later, which the rewards of whole samples capture",
        _facts(
            f"{GUIDE}, Operational considerations: PPO and GRPO better capture long-horizon rewards",
            f"{GUIDE}, PPO: handles long-horizon credit where rewards are sparse",
        ),
    ),
    Rule(
        "pairs",
        lambda s: s.comparisons >= TOO_FEW and not s.lists,
        f"{TOO_FEW} comparisons or more, fewer than a fifth of them of several answers",
        {"dpo": 6, "ipo": 4, "simpo": 3, "orpo": 3, "kto": 2},
        lambda s: f"{s.comparisons:,} pairs, each of two answers and a choice",
        _facts(
            f"{GUIDE} and {CHAPTER}: DPO for existing pairs",
            f"{NEWSROOM}: DPO 7.77, IPO 7.70, SimPO 7.22, ORPO 7.00",
        ),
    ),
    Rule(
        "rankings",
        lambda s: s.comparisons >= TOO_FEW and s.lists,
        f"{TOO_FEW} comparisons or more, a fifth or more of them of several answers",
        {"rank": 7, "dpo": 5, "ipo": 3, "simpo": 2, "orpo": 2, "kto": 1},
        lambda s: f"{s.count('rankings', 'ratings'):,} orders of several answers, each read whole",
        f"Rafailov et al., 2023, appendix A.3; {NEWSROOM}: rankings 7.94 [7.88, 8.01], choices 7.77 "
        "[7.71, 7.83]",
    ),
    Rule(
        "thumbs",
        lambda s: s.both_thumbs >= TOO_FEW,
        f"{TOO_FEW} thumbs or more, some up and some down",
        {"kto": 6, "dpo": 2},
        lambda s: f"{s.count('thumbs'):,} thumbs, which KTO reads one at a time",
        f"Ethayarajh et al., 2024; {CHAPTER}: KTO when pairwise data is unavailable",
    ),
    Rule(
        "mostly thumbs",
        lambda s: s.comparisons > 0 and s.both_thumbs >= 5 * s.comparisons,
        "five times as many thumbs as comparisons",
        {"kto": 2},
        lambda s: f"{s.count('thumbs'):,} thumbs against {s.comparisons:,} comparisons",
        "our judgement: the bulk of the feedback decides",
    ),
    Rule(
        "several kinds",
        lambda s: len(kinds_of(s)) > 1,
        "two or more of comparisons, thumbs, demonstrations",
        {"mixed": 3},
        lambda s: f"there are {' and '.join(kinds_of(s))}, which one run can read together",
        f"{GUIDE}, Preliminaries: allow/deny labels mix with pairs",
    ),
    Rule(
        "only together enough",
        lambda s: not preferences(s) and s.comparisons + s.both_thumbs >= TOO_FEW,
        f"comparisons and thumbs reach {TOO_FEW} only together",
        {"mixed": 5},
        lambda s: "comparisons and thumbs are enough only together",
        "our judgement, by the size of what must be held out",
    ),
    Rule(
        "demonstrations",
        lambda s: (
            s.count("demonstrations") > 0 and s.tuned != "these" and not preferences(s) and not s.scorer
        ),
        "demonstrations that the model has not learned yet, and nothing that says which answer is better",
        {"sft": 5, "spin": 2},
        lambda s: f"{s.count('demonstrations'):,} demonstrations to imitate",
        f"{NEWSROOM}: SFT on better demonstrations 7.77, SPIN on the same 7.46",
    ),
    Rule(
        "demonstrations learned",
        lambda s: s.count("demonstrations") > 0 and s.tuned == "these",
        "the model was tuned on these demonstrations",
        {"spin": 5, "sft": 1},
        lambda s: (
            "the model has been tuned on these demonstrations; playing against itself may get more of them"
        ),
        "Chen et al., 2024 (SPIN): gains over the SFT model on its own data",
    ),
    Rule(
        "chosen answers",
        lambda s: s.imitable > s.count("demonstrations") and not preferences(s) and not s.scorer,
        f"fewer than {TOO_FEW} comparisons or thumbs, and no scorer",
        {"sft": 2},
        lambda s: "the better answers can be imitated while more is collected",
        f"our judgement; {TOO_FEW} is twice the {HELD_OUT} held-out comparisons that tell 60 % from a coin",
    ),
    Rule(
        "noisy labels",
        lambda s: s.noisy == "yes",
        "labels are noisy",
        {"kto": 4, "dpo": 1, "ipo": 1},
        lambda s: (
            "labels are noisy: DPO gets a loss that expects it"
            if s.flips is None
            else f"about {s.wrong} of the labels are wrong: DPO gets a loss that expects it"
        ),
        _facts(
            f"{CHAPTER}: DPO can overfit to annotation noise",
            "Chowdhury et al., 2024 (robust DPO), section 3.1",
            "Ethayarajh et al., 2024: KTO leaves what looks mislabelled alone",
        ),
    ),
    Rule(
        "few and clean pairs",
        lambda s: s.noisy == "no" and not s.lists and TOO_FEW <= s.comparisons < GUIDE_FEW,
        f"labels are clean, and fewer than {GUIDE_FEW:,} pairs",
        {"ipo": 1},
        lambda s: "labels always agree and pairs are few: DPO's margin could grow without end, IPO's stops",
        f"Azar et al., 2023 (IPO), on deterministic preferences; {NEWSROOM}: DPO 7.77, IPO 7.70",
    ),
    Rule(
        "longer is better",
        lambda s: s.comparisons >= TOO_FEW and (s.longer or 0) >= LONGER and s.keep_short != "yes",
        "the better answer is the longer one in 65 % of comparisons or more, and nothing is said of length",
        {"simpo": 2},
        lambda s: (
            f"the better answer is the longer in {s.longer_share}: a mean a token wins nothing by length"
        ),
        f"Meng et al., 2024 (SimPO): the length-normalised reward; {NEWSROOM}: DPO 7.77, SimPO 7.22",
    ),
    Rule(
        "keep answers short",
        lambda s: s.keep_short == "yes",
        "answers must not grow longer",
        {"simpo": 2, "dr-grpo": 3},
        lambda s: "answers must not grow longer than they need to be",
        _facts(
            "Liu et al., 2025 (Dr. GRPO): dividing by length makes long wrong answers cheaper",
            "Meng et al., 2024 (SimPO): the length-normalised reward",
        ),
    ),
    Rule(
        "a base model, pairs alone",
        lambda s: s.tuned == "no" and s.comparisons >= TOO_FEW and not s.count("demonstrations"),
        "the model has had no SFT, and there are comparisons but no demonstrations",
        {"orpo": 2},
        lambda s: "the model has had no SFT, and ORPO does SFT and preferences in one stage",
        f"Hong et al., 2024 (ORPO); {CHAPTER}: ORPO combines SFT and alignment; {NEWSROOM}: DPO 7.77, "
        "ORPO 7.00",
    ),
)

LONGER = 0.65
"""Share of better answers that are the longer ones, from which length explains too much; our judgement."""

PPO_MEMORY = -3
"""Points of PPO where it does not fit into the memory and another method that samples does."""
