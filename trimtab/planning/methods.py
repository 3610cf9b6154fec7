"""What each method needs, as a card: its models, its data, its phases, how data flow through it.

A test holds every card to the method itself: names, defaults and the models that a run really keeps.
"""

from __future__ import annotations

import difflib

from trimtab.errors import InputError
from trimtab.planning import flows
from trimtab.planning.method_card import DEFAULTS, MOST_ROWS, Card, Reference
from trimtab.planning.result import PhaseName

__all__ = ["CARDS", "DEFAULTS", "MOST_ROWS", "Card", "Reference", "find_card"]

GIVEN: tuple[PhaseName, ...] = ("loading", "training", "update")
ANCHORED: tuple[PhaseName, ...] = ("loading", "scoring", "training", "update")
SAMPLED: tuple[PhaseName, ...] = ("loading", "sampling", "scoring", "training", "update")
REWARDS = "a function, a verifier, a reward model or a judge, on what was sampled"
ALONE = ("policy",)
BESIDE = ("policy", "reference")
SCORED = ("policy", "reference", "reward model")


def _pairs(name: str, title: str, best_for: str, paper: str, *, anchored: bool, loss: str) -> Card:
    return Card(
        name=name,
        title=title,
        rollouts=False,
        feedback="pairs: a chosen and a rejected response",
        reward_source="none: the loss reads the pairs",
        reference="once" if anchored else "none",
        responses=2,
        models_in_memory=1,
        models_usual=2 if anchored else 1,
        best_for=best_for,
        roles=BESIDE if anchored else ALONE,
        phases=ANCHORED if anchored else GIVEN,
        flow=flows.pair_flow(anchored, loss),
        paper=paper,
    )


def _relative(name: str, title: str, best_for: str, paper: str, *, loss: str, responses: int = 8) -> Card:
    return Card(
        name=name,
        title=title,
        rollouts=True,
        feedback="prompts",
        reward_source=REWARDS,
        reference="kept",
        responses=responses,
        responses_option=f"{name.replace('-', '_')}.group_size",
        models_in_memory=2,
        models_usual=3,
        best_for=best_for,
        roles=SCORED,
        phases=SAMPLED,
        flow=flows.relative_flow(loss),
        paper=paper,
        divisible=True,
        entropy=True,
    )


