"""When to change from the method that is chosen to the runner-up: what its own pilot would have to show.

Keyed by both methods, the chosen first: a name, or a family of names. Metrics are those that the chosen
method logs (``WATCH``); a test holds every text to that.
"""

from __future__ import annotations

from trimtab.planning.choosing.needs import ONLINE, PAIRWISE, RELATIVE
from trimtab.planning.choosing.situation import Situation

FAMILIES = {
    **dict.fromkeys((*PAIRWISE, "rank"), "preference"),
    **dict.fromkeys(RELATIVE, "relative"),
    "ppo": "critic",
    "kto": "labels",
    "mixed": "labels",
    "sft": "imitation",
    "spin": "imitation",
}
"""Method → family; a method without one is its own."""

ACCURACY = {
    "simpo": "eval_accuracy_per_token",
    "orpo": "eval_accuracy_per_token",
    "kto": "eval_label_auc",
    "mixed": "eval_label_auc",
    "sft": "eval_loss",
    "spin": "eval_loss",
    "online-dpo": "accuracy",
    "reward": "eval_accuracy_low",
    "process-reward": "eval_first_error_f1",
    **dict.fromkeys((*RELATIVE, "ppo"), "reward_mean"),
}
"""The metric of each method that shows whether it learns; of the others ``eval_accuracy_implicit_reward``."""

SWITCH: dict[tuple[str, str], str] = {
    # --- choices that are given
    (
        "preference",
        "ipo",
    ): "{accuracy} falls while reward_margin goes on rising: the margin has no end there, and IPO's has",
    (
        "ipo",
        "preference",
    ): "reward_margin and {accuracy} stand still together: IPO's target holds the margin back",
    (
        "preference",
        "simpo",
    ): "answers in trimtab eval are much longer than response_tokens, the data's, with logps = mean too",
    (
        "preference",
        "orpo",
    ): "{accuracy} stands still because answers are unlike the model's own: ORPO learns them as well",
    ("orpo", "simpo"): "log_odds_ratio stands still while nll falls: it learns the likelihood alone",
    ("preference", "kto"): "{accuracy} stands still while reward_margin rises, as with labels that are wrong",
    ("preference", "rank"): "most prompts have three answers or more, and {accuracy} stands still",
    ("rank", "preference"): "{accuracy} stands still, or most of the orders are of two answers",
    (
        "preference",
        "relative",
    ): "{accuracy} no longer rises and what scores answers still finds faults in trimtab eval",
    (
        "preference",
        "critic",
    ): "{accuracy} no longer rises and what scores answers still finds faults in trimtab eval",
    (
        "preference",
        "online-dpo",
    ): "{accuracy} no longer rises and the judge still finds faults in trimtab eval",
    ("labels", "preference"): "{accuracy} stands still, while the same prompts have better and worse answers",
    ("mixed", "imitation"): "pairs/accuracy and {accuracy} stay at 0.5: imitate the better answers meanwhile",
    ("kto", "imitation"): "{accuracy} stays at 0.5: imitate what was thumbed up meanwhile",
    ("preference", "imitation"): "{accuracy} stays at 0.5: imitate the better answers meanwhile",
    # --- demonstrations
    ("sft", "spin"): "{accuracy} no longer falls: SFT has converged on these demonstrations",
    ("spin", "sft"): "{accuracy} rises from the first iteration on, or copies is high",
    # --- samples that are scored
    ("online-dpo", "grpo"): "ties is high, or the judge can rank four answers or more at once",
    ("online-dpo", "preference"): "accuracy stays at 0.5, or asking the judge takes longer than is worth it",
    ("relative", "online-dpo"): "reward_mean stands still, and a judge tells two answers apart more surely",
    ("relative", "dr-grpo"): "response_tokens grows while reward_mean does not: wrong answers get longer",
    ("grpo", "dapo"): "cut_off is high, or groups_without_contrast stays above 0.5",
    (
        "dr-grpo",
        "grpo",
    ): "reward_mean hardly moves: scores within a group differ little, and GRPO scales them",
    (
        "dapo",
        "grpo",
    ): "refilled_groups grows as fast as groups are learned from: GRPO samples each group once",
    ("relative", "gspo"): "kl jumps: a ratio of whole answers jumps less than those of tokens",
    ("gspo", "grpo"): "reward_mean and kl stand still: too many answers are clipped whole",
    ("relative", "cispo"): "entropy collapses with several steps a rollout: CISPO silences no token",
    ("cispo", "grpo"): "kl jumps: CISPO's weights go up to 5, and GRPO's clip stops before that",
    ("rloo", "grpo"): "reward_mean hardly moves: scores within a group differ little, and GRPO scales them",
    ("grpo", "rloo"): "kl jumps on groups whose scores hardly differ: GRPO blows those up, RLOO does not",
    (
        "relative",
        "critic",
    ): "reward_mean stands still and response_tokens is large: a critic says which tokens earned it",
    (
        "critic",
        "relative",
    ): "explained_variance stays below 0: that critic is worse than none, and {to} has none",
    ("relative", "preference"): "reward_mean stands still, or sampling takes too long: {to} needs none",
    ("critic", "preference"): "reward_mean stands still, or sampling takes too long: {to} needs none",
    # --- reward models
    ("reward", "process-reward"): "{accuracy} stays at 0.5, and it matters where an answer goes wrong",
    ("process-reward", "reward"): "{accuracy} stays low: whole answers are easier to compare than steps",
}
"""(chosen, runner-up) → what its pilot would have to show."""


def keys_of(method: str) -> tuple[str, ...]:
    """Names under which a method stands in :data:`SWITCH`, the narrowest first."""
    return tuple(dict.fromkeys((method, FAMILIES.get(method, method))))


def switch(method: str, runner_up: str, s: Situation) -> str:
    """When to change, for the reader of the method's pilot."""
    accuracy = ACCURACY.get(method, "eval_accuracy_implicit_reward")
    if method == "dpo" and not s.comparisons:
        return f"{accuracy} stays at 0.5: random negatives teach what is off the subject"
    for first in keys_of(method):
        for second in keys_of(runner_up):
            if text := SWITCH.get((first, second)):
                return text.format(accuracy=accuracy, to=runner_up)
    ahead = ", and its values were tried too (trimtab sweep)" if method in ONLINE else ""
    return f"{accuracy} stands still in the pilot{ahead}: run that of {runner_up} beside it"
