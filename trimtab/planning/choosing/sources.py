"""The values that ``trimtab choose`` starts a method with, each with its source; and what speaks against it.

A source is a paper with its section, an author's file, a library's default, or "ours" where the judgement
or the measurement is our own. The papers' values are those of recipes/papers, which says where each stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.planning.choosing.needs import OFFLINE, ONLINE, PAIRWISE, RELATIVE, learns_a_reward
from trimtab.planning.choosing.rules import CHAPTER, GUIDE
from trimtab.planning.choosing.situation import GUIDE_FEW, Situation


@dataclass(frozen=True, slots=True)
class Hyper:
    """One value to start with."""

    key: str
    """Dotted, as on the method's command line."""
    value: Any
    source: str


OURS = "ours"
DPO_B = "Rafailov et al., 2023, appendix B"
ONE_PASS = (
    f"{OURS}: one pass, as {DPO_B}'s code; a pair that is seen again has no minimum (docs/methods/dpo.md)"
)

LLAMA2 = "Touvron et al., 2023 (Llama 2), recipes/papers/reward-llama2.toml"
RLOO_GUARD = (
    f"{OURS}: what held for PPO and GRPO in docs/results.md, KL and reward over β; "
    "RLOO's run in The family used 0.1"
)
BALANCED = "Ethayarajh et al., 2024, section 4.2 (recipes/papers/kto.toml): weight × count within 1 to 4/3"