_ALL = (
    Card(
        name="sft",
        title="Supervised fine-tuning",
        rollouts=False,
        feedback="demonstrations",
        reward_source="none: the demonstrations",
        reference="none",
        responses=1,
        models_in_memory=1,
        models_usual=1,
        best_for="teaching a form or a domain from good answers; the start of the others",
        roles=ALONE,
        phases=GIVEN,
        flow=flows.demonstration_flow(),
        paper="Ouyang et al., 2022",
    ),
    Card(
        name="reward",
        title="Reward model",
        rollouts=False,
        feedback="pairs, rankings or ratings",
        reward_source="it becomes one",
        reference="none",
        responses=2,
        models_in_memory=1,
        models_usual=1,
        best_for="a reward for PPO, GRPO and their kin where no rule can judge; ranking answers",
        roles=ALONE,
        phases=GIVEN,
        flow=flows.score_flow(),
        paper="Christiano et al., 2017; Stiennon et al., 2020",
        scalar=True,
    ),
    Card(
        name="process-reward",
        title="Process reward model",
        rollouts=False,
        feedback="responses in labelled steps",
        reward_source="it becomes one",
        reference="none",
        responses=1,
        models_in_memory=1,
        models_usual=1,
        best_for="rewards for each step of a reasoning, where steps can be labelled",
        roles=ALONE,
        phases=GIVEN,
        flow=flows.step_flow(),
        paper="Lightman et al., 2023; Wang et al., 2024",
        scalar=True,
    ),
    _pairs(
        "dpo",
        "Direct Preference Optimization",
        "clean pairs and a modest budget: stable, and no sampling",
        "Rafailov et al., 2023",
        anchored=True,
        loss="−log σ(β·gap of log π/π_ref)",
    ),
    _pairs(
        "ipo",
        "Identity Preference Optimization",
        "pairs that were judged once or always alike: a finite target against overfitting",
        "Azar et al., 2023",
        anchored=True,
        loss="(gap of log π/π_ref − 1/2β)²",
    ),
    _pairs(
        "simpo",
        "Simple Preference Optimization",
        "pairs with little memory, and answers that should not grow long",
        "Meng et al., 2024",
        anchored=False,
        loss="−log σ(β·gap of mean log π − γ)",
    ),
    _pairs(
        "orpo",
        "Odds Ratio Preference Optimization",
        "a base model and pairs: fine-tuning and preference in one stage",
        "Hong et al., 2024",
        anchored=False,
        loss="−mean log π(chosen) − β·log σ(log odds ratio)",
    ),
    Card(
        name="kto",
        title="Kahneman-Tversky Optimization",
        rollouts=False,
        feedback="responses with a thumb up or down",
        reward_source="none: the loss reads the labels",
        reference="kept",
        responses=1,
        models_in_memory=2,
        models_usual=2,
        best_for="thumbs from production, unpaired or unbalanced",
        roles=BESIDE,
        phases=ANCHORED,
        flow=flows.label_flow(),
        paper="Ethayarajh et al., 2024",
    ),
    Card(
        name="rank",
        title="Policy from rankings",
        rollouts=False,
        feedback="rankings or ratings of several responses",
        reward_source="none: the loss reads the ranking",
        reference="once",
        responses=4,
        models_in_memory=1,
        models_usual=2,
        best_for="ranked or rated lists, without a reward model between",
        roles=BESIDE,
        phases=ANCHORED,
        flow=flows.ranking_flow(),
        paper="Plackett, 1975; Rafailov et al., 2023",
    ),
    Card(
        name="mixed",
        title="Several kinds of feedback in one run",
        rollouts=False,
        feedback="pairs, labels and demonstrations, two kinds at least",
        reward_source="none: each loss reads its own feedback",
        reference="kept",
        responses=2,
        models_in_memory=2,
        models_usual=2,
        best_for="feedback of several kinds, none enough by itself",
        roles=BESIDE,
        phases=ANCHORED,
        flow=flows.mixed_flow(),
        paper="Rafailov et al., 2023; Ethayarajh et al., 2024",
    ),
    Card(
        name="spin",
        title="Self-Play Fine-Tuning",
        rollouts=True,
        feedback="demonstrations",
        reward_source="none: a demonstration beats the model's own answer",
        reference="once",
        responses=2,
        models_in_memory=1,
        models_usual=2,
        best_for="demonstrations alone, when plain fine-tuning has levelled off",
        roles=ALONE,
        phases=SAMPLED,
        flow=flows.self_play_flow(),
        paper="Chen et al., 2024",
    ),
    Card(
        name="online-dpo",
        title="Online DPO",
        rollouts=True,
        feedback="prompts",
        reward_source="a judge of pairs or a reward, on what was sampled",
        reference="kept",
        responses=2,
        responses_option="online_dpo.samples",
        models_in_memory=2,
        models_usual=3,
        best_for="a judge that can compare but not score, with fresh answers",
        roles=SCORED,
        phases=SAMPLED,
        flow=flows.online_pair_flow(),
        paper="Guo et al., 2024",
    ),
    Card(
        name="ppo",
        title="Proximal Policy Optimization",
        rollouts=True,
        feedback="prompts",
        reward_source=REWARDS,
        critic=True,
        reference="kept",
        responses=1,
        responses_option="ppo.samples",
        models_in_memory=3,
        models_usual=4,
        best_for="rich rewards, credit for each token, and memory for a critic",
        roles=("policy", "reference", "critic", "reward model"),
        phases=SAMPLED,
        flow=flows.actor_critic_flow(),
        paper="Schulman et al., 2017; Ziegler et al., 2019",
        divisible=True,
        entropy=True,
        epochs_per_rollout=4,
    ),
    _relative(
        "grpo",
        "Group Relative Policy Optimization",
        "answers that can be checked (mathematics, code), several to a prompt, without a critic",
        "Shao et al., 2024",
        loss="clipped ratio × advantage + β·KL",
    ),
    _relative(
        "dr-grpo",
        "GRPO done right",
        "as GRPO, where neither length nor difficulty must bend the gradient",
        "Liu et al., 2025",
        loss="clipped ratio × (reward − mean), over a constant length",
    ),
    _relative(
        "rloo",
        "REINFORCE Leave-One-Out",
        "few samples a prompt and an unbiased gradient",
        "Ahmadian et al., 2024",
        loss="ratio × (reward − mean of the others)",
        responses=4,
    ),
    _relative(
        "dapo",
        "Decoupled clip and dynamic sampling",
        "long reasoning, where many prompts are all right or all wrong",
        "Yu et al., 2025",
        loss="ratio with a higher upper clip × advantage, a mean over tokens",
        responses=16,
    ),
    _relative(
        "gspo",
        "Group Sequence Policy Optimization",
        "long answers and mixtures of experts: one ratio a response",
        "Zheng et al., 2025",
        loss="clipped ratio of the response × advantage",
    ),
    _relative(
        "cispo",
        "Clipped importance-weight policy optimization",
        "long reasoning, where rare tokens must go on teaching",
        "MiniMax, 2025",
        loss="clipped weight × advantage × log π",
    ),
)
CARDS: dict[str, Card] = {card.name: card for card in _ALL}
"""By name, in the order of the command line's help."""


def find_card(name: str) -> Card:
    """The method's card. Raises InputError that names the nearest, or all."""
    card = CARDS.get(name.replace("_", "-").lower())
    if card is None:
        near = difflib.get_close_matches(name.lower(), CARDS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(CARDS)}"
        raise InputError(f"unknown method {name!r}: {hint}")
    return card
