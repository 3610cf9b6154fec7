"""The cases of methods that sample: the group-relative family and PPO, on fixed rollouts."""

from __future__ import annotations

from typing import Any

from benchmarks.parity.case import ONLINE, PPO, Case, Options


def _sampled(name: str, method: str, ours: Options, peer: Options, **more: Any) -> Case:
    """A group-relative method: several passes over each rollout, so that ratios move and clips act."""
    minibatches = more.get("minibatches", 1)
    options = {"group_size": 4, "epochs_per_rollout": more.get("epochs", 5), **ours}
    if minibatches > 1:
        options["rollout_groups"] = 4 * minibatches
    sections = {method.replace("-", "_"): options, **more.pop("sections", {})}
    return Case(
        name,
        method,
        sections,
        more.pop("trainer", "grpo"),
        peer,
        rows="prompts",
        rollouts="mixed",
        module=ONLINE,
        **more,
    )


def _ppo(name: str, ours: Options, peer: Options, **more: Any) -> Case:
    """PPO: one response to a prompt. TRL's clips no gradient, and has one optimiser for both models."""
    return Case(
        name,
        "ppo",
        {
            "train": {"batch_groups": 8, "grad_clip": 0.0},
            "critic": {"path": "{files}/reward"},
            "ppo": {"epochs_per_rollout": 5, "missing_end_penalty": 0.0, **ours},
        },
        "ppo",
        {"vf_coef": 1.0, **peer},
        rows="prompts",
        rollouts=more.pop("rollouts", "even"),
        module=PPO,
        environment="trl-1.12.0",
        **more,
    )


