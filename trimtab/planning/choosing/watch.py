"""What to look at while a method runs: its own metrics, and what to see in each."""

from __future__ import annotations

from trimtab.planning.choosing.needs import PAIRWISE, RELATIVE

Watched = tuple[str, str]
"""A metric, as the run logs it, and what to see in it."""

PREFERENCE: tuple[Watched, ...] = (
    ("eval_accuracy_implicit_reward", "rises above 0.5, with its interval"),
    ("reward_margin", "rises; alone, without held-out accuracy, it is learning by heart"),
    ("chosen_reward", "may fall below 0; many nats down while accuracy stands still is too far"),
    ("response_tokens", "the data's lengths: compare them with the answers' in trimtab eval"),
)
SAMPLED: tuple[Watched, ...] = (
    ("reward_mean", "rises: the curve to watch"),
    ("groups_without_contrast", "below 0.5, or prompts are too easy or too hard"),
    ("kl", "grows slowly from 0; a jump means that the policy has left"),
    ("entropy", "falls slowly; towards 0 all answers become one"),
    ("response_tokens", "beside the reward: length is the commonest way to win it"),
    ("cut_off", "near 0, or raise sampling.max_new_tokens"),
)
WATCH: dict[str, tuple[Watched, ...]] = {
    **dict.fromkeys((*PAIRWISE, "rank"), PREFERENCE),
    "simpo": (("eval_accuracy_per_token", "rises: its reward is a mean a token"), *PREFERENCE[1:]),
    "orpo": (
        ("log_odds_ratio", "rises from about 0"),
        ("nll", "falls as in SFT"),
        ("eval_accuracy_per_token", "rises: the same on held-out pairs"),
        ("reward_margin", "rises"),
    ),
    "kto": (
        ("eval_label_auc", "rises above 0.5: a good answer has gained more than a bad one"),
        ("reward_margin", "rises"),
        ("kl", "a steady rise is the policy leaving the reference everywhere"),
    ),
    "mixed": (
        ("pairs/accuracy", "rises from 0.5"),
        ("labels/kl", "a steady rise is the policy leaving the reference everywhere"),
        ("eval_label_auc", "rises above 0.5"),
    ),
    "sft": (("eval_loss", "falls with loss; once it rises, rows are learned by heart"),),
    "spin": (
        ("eval_loss", "falls, and is the first to say that steps are too large"),
        ("accuracy", "back at 0.5 with each iteration"),
        ("copies", "near 0: copies teach nothing"),
        ("cut_off", "near 0, or raise sampling.max_new_tokens"),
    ),
    "online-dpo": (
        ("accuracy", "rises from 0.5, and ends below the judge's own consistency"),
        ("ties", "well below 1: at 1 nothing is learned"),
        ("chosen_tokens", "beside rejected_tokens: far apart, the judge likes length"),
        ("cut_off", "near 0, or raise sampling.max_new_tokens"),
    ),
    **dict.fromkeys(RELATIVE, SAMPLED),
    "dapo": (
        *SAMPLED[:1],
        (
            "refilled_groups",
            "grows slowly: as fast as groups are learned from, half the prompts teach nothing",
        ),
        ("overlong_punishment", "near 0; below -0.1 raise sampling.max_new_tokens"),
        *SAMPLED[2:],
    ),
    "ppo": (
        *SAMPLED[:1],
        ("explained_variance", "rises from 0; below 0 the critic is worse than a constant"),
        *SAMPLED[2:],
    ),
    "reward": (
        ("eval_accuracy_low", "above 0.5: the lower end of the held-out accuracy"),
        ("eval_length_correlation", "near 0; near 1 it measures length"),
        ("eval_loss", "falls; once it rises, rows are learned by heart"),
    ),
    "process-reward": (
        ("eval_first_error_f1", "the curve to watch where most answers are right"),
        ("eval_step_accuracy", "above the share of right steps"),
        ("eval_loss", "falls"),
    ),
}
"""What to look at, by method. A test holds the names to the methods' pages."""
