"""The cases of methods that learn from given rows: pairs, thumbs, demonstrations."""

from __future__ import annotations

from typing import Any

from benchmarks.parity.case import Case, Options


def _pairs(name: str, ours: Options, peer: Options, method: str = "dpo", **more: Any) -> Case:
    """A method on pairs beside DPOTrainer, unless another trainer is named."""
    return Case(name, method, {method: ours}, more.pop("trainer", "dpo"), peer, **more)


_FREE = {"reference_free": True}
_CPO = {"trainer": "cpo"}
PAIR_CASES = [
    _pairs("dpo", {"beta": 0.1}, {"beta": 0.1}),
    _pairs(
        "dpo, length-normalised", {"beta": 2.0, "logps": "mean"}, {"beta": 2.0, "loss_type": ["sigmoid_norm"]}
    ),
    _pairs(
        "dpo, conservative, no reference",
        {"beta": 0.1, "label_smoothing": 0.1, **_FREE},
        {"beta": 0.1, "label_smoothing": 0.1, "loss_type": "sigmoid", "cpo_alpha": 0.0},
        **_CPO,
    ),
    _pairs(
        "dpo, robust",
        {"beta": 0.1, "loss": "robust", "label_smoothing": 0.1},
        {"beta": 0.1, "loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    _pairs("dpo, hinge", {"beta": 0.1, "loss": "hinge"}, {"beta": 0.1, "loss_type": ["hinge"]}),
    _pairs(
        "dpo, exo",
        {"beta": 0.1, "loss": "exo", "label_smoothing": 1e-3},
        {"beta": 0.1, "loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    ),
    _pairs("dpo, nca", {"beta": 0.1, "loss": "nca"}, {"beta": 0.1, "loss_type": ["nca_pair"]}, lr=5e-4),
    _pairs("dpo, apo zero", {"beta": 0.1, "loss": "apo_zero"}, {"beta": 0.1, "loss_type": ["apo_zero"]}),
    _pairs("dpo, apo down", {"beta": 0.1, "loss": "apo_down"}, {"beta": 0.1, "loss_type": ["apo_down"]}),
    _pairs("dpo, sppo", {"beta": 0.1, "loss": "sppo"}, {"beta": 0.1, "loss_type": ["sppo_hard"]}),
    _pairs(
        "dpo, with likelihood (RPO)",
        {"beta": 0.1, "nll_weight": 0.5, "nll_reduction": "token_mean"},
        {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    _pairs(
        "dpo, with likelihood a response",
        {"beta": 0.1, "nll_weight": 0.5},
        {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        differs="our default is each response's mean, as in RPO's paper; TRL's that of the batch's tokens",
    ),
    _pairs("ipo", {"beta": 0.1, "logps": "mean"}, {"beta": 0.1, "loss_type": ["ipo"]}, "ipo"),
    _pairs(
        "ipo, as published",
        {"beta": 0.1},
        {"beta": 0.1, "loss_type": ["ipo"]},
        "ipo",
        differs="the paper's sums over tokens; TRL divides by each response's number of tokens",
    ),
    _pairs(
        "simpo",
        {"beta": 2.0, "gamma": 1.0},
        {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo", "cpo_alpha": 0.0},
        "simpo",
        **_CPO,
    ),
    _pairs(
        "cpo",
        {"beta": 0.1, "nll_weight": 1.0, "nll_reduction": "token_mean", **_FREE},
        {"beta": 0.1, "loss_type": "sigmoid", "cpo_alpha": 1.0},
        **_CPO,
    ),
    _pairs(
        "slic, no reference",
        {"beta": 0.1, "loss": "hinge", **_FREE},
        {"beta": 0.1, "loss_type": "hinge", "cpo_alpha": 0.0},
        **_CPO,
    ),
    _pairs(
        "orpo, prompts of one token",
        {"beta": 0.1, "nll_reduction": "token_mean"},
        {"beta": 0.1},
        "orpo",
        trainer="orpo",
        rows="short",
    ),
    _pairs(
        "orpo",
        {"beta": 0.1},
        {"beta": 0.1},
        "orpo",
        trainer="orpo",
        differs="TRL's likelihood counts the prompt's tokens too, and is a mean over the batch's tokens",
    ),
]

_THUMBS = {"rows": "thumbs", "reversed_rows": True, "trainer": "kto"}
OTHER_CASES = [
    _pairs("kto", {"beta": 0.1}, {"beta": 0.1}, "kto", **_THUMBS),
    _pairs(
        "kto, weights",
        {"beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.33},
        {"beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.33},
        "kto",
        **_THUMBS,
    ),
    _pairs(
        "kto, no baseline (APO zero)",
        {"beta": 0.1, "kl": "none"},
        {"beta": 0.1, "loss_type": "apo_zero_unpaired"},
        "kto",
        **_THUMBS,
    ),
    _pairs(
        "kto, rows in one order",
        {"beta": 0.1},
        {"beta": 0.1},
        "kto",
        **_THUMBS | {"reversed_rows": False},
        differs="the baseline gives a prompt the next row's response, as in the paper; TRL the one before's",
    ),
    Case("sft", "sft", {}, "sft", {}, rows="demonstrations"),
    Case(
        "sft, prompts too",
        "sft",
        {"sft": {"loss_on": "all"}},
        "sft",
        {"completion_only_loss": False},
        rows="demonstrations",
    ),
    Case("reward", "reward", {"reward_model": {"centre": 0.0}}, "reward", {}, model="reward"),
    Case(
        "reward, centred",
        "reward",
        {"reward_model": {"centre": 0.01}},
        "reward",
        {"center_rewards_coefficient": 0.01},
        model="reward",
    ),
    Case(
        "reward, margins",
        "reward",
        {"reward_model": {"centre": 0.0, "margin_column": "margin"}},
        "reward-margin",
        {},
        model="reward",
    ),
]
