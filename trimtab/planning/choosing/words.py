"""What speaks against a method, when to prefer another, and where the sources disagree."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.planning.choosing.needs import OFFLINE, ONLINE, PAIRWISE, RELATIVE, learns_a_reward
from trimtab.planning.choosing.rules import CHAPTER, GUIDE, LONGER
from trimtab.planning.choosing.situation import GUIDE_FEW, GUIDE_REWARD, Situation
from trimtab.planning.choosing.switch import switch

When = Callable[[str, Situation], bool]

AGAINST: tuple[tuple[When, Callable[[Situation], str]], ...] = (
    (
        lambda m, s: m in OFFLINE,
        lambda s: (
            "it finds no answer that the data do not hold; garbage in, garbage out (the production guide)"
        ),
    ),
    (
        lambda m, s: m in (*PAIRWISE, "rank") and s.comparisons < GUIDE_FEW,
        lambda s: (
            f"{s.comparisons:,} comparisons are under the 10,000 to 50,000 that the production guide asks "
            "for; on 1,488 pairs our 4M model reached 62 % [57, 67] of held-out pairs and nothing "
            "that one could read"
        ),
    ),
    (
        lambda m, s: m == "dpo" and s.noisy == "unknown",
        lambda s: "it takes every label for the truth (the textbook chapter): noisy labels are learned too",
    ),
    (
        lambda m, s: m in ("dpo", "ipo", "orpo", "rank", "kto", "reward") and (s.longer or 0) >= LONGER,
        lambda s: (
            f"the better answer is the longer one in {s.longer_share} of comparisons: it will learn length"
        ),
    ),
    (
        lambda m, s: m == "simpo",
        lambda s: "nothing anchors it: in our newsroom SimPO reached 7.22, DPO 7.77 (one setting each)",
    ),
    (
        lambda m, s: m == "orpo",
        lambda s: (
            "in our newsroom ORPO reached 7.00 and DPO 7.77, though from an SFT model, where it is "
            "not at home"
        ),
    ),
    (
        lambda m, s: m == "mixed",
        lambda s: (
            "in our newsroom choices and thumbs together reached 7.28, choices alone 7.77, thumbs alone 7.67"
        ),
    ),
    (
        lambda m, s: m == "spin",
        lambda s: (
            "in our newsroom SFT on better demonstrations gained more (7.77 against 7.46), and on the very "
            "demonstrations of its SFT model SPIN showed no gain"
        ),
    ),
    (
        lambda m, s: m == "sft",
        lambda s: "it imitates, errors included, and never hears what is worse",
    ),
    (
        lambda m, s: m == "kto" and bool(s.comparisons),
        lambda s: "it splits pairs into single labels and forgets who was compared with whom",
    ),
    (
        lambda m, s: m in ONLINE,
        lambda s: "it samples, which is most of its time, and follows its reward wherever that leads",
    ),
    (
        lambda m, s: m in ONLINE and (bool(s.reward_model) or learns_a_reward(s) == "reward"),
        lambda s: (
            "a learned reward is over-optimised: at β 0.01 our proxy rose to 0.9 while gold fell below 4"
        ),
    ),
    (
        lambda m, s: m in ONLINE and learns_a_reward(s) == "reward" and s.comparisons < GUIDE_REWARD,
        lambda s: (
            f"the production guide trains its reward model on 50,000 to 200,000 pairs; here are "
            f"{s.comparisons or s.count('scores'):,}"
        ),
    ),
    (
        lambda m, s: m in ("dapo", "gspo", "cispo", "dr-grpo") and not s.reward_model,
        lambda s: "it has no KL: whatever the verifier does not check may be lost",
    ),
    (
        lambda m, s: m == "ppo",
        lambda s: "policy, critic, reference and reward model: the most models and the most to tune",
    ),
    (
        lambda m, s: m == "reward",
        lambda s: "it learns the annotators' faults too: on hh-rlhf ours learned length before anything else",
    ),
    (
        lambda m, s: m == "process-reward" or (m in ONLINE and learns_a_reward(s) == "process-reward"),
        lambda s: (
            "in our newsroom a policy that learned from labelled steps reached 6.85: they say nothing of "
            "what is left out"
        ),
    ),
)


def against(method: str, s: Situation) -> tuple[str, ...]:
    """What speaks against the method that is chosen."""
    return tuple(text(s) for when, text in AGAINST if when(method, s))


def prefer(method: str, runner_up: str | None, s: Situation) -> str:
    """When to prefer the runner-up to the method."""
    if runner_up is not None:
        return switch(method, runner_up, s)
    if s.goal == "reward":
        return "no other method makes such a reward model; if a policy is all you want, drop --goal reward"
    return "nothing else can learn from what there is; with --verifier, --judge or --reward-model GRPO could"


DISAGREEMENTS: tuple[tuple[When, str], ...] = (
    (
        lambda m, s: bool(s.judge) and not s.verifier and not s.reward_model,
        f"{GUIDE} has a judge rank groups and runs GRPO; Guo et al., 2024, have it compare two "
        "answers and run "
        "online DPO. Ours: online DPO 7.97 [7.87, 8.07] from a judge of pairs; GRPO on ranks was "
        "not measured.",
    ),
    (
        lambda m, s: m in ("rloo", "ppo", "grpo") and (bool(s.reward_model) or bool(learns_a_reward(s))),
        f"{GUIDE} and {CHAPTER} take PPO for a learned reward; Ahmadian et al., 2024, find RLOO as "
        "good or better "
        "without a critic. Ours: no difference shown at the better β of each.",
    ),
    (
        lambda m, s: s.lists and s.comparisons > 0,
        f"{GUIDE} takes GRPO for ranked lists; that is for lists of the policy's own answers, which "
        "a judge ranks "
        "while it trains. Lists that are given are what `rank` and reward models read.",
    ),
    (
        lambda m, s: bool(s.count("thumbs")) and not s.comparisons,
        f"{GUIDE} makes pairs of thumbs with random negatives and runs DPO; {CHAPTER} and the KTO "
        "paper read each "
        "thumb as it is. Random negatives teach what is off the subject more than what is bad.",
    ),
    (
        lambda m, s: m in PAIRWISE,
        f"{CHAPTER} takes SimPO or ORPO to save the reference's memory. Here DPO computes its "
        "reference once, before "
        "the first step: one model is in memory for all of them, so memory is no reason.",
    ),
    (
        lambda m, s: m in PAIRWISE and s.comparisons < GUIDE_REWARD,
        f"How many pairs: {GUIDE} says 50,000 to 300,000 in its starter, and 10,000 to 50,000 in its FAQ.",
    ),
    (
        lambda m, s: m == "ipo" and s.noisy == "no",
        f"{CHAPTER}: DPO works well when labels are clean and consistent. Azar et al., 2023: just "
        "then its margin "
        "grows without end. Ours: DPO 7.77 [7.71, 7.83], IPO 7.70 [7.64, 7.76].",
    ),
    (
        lambda m, s: m in RELATIVE and s.reasoning == "yes",
        f"{CHAPTER} takes GRPO for reasoning; Yu et al., 2025, go from 30 to 50 on AIME 2024 by "
        "four changes to it. "
        "Ours, with short answers: no difference shown between DAPO, GSPO, CISPO and Dr. GRPO.",
    ),
    (
        lambda m, s: m in ONLINE and bool(s.verifier),
        f"How many prompts: {GUIDE} wants 100,000 or more for PPO and GRPO; the papers learned from "
        "8,500 (Dr. GRPO) "
        "to 17,000 (DAPO).",
    ),
    (
        lambda m, s: s.long_horizon == "yes",
        f"Long horizons: {GUIDE} gives them to PPO's critic where it describes PPO, and to PPO and GRPO "
        "alike where it comes to tools. Here both get the same points, and the rest decides.",
    ),
    (
        lambda m, s: m == "dpo",
        f"{GUIDE} says that a higher β separates more strongly from the reference; it holds closer.",
    ),
)
