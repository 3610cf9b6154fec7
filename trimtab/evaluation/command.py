"""``trimtab eval``: a policy on held-out prompts or pairs, or a reward model on held-out comparisons.

The figures go to ``eval.json`` and to the terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.data.chat import end_tokens
from trimtab.data.collate import in_each_layout
from trimtab.data.convert import as_comparisons, as_pairs, as_prompts, convert
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig
from trimtab.errors import InputError
from trimtab.evaluation.policy import comparison_row, evaluate_policy
from trimtab.evaluation.preferences import pair_logps, preference_accuracy
from trimtab.evaluation.reward_model import judge_lines
from trimtab.evaluation.reward_scores import held_out_calibration, saved_calibration, scorer_report
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import ModelConfig, load_model
from trimtab.rewards.base import RewardConfig
from trimtab.rewards.calibration import calibration_line
from trimtab.rewards.functions import build_mixture
from trimtab.rewards.models import RewardModelArgs, build_reward_model
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig


class EvalConfig(Section):
    """Options of ``trimtab eval``."""

    model: ModelConfig | None = Field(None, description="the policy that is measured")
    reward_model: RewardModelArgs | None = Field(
        None, description="measure a reward model instead, on [[pairs]] (pairs, rankings or ratings)"
    )
    reference: str = Field(
        "", description="folder or hub name; adds drift and the implicit reward's accuracy"
    )
    prompts: list[SourceConfig] = Field([], description="prompts that are answered and scored")
    reward: RewardConfig | None = Field(None, description="the score of an answer")
    samples: int = Field(1, ge=1, description="answers a prompt")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    pairs: list[SourceConfig] = Field([], description="preference pairs, for accuracy")
    calibrate: bool = Field(
        False, description="of a reward model: fit a temperature on half of the pairs, measure it on the rest"
    )
    seed: int = Field(0, ge=0, description="of the sampling noise and the bootstrap")
    out: str = Field("eval.json", description="where the figures go")

    @model_validator(mode="after")
    def _something(self) -> EvalConfig:
        if (self.model is None) == (self.reward_model is None):
            raise ValueError("give either [model], a policy, or [reward_model]")
        if self.reward_model is not None:
            for name in ("reference", "prompts", "reward"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no effect on a reward model; remove it")
            if not self.pairs:
                raise ValueError("a reward model is measured on [[pairs]]: give held-out comparisons")
        elif self.calibrate:
            raise ValueError("calibrate has no effect without [reward_model]; remove it")
        if not self.prompts and not self.pairs:
            raise ValueError("nothing to evaluate on: give [[prompts]] with a [reward], or [[pairs]]")
        if self.prompts and self.reward is None:
            raise ValueError("[[prompts]] needs a [reward], the score of an answer")
        return self


def run_eval(config: EvalConfig) -> str:
    """Measure and write ``out``; returns the figures as text."""
    out = Path(config.out)
    if not out.parent.is_dir():
        raise InputError(f"out: {out.parent}: no such folder to write {out.name} in")
    lines: list[str] = []
    if config.reward_model is not None:
        found = _reward_model(config, config.reward_model)
        lines = judge_lines(found, "reward model")
        if "calibration" in found:
            lines.append(calibration_line(found["calibration"]))
    else:
        assert config.model is not None
        found = _policy(config, config.model)
    text = json.dumps(found, indent=2)
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"out: cannot write {out}: {error.strerror}") from None
    return "\n".join([text, *lines])


def _reward_model(config: EvalConfig, args: RewardModelArgs) -> dict[str, Any]:
    """Accuracy, calibration and length figures on the held-out comparisons."""
    groups = [g for s in config.pairs for g in convert(s.read()[0], as_comparisons, "a pair or a ranking")]
    # What was not asked for stays so: options say whether they were.
    scorer = build_reward_model(args.model_dump(exclude_unset=True))
    found = {"reward_model": args.path, **scorer_report(scorer, groups, seed=config.seed)}
    if (saved := saved_calibration(scorer, groups)) is not None:
        found["calibrated"] = saved
    if config.calibrate:
        found["calibration"] = held_out_calibration(scorer, groups, seed=config.seed)
    return found


def _policy(config: EvalConfig, model: ModelConfig) -> dict[str, Any]:
    lm = _settled(model)
    reference = _settled(model, config.reference) if config.reference else None
    found: dict[str, Any] = {"model": model.path, "reference": config.reference or None}
    if config.prompts:
        found |= _answers(config, lm, reference)
    if config.pairs:
        pairs = [g for s in config.pairs for g in convert(s.read()[0], as_pairs, "a pair")]
        pairs, _ = tokenise(pairs, lm.tokenizer, max_tokens=lm.context)
        ref_P2 = None if reference is None else pair_logps(reference, pairs)
        found["preference"] = preference_accuracy(lm, pairs, ref_P2=ref_P2)
    return found


def _answers(config: EvalConfig, lm: LanguageModel, reference: LanguageModel | None) -> dict[str, Any]:
    """Sampled answers to the held-out prompts, scored."""
    assert config.reward is not None
    prompts = [g for s in config.prompts for g in convert(s.read()[0], as_prompts, "a prompt")]
    room = max(lm.context - config.sampling.max_new_tokens, 1)
    prompts, _ = tokenise(prompts, lm.tokenizer, max_prompt_tokens=room)
    sampler, _ = choose_sampler(lm, config.sampling, probe_groups(lm.vocab_size))
    result = evaluate_policy(
        lm,
        sampler,
        build_mixture(config.reward),
        prompts,
        config.sampling,
        samples=config.samples,
        seed=config.seed,
        end_tokens=end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None)),
        reference=reference,
    )
    row = comparison_row(result, None)
    return {
        "reward": row["gold_reward"],
        "reward_ci95": row["gold_reward_ci95"],
        "unscored": result.unscored,
        "response_tokens": result.response_tokens,
        "kl_nats_per_token": result.kl_nats_per_token,
    }


def _settled(config: ModelConfig, path: str = "") -> LanguageModel:
    """The model in the layout that a check on it allows."""
    lm = load_model(config.model_copy(update={"path": path or config.path}))
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size), lm.device), config.layout)
    return lm