START: dict[str, tuple[Hyper, ...]] = {
    "sft": (
        Hyper("train.lr", 2e-5, f"{OURS}: what trimtab compare takes at 0.5 billion parameters"),
        Hyper("train.batch_groups", 16, f"{OURS}: the default of trimtab"),
        Hyper("train.epochs", 1.0, f"{OURS}: the default of trimtab"),
        Hyper("train.schedule", "linear", f"{OURS}: the default of trimtab"),
    ),
    "reward": (
        Hyper("train.lr", 1e-5, f"{LLAMA2} (TRL's default is 1e-4)"),
        Hyper("train.batch_groups", 64, f"{OURS} ({LLAMA2}: 512)"),
        Hyper("train.epochs", 1.0, LLAMA2),
        Hyper("train.schedule", "cosine", LLAMA2),
        Hyper("train.final_lr", 0.1, LLAMA2),
    ),
    "process-reward": (
        Hyper("train.lr", 1e-5, f"{OURS}: the example of docs/methods/process-reward.md"),
        Hyper("train.batch_groups", 64, f"{OURS}: as for a reward model of answers"),
        Hyper("train.epochs", 1.0, f"{OURS}: as for a reward model of answers"),
        Hyper("process_reward.separator", "\n", f"{OURS}: the default of trimtab"),
    ),
    "dpo": (
        Hyper("dpo.beta", 0.1, f"{DPO_B}, and TRL's default; the guide: 0.05 to 0.2"),
        Hyper("train.lr", 1e-6, f"{DPO_B}, and TRL's default (the authors' code: 5e-7)"),
        Hyper("train.batch_groups", 64, DPO_B),
        Hyper("train.epochs", 1.0, ONE_PASS),
        Hyper("train.warmup_steps", 150, DPO_B),
    ),
    "ipo": (
        Hyper("ipo.beta", 0.1, "Azar et al., 2023: the least of its sweep over 0.1, 0.5 and 1.0"),
        Hyper("train.lr", 5e-7, f"{OURS}: the lower of DPO's; the paper's experiments are on bandits"),
        Hyper("train.batch_groups", 64, f"{OURS}: DPO's (Azar et al., appendix C.1: 90, on bandits)"),
        Hyper("train.epochs", 1.0, f"{OURS}: one pass, as DPO"),
    ),
    "simpo": (
        Hyper("simpo.beta", 2.0, "Meng et al., 2024, the authors' llama-3-8b-base-simpo.yaml"),
        Hyper("simpo.gamma", 1.0, "the same: gamma_beta_ratio 0.5"),
        Hyper("train.lr", 6e-7, "Meng et al., 2024, the authors' llama-3-8b-base-simpo.yaml"),
        Hyper("train.batch_groups", 128, "Meng et al., 2024, section 3: for all settings"),
        Hyper("train.epochs", 1.0, "Meng et al., 2024, the authors' file"),
        Hyper("train.schedule", "cosine", "Meng et al., 2024, the authors' file"),
        Hyper("train.warmup_steps", 48, "Meng et al., 2024, the authors' file: a tenth of one pass"),
    ),
    "orpo": (
        Hyper("orpo.beta", 0.1, "TRL's default and ours (Zephyr 141B-A35B: 0.05)"),
        Hyper("train.lr", 5e-6, "alignment-handbook, zephyr-141b-A35b/orpo/config_full.yaml (TRL: 1e-6)"),
        Hyper("train.batch_groups", 32, f"{OURS}: 32 devices assumed, with one pair each"),
        Hyper("train.epochs", 3.0, "the same file"),
        Hyper("train.warmup_steps", 100, "the same file"),
    ),
    "kto": (
        Hyper("kto.beta", 0.1, "Ethayarajh et al., 2024, the authors' config/loss/kto.yaml; TRL's default"),
        Hyper("train.lr", 5e-7, "Ethayarajh et al., 2024, experiments (TRL's default: 1e-6)"),
        Hyper("train.batch_groups", 32, "Ethayarajh et al., 2024, experiments"),
        Hyper("train.epochs", 1.0, f"{OURS}: one pass"),
        Hyper("train.warmup_steps", 150, "DPO's authors, whose settings the paper keeps"),
    ),
    "rank": (
        Hyper("rank.loss", "listwise", "Rafailov et al., 2023, appendix A.3"),
        Hyper("rank.beta", 0.1, f"{OURS}: DPO's, whose loss it is on two answers"),
        Hyper("train.lr", 1e-6, f"{OURS}: DPO's"),
        Hyper("train.batch_groups", 32, f"{OURS}: as many answers a step as DPO, four to a prompt"),
        Hyper("train.epochs", 1.0, f"{OURS}: one pass, as DPO"),
    ),
    "mixed": (
        Hyper("mixed.pairs.beta", 0.1, f"{DPO_B}"),
        Hyper("mixed.labels.beta", 0.1, "Ethayarajh et al., 2024, config/loss/kto.yaml"),
        Hyper("train.lr", 5e-7, f"{OURS}: KTO's, the lower of the two"),
        Hyper("train.batch_groups", 64, f"{OURS}: DPO's"),
        Hyper("train.epochs", 1.0, f"{OURS}: one pass"),
    ),
    "spin": (
        Hyper("spin.iterations", 3, f"{OURS} (Chen et al., 2024: 4; each samples once for every row)"),
        Hyper("spin.beta", 0.1, "Chen et al., 2024: λ 0.1 in iterations 0 to 2"),
        Hyper("train.lr", 5e-7, "Chen et al., 2024, the authors' model cards, iterations 0 and 1"),
        Hyper("train.batch_groups", 64, "Chen et al., 2024, the authors' model cards"),
        Hyper("train.epochs", 2.0, "Chen et al., 2024, the authors' model cards"),
        Hyper("sampling.temperature", 1.0, "the policy's own distribution, as in the paper's theory"),
    ),
    "online-dpo": (
        Hyper("online_dpo.samples", 2, "Guo et al., 2024, section 3"),
        Hyper("online_dpo.beta", 0.1, "Guo et al., 2024, experiments, for DPO"),
        Hyper("train.lr", 5e-7, "Guo et al., 2024, experiments"),
        Hyper("train.batch_groups", 32, f"{OURS}, for a first run (Guo et al., 2024: 128)"),
        Hyper("sampling.temperature", 0.9, "Guo et al., 2024, experiments"),
        Hyper("train.steps", 300, f"{OURS}, for a first run"),
    ),
    "ppo": (
        Hyper("ppo.beta", 0.05, "Huang et al., 2024 (N+ implementation details), PPO's settings"),
        Hyper("ppo.epochs_per_rollout", 4, "Huang et al., 2024"),
        Hyper("ppo.gamma", 1.0, "Huang et al., 2024"),
        Hyper("ppo.lam", 0.95, "Huang et al., 2024"),
        Hyper("ppo.clip_low", 0.2, "Huang et al., 2024"),
        Hyper("ppo.clip_high", 0.2, "Huang et al., 2024"),
        Hyper("train.lr", 3e-6, "Huang et al., 2024 (the production guide: 5e-6 to 1e-5 for 7B to 70B)"),
        Hyper("train.adam_eps", 1e-5, "Huang et al., 2024"),
        Hyper("train.batch_groups", 64, f"{OURS}, for a first run (Huang et al., 2024: 512)"),
        Hyper("sampling.temperature", 0.7, "Huang et al., 2024"),
        Hyper("train.steps", 400, f"{OURS}, for a first run: 100 rollouts"),
    ),
    "grpo": (
        Hyper("grpo.group_size", 8, f"{CHAPTER}'s GRPOConfig, and TRL's default (DeepSeekMath: 64)"),
        Hyper("grpo.beta", 0.04, "DeepSeekMath, 2024, section 4.2 (TRL's default: 0)"),
        Hyper("grpo.clip_low", 0.2, f"{CHAPTER}'s GRPOConfig, and TRL's default"),
        Hyper("grpo.clip_high", 0.2, f"{CHAPTER}'s GRPOConfig, and TRL's default"),
        Hyper("train.lr", 1e-6, "DeepSeekMath, 2024, section 4.2, and TRL's default"),
        Hyper(
            "train.batch_groups", 16, "DeepSeekMath, 2024, section 4.2: 1,024 responses, there 64 to a prompt"
        ),
        Hyper("sampling.temperature", 1.0, "TRL's default; DeepSeekMath does not state it"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
    "dr-grpo": (
        Hyper("dr_grpo.group_size", 8, "Liu et al., 2025, the authors' examples/qwen2.5-math-7b.sh"),
        Hyper("dr_grpo.beta", 0.0, "the same file"),
        Hyper("dr_grpo.scale", "none", "Liu et al., 2025, section 3.2"),
        Hyper("dr_grpo.reduction", "constant", "Liu et al., 2025, section 3.2"),
        Hyper("train.lr", 1e-6, "the authors' file"),
        Hyper("train.batch_groups", 16, "the authors' file: 128 responses"),
        Hyper("sampling.temperature", 1.0, "the authors' file"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
    "rloo": (
        Hyper("rloo.group_size", 4, "Ahmadian et al., 2024: k of 2 and 4"),
        Hyper("rloo.beta", 0.03, "Ahmadian et al., 2024, appendix C (TL;DR), recipes/papers/rloo.toml"),
        Hyper("train.lr", 1e-6, "Ahmadian et al., 2024, appendix C"),
        Hyper("train.batch_groups", 32, f"{OURS}, for a first run (Ahmadian et al., appendix C: 128)"),
        Hyper("sampling.temperature", 1.0, f"{OURS}: the policy's own distribution"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
    "dapo": (
        Hyper("dapo.group_size", 16, "Yu et al., 2025, section 4.1"),
        Hyper("dapo.clip_low", 0.2, "Yu et al., 2025, section 4.1"),
        Hyper("dapo.clip_high", 0.28, "Yu et al., 2025, section 4.1"),
        Hyper("dapo.beta", 0.0, "Yu et al., 2025, section 2.3"),
        Hyper("dapo.overlong_buffer", -1, "Yu et al., 2025, section 4.1: a fifth of the limit"),
        Hyper("train.lr", 1e-6, "Yu et al., 2025, section 4.1"),
        Hyper("train.batch_groups", 32, "Yu et al., 2025, section 4.1"),
        Hyper("train.schedule", "constant", "Yu et al., 2025, section 4.1"),
        Hyper("train.weight_decay", 0.1, "the authors' recipe/dapo/run_dapo_qwen2.5_32b.sh"),
        Hyper("sampling.temperature", 1.0, "the same file"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
    "gspo": (
        Hyper("gspo.group_size", 8, f"{OURS}: GRPO's; the paper does not state it"),
        Hyper("gspo.clip_low", 3e-4, "Zheng et al., 2025, section 5.1"),
        Hyper("gspo.clip_high", 4e-4, "Zheng et al., 2025, section 5.1"),
        Hyper("gspo.beta", 0.0, "stated by the authors: no KL"),
        Hyper("train.lr", 1e-6, f"{OURS}: GRPO's; the paper does not state it"),
        Hyper("train.batch_groups", 16, f"{OURS}, for a first run"),
        Hyper("gspo.rollout_groups", 64, "Zheng et al., 2025, section 5.1: four mini-batches a rollout"),
        Hyper("sampling.temperature", 1.0, f"{OURS}: the policy's own distribution"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
    "cispo": (
        Hyper("cispo.group_size", 16, "Khatri et al., 2025"),
        Hyper("cispo.clip_high", 4.0, "Khatri et al., 2025: weights up to 5"),
        Hyper("cispo.clip_low", 1.0, "MiniMax-M1, 2025: no lower bound"),
        Hyper("cispo.scale", "batch_std", "Khatri et al., 2025"),
        Hyper("cispo.beta", 0.0, "MiniMax-M1, 2025"),
        Hyper("train.lr", 5e-7, "Khatri et al., 2025"),
        Hyper("train.batch_groups", 16, f"{OURS}, for a first run (Khatri et al., 2025: 48)"),
        Hyper("train.schedule", "constant", "Khatri et al., 2025"),
        Hyper("sampling.temperature", 1.0, f"{OURS}: the policy's own distribution"),
        Hyper("train.steps", 200, f"{OURS}, for a first run"),
    ),
}
"""Before the situation has its say. Options that are not named keep their defaults."""

SECTION = {name: name.replace("-", "_") for name in START}
STEPS_A_PASS = 50
"""Optimiser steps that a pass over the data should have at least; our judgement."""


def rows_of(stage: str, s: Situation) -> int:
    """Rows that a stage learns from or asks."""
    if stage == "sft":
        return s.count("demonstrations") or s.imitable
    if stage == "reward":
        return s.comparisons or s.count("scores")
    if stage == "process-reward":
        return s.count("steps")
    if stage == "spin":
        return s.count("demonstrations")
    if stage == "kto":
        return s.count("thumbs") or s.comparisons
    if stage == "mixed":
        return s.comparisons + s.count("thumbs", "demonstrations")
    return (s.comparisons or s.count("thumbs")) if stage in OFFLINE else s.rows


def hypers(stage: str, method: str, s: Situation) -> tuple[Hyper, ...]:
    """The values of a stage in a situation; ``method`` is what the stages lead to."""
    values = {h.key: h for h in START[stage]}

    def put(key: str, value: Any, source: str) -> None:
        values[key] = Hyper(key, value, source)

    if stage in (*PAIRWISE, "rank", "mixed"):
        _offline(stage, s, put)
    if stage == "kto" and not s.count("thumbs"):
        put("train.epochs", 1.0, f"{OURS}: one pass; of a pair the chosen is good, the rejected bad")
    if stage in ("kto", "mixed"):
        _weights(stage, s, put)
    if stage == "reward":
        _reward(s, put)
    if stage == "sft" and s.count("demonstrations") < GUIDE_FEW and s.count("demonstrations"):
        put(
            "train.epochs", 2.0, f"{OURS}: under {GUIDE_FEW:,} rows a second pass; stop where eval_loss rises"
        )
    if stage in ONLINE:
        _online(stage, s, put)
    _cut_to_rows(stage, s, values, put)
    return tuple(values.values())


Put = Callable[[str, Any, str], None]


def _offline(stage: str, s: Situation, put: Put) -> None:
    if stage == "dpo" and not s.comparisons:
        put("dpo.pairs_from", "labels", f"{GUIDE}, last section: thumbs up with random negatives")
    if stage == "dpo" and s.noisy == "yes":
        if s.flips:
            put(
                "dpo.loss", "robust", "Chowdhury et al., 2024, section 3.1, for a known share of wrong labels"
            )
            put("dpo.label_smoothing", round(min(s.flips, 0.4), 2), "the share of wrong labels that is known")
        else:
            put("dpo.label_smoothing", 0.1, f"Mitchell, 2023 (conservative DPO); 0.1 is {OURS}")


def _weights(stage: str, s: Situation, put: Put) -> None:
    """λ_D·n_D / (λ_U·n_U) within 1 to 4/3: the rarer kind's weight is raised to 1 where it is not."""
    section = "kto" if stage == "kto" else "mixed.labels"
    source = BALANCED
    if not s.count("thumbs"):
        return
    if not s.ups or not s.downs:
        put(f"{section}.balance", True, f"{source}; how many are up is not known, so the run counts them")
        return
    ratio = s.ups / s.downs
    if 1 <= ratio <= 4 / 3:
        return
    if ratio > 1:
        put(
            f"{section}.undesirable_weight",
            float(f"{ratio:.4g}"),
            f"{source}: {s.ups:,} up, {s.downs:,} down",
        )
    else:
        put(
            f"{section}.desirable_weight",
            float(f"{1 / ratio:.4g}"),
            f"{source}: {s.ups:,} up, {s.downs:,} down",
        )


def _reward(s: Situation, put: Put) -> None:
    if not s.comparisons:
        put("reward_model.loss", "regression", f"{OURS}: single ratings compare nothing")
    elif s.lists:
        put(
            "reward_model.loss",
            "listwise",
            f"{OURS}: which loss reads rankings hardly matters, docs/results.md",
        )
    else:
        put("reward_model.loss", "pairs", "Bradley and Terry, 1952; as Touvron et al., 2023, without margins")


def _online(stage: str, s: Situation, put: Put) -> None:
    section = SECTION[stage]
    learned = bool(s.reward_model) or learns_a_reward(s) == "reward"
    if stage in RELATIVE and learned:
        guard = "measured by us: docs/results.md, KL and reward over β: 0.1 holds, 0.01 over-optimises"
        if stage == "rloo":
            put("rloo.beta", 0.1, RLOO_GUARD)
        elif stage == "grpo":
            put("grpo.beta", 0.1, guard)
            put(
                "grpo.scale", "none", "measured by us: docs/results.md, Over-optimisation, its last paragraph"
            )
            put("grpo.kl_estimator", "k2", "the same; the gradient of KL(π‖π_ref), docs/methods/grpo.md")
        else:
            put(f"{section}.beta", 0.04, f"{OURS}: DeepSeekMath's; a learned reward needs an anchor")
    if stage == "ppo" and learned:
        put(
            "ppo.beta",
            0.1,
            "measured by us: docs/results.md, KL and reward over β (Huang et al., 2024: 0.05)",
        )
    if stage == "grpo" and s.judge and not s.verifier and not s.reward_model:
        put("grpo.advantage_from", "gains", f"{GUIDE}, GRPO starter: ranks to gains 1.0, 0.6, 0.3, 0.0")
        put("grpo.group_size", 4, f"{GUIDE}, GRPO starter: 4 to 8 candidates")
    if stage == "grpo" and learns_a_reward(s) == "process-reward":
        put("grpo.supervision", "process", "DeepSeekMath, 2024, section 4.1.3")
    if stage == "online-dpo" and s.noisy == "yes":
        put("online_dpo.loss", "robust", "Chowdhury et al., 2024, section 3.1, for a judge that errs")
        put("online_dpo.label_smoothing", round(min(s.flips or 0.1, 0.4), 2), "the judge's share of errors")
    if stage == "cispo" and s.reuse == "yes":
        put("cispo.rollout_groups", 64, f"{OURS}: four steps a rollout")


def _cut_to_rows(stage: str, s: Situation, values: dict[str, Hyper], put: Put) -> None:
    """A smaller batch, and a shorter warm-up, where the paper's would leave a pass few steps."""
    rows, batch = rows_of(stage, s), int(values["train.batch_groups"].value)
    few = max(1, rows // STEPS_A_PASS)
    if stage in ONLINE:
        few = max(1, rows)
    if few < batch:
        smaller = max(4 if stage in ("kto", "mixed") else 1, 1 << (few.bit_length() - 1))
        was = values["train.batch_groups"].value
        put("train.batch_groups", min(batch, smaller), f"{OURS}: {rows:,} rows are few for batches of {was}")
        rollout = f"{SECTION[stage]}.rollout_groups"
        if rollout in values:
            put(rollout, 4 * min(batch, smaller), f"{OURS}: four steps a rollout, as above")
    steps = values.get("train.steps")
    epochs = values.get("train.epochs")
    whole = (
        int(steps.value)
        if steps
        else max(1, int((epochs.value if epochs else 1) * rows) // int(values["train.batch_groups"].value))
    )
    if "train.warmup_steps" in values and int(values["train.warmup_steps"].value) > whole // 10:
        was = values["train.warmup_steps"].value
        put(
            "train.warmup_steps", whole // 10, f"{OURS}: a tenth of the steps, fewer than the {was} published"
        )