_NONE = {"beta": 0.0, "scale": "std_unbiased"}
_OFF = {"beta": 0.0}
_CLIPS = {"epsilon": 0.2, "epsilon_high": 0.28}
_DAPO = {"dynamic_sampling": False, "overlong_buffer": 0, "scale": "std_unbiased"}
SAMPLED_CASES = [
    _sampled("grpo", "grpo", _NONE, {"loss_type": "grpo", **_OFF}),
    _sampled(
        "grpo, population deviation",
        "grpo",
        {"beta": 0.0},
        {"loss_type": "grpo", **_OFF},
        differs="the group's deviation divides by G, TRL's by G − 1 (scale = std_unbiased)",
    ),
    _sampled(
        "grpo, KL in the loss",
        "grpo",
        {"scale": "std_unbiased", "beta": 0.1},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    _sampled(
        "grpo, KL as TRL has it",
        "grpo",
        {"scale": "std_unbiased", "beta": 0.1},
        {"loss_type": "grpo", "beta": 0.1},
        differs="TRL 1.16 multiplies the k3 estimate by the ratio, as DeepSeek-V3.2 (kl_unbiased = true)",
    ),
    _sampled(
        "grpo, unbiased KL",
        "grpo",
        {"scale": "std_unbiased", "beta": 0.1, "kl_unbiased": True},
        {"loss_type": "grpo", "beta": 0.1},
    ),
    _sampled(
        "grpo, temperature 0.7",
        "grpo",
        _NONE,
        {"loss_type": "grpo", "temperature": 0.7, **_OFF},
        sections={"sampling": {"temperature": 0.7}},
    ),
    _sampled("grpo, 2 steps a pass", "grpo", _NONE, {"loss_type": "grpo", **_OFF}, minibatches=2, epochs=1),
    _sampled(
        "grpo, upper clip 0.28", "grpo", {**_NONE, "clip_high": 0.28}, {"loss_type": "grpo", **_CLIPS, **_OFF}
    ),
    _sampled(
        "grpo, dual clip", "grpo", {**_NONE, "dual_clip": 1.3}, {"loss_type": "grpo", "delta": 1.3, **_OFF}
    ),
    _sampled("grpo, bnpo", "grpo", {**_NONE, "reduction": "token_mean"}, {"loss_type": "bnpo", **_OFF}),
    _sampled(
        "grpo, bnpo with entropy",
        "grpo",
        {**_NONE, "reduction": "token_mean", "entropy_bonus": 0.01},
        {"loss_type": "bnpo", "entropy_coef": 0.01, **_OFF},
    ),
    _sampled(
        "grpo, scaled by the batch",
        "grpo",
        {"beta": 0.0, "scale": "batch_reward_std"},
        {"loss_type": "grpo", "scale_rewards": "batch", **_OFF},
        differs="the batch's deviation divides by n, TRL's by n − 1 (scale = batch_reward_std_unbiased)",
    ),
    _sampled(
        "grpo, scaled by the batch, unbiased",
        "grpo",
        {"beta": 0.0, "scale": "batch_reward_std_unbiased"},
        {"loss_type": "grpo", "scale_rewards": "batch", **_OFF},
    ),
    _sampled("dr-grpo", "dr-grpo", {}, {"loss_type": "dr_grpo", "scale_rewards": "none", **_OFF}),
    _sampled("dapo", "dapo", _DAPO, {"loss_type": "dapo", **_CLIPS, **_OFF}),
    _sampled(
        "dapo, overlong",
        "dapo",
        {**_DAPO, "overlong_buffer": 8},
        {"loss_type": "dapo", **_CLIPS, **_OFF, "soft_overlong": 8},
    ),
    _sampled(
        "dapo, cut-off masked",
        "dapo",
        {**_DAPO, "mask_cut_off": True},
        {"loss_type": "dapo", "mask_truncated_completions": True, **_CLIPS, **_OFF},
    ),
    _sampled(
        "dapo, 2 steps a pass",
        "dapo",
        _DAPO,
        {"loss_type": "dapo", **_CLIPS, **_OFF},
        minibatches=2,
        epochs=1,
        differs="each step is divided by its own tokens; TRL divides by the rollout's mean over its steps",
    ),
    _sampled(
        "grpo, cut-off masked",
        "grpo",
        {**_NONE, "mask_cut_off": True},
        {"loss_type": "grpo", "mask_truncated_completions": True, **_OFF},
        differs="the mean is over the responses that are left; TRL counts the masked ones as zeros",
    ),
    # Ten times the paper's clips, which leave a loss of 2e-4 of terms of size 1: too little of fp32's digits.
    _sampled(
        "gspo",
        "gspo",
        {"scale": "std_unbiased", "clip_low": 3e-3, "clip_high": 4e-3},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-3,
            "epsilon_high": 4e-3,
            **_OFF,
        },
    ),
    _sampled(
        "gspo, wide clip",
        "gspo",
        {"scale": "std_unbiased", "clip_low": 0.2, "clip_high": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", **_OFF},
    ),
    _sampled(
        "luspo",
        "gspo",
        {"scale": "std_unbiased", "clip_low": 0.2, "clip_high": 0.2, "reduction": "response_sum"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", **_OFF},
    ),
    _sampled(
        "cispo",
        "cispo",
        {"scale": "std_unbiased", "clip_high": 0.1},
        {"loss_type": "cispo", "epsilon_high": 1.1, **_OFF},
    ),
    _sampled(
        "rloo",
        "rloo",
        {"beta": 0.05, "surrogate": "clip"},
        {"beta": 0.05},
        trainer="rloo",
        # At 3e-4 one response's ratio comes to 1.2000006 on our side, past the clip, and to less on TRL's.
        lr=2e-4,
    ),
    _sampled(
        "rloo, not clipped",
        "rloo",
        {"beta": 0.05},
        {"beta": 0.05, "epsilon": 0.999999, "epsilon_high": 1e9},
        trainer="rloo",
    ),
]

PPO_CASES = [
    _ppo("ppo", {"beta": 0.05}, {"kl_coef": 0.05}),
    _ppo("ppo, λ 1", {"beta": 0.05, "lam": 1.0}, {"kl_coef": 0.05, "lam": 1.0}),
    _ppo(
        "ppo, γ 0.9, λ 0.5",
        {"beta": 0.2, "gamma": 0.9, "lam": 0.5},
        {"kl_coef": 0.2, "gamma": 0.9, "lam": 0.5},
    ),
    _ppo("ppo, k3", {"beta": 0.2, "kl_estimator": "k3"}, {"kl_coef": 0.2, "kl_estimator": "k3"}),
    _ppo(
        "ppo, rewards whitened",
        {"beta": 0.05, "whiten_rewards": True},
        {"kl_coef": 0.05, "whiten_rewards": True},
    ),
    _ppo(
        "ppo, penalty without an end",
        {"beta": 0.05, "missing_end_penalty": 1.0},
        {"kl_coef": 0.05, "missing_eos_penalty": 1.0},
    ),
    _ppo(
        "ppo, unequal lengths",
        {"beta": 0.05},
        {"kl_coef": 0.05},
        rollouts="mixed",
        differs="TRL's score stands one place behind the end token, whose value its critic learns too",
    ),
]
