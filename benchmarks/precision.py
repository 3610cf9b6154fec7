"""What bf16 costs in accuracy: 200 steps of DPO and of GRPO in fp32 and in bf16, from one model, one seed.

The world is the quickstart's newsroom, the model its own two layers after supervised fine-tuning, masters
and optimiser in fp32 in every run. A second fp32 run with another seed (data order and sampling noise) says
how far two runs lie apart that differ in nothing that matters.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import FIGURES
from trimtab.data.chat import end_tokens
from trimtab.data.convert import as_prompts
from trimtab.data.render import tokenise
from trimtab.data.sources import SourceConfig
from trimtab.evaluation.policy import evaluate_policy
from trimtab.methods import dpo, grpo, sft
from trimtab.methods.shared.setup import Result
from trimtab.models.layout import probe_groups
from trimtab.newsroom.files import write_world
from trimtab.newsroom.model import new_model
from trimtab.newsroom.tokenizer import build_tokenizer
from trimtab.rewards.base import RewardConfig
from trimtab.rewards.functions import build_mixture
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig

STEPS = 200
SMOOTHED_OVER = 10
"""Steps of the trailing mean that curves are compared as."""
POINTS = 20
"""Of each smoothed curve in the result."""
GOLD = {"terms": [{"name": "trimtab.newsroom.gold:score", "label": "gold"}]}
NEW_TOKENS = 48
WORLD: dict[str, Any] = {"demonstrations": 16000, "pairs": 4000, "prompts": 3000}
RUNS = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 0), "float32, another seed": ("float32", 1)}
"""Name → what the forward pass computes in, and the seed."""
SETTING = (
    "200 steps of DPO (16 pairs a step, lr 3e-4, β 0.3, the writers' pairs of the newsroom world) and of "
    "GRPO (12 prompts × 8 responses, lr 1e-3, β 0.1, k2, no scaling, the gold score as reward), from the "
    "quickstart's model (two layers of width 128) after 340 steps of SFT. fp32 and bf16 computation, "
    "masters and optimiser in fp32, same seed; and fp32 with another seed, as a yardstick. Curves are "
    "trailing means over 10 steps. gold_reward: mean gold score, 1 to 10, of two answers to each held-out "
    "prompt. final: means over the last 20 steps."
)


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its options, and the metrics that are compared."""

    module: Any
    metrics: tuple[str, ...]
    source: str
    train: dict[str, Any]
    sections: dict[str, Any]


METHODS = {
    "dpo": Method(
        dpo,
        ("loss", "accuracy", "reward_margin"),
        "pairs",
        {"batch_groups": 16, "lr": 3e-4},
        {"dpo": {"beta": 0.3}},
    ),
    "grpo": Method(
        grpo,
        ("loss", "reward_mean", "kl"),
        "prompts",
        {"batch_groups": 12, "lr": 1e-3},
        {
            "grpo": {"group_size": 8, "beta": 0.1, "scale": "none", "kl_estimator": "k2"},
            "sampling": {"max_new_tokens": NEW_TOKENS},
            "reward": GOLD,
        },
    ),
}


def run(
    folder: Path, *, steps: int = STEPS, sft_steps: int = 340, heldout: int = 200
) -> list[dict[str, Any]]:
    """The rows of the result, one a method. ``folder`` is written anew."""
    shutil.rmtree(folder, ignore_errors=True)
    world = folder / "world"
    files = write_world(world, seed=0, heldout=heldout, **WORLD)
    tokenizer = build_tokenizer()
    new_model(len(tokenizer), 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train = {"steps": sft_steps, "batch_groups": 64, "lr": 3e-3, "schedule": "cosine"} | {
        "warmup_steps": min(20, sft_steps)
    }
    _train(sft, folder / "base", files["demonstrations"], folder / "sft", train, "float32", {})
    return [
        {
            "case": f"{name}, {steps} steps",
            **dict.fromkeys(FIGURES),
            "runs": 1,
            **compare(folder, name, files, steps),
        }
        for name in METHODS
    ]


def compare(folder: Path, name: str, files: dict[str, Path], steps: int) -> dict[str, Any]:
    """Train one method in every way and set the curves side by side."""
    method = METHODS[name]
    curves: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, Any]] = {"final": {}, "gold_reward": {}, "seconds": {}}
    for title, (dtype, seed) in RUNS.items():
        began = time.perf_counter()
        out = folder / f"{name} {title}"
        train = {**method.train, "steps": steps, "warmup_steps": min(10, steps), "seed": seed}
        model, source = folder / "sft" / "model", files[method.source]
        result = _train(method.module, model, source, out, train, dtype, method.sections)
        rows = read_metrics(out / "metrics.jsonl", method.metrics)
        curves[title] = {metric: smoothed(values) for metric, values in rows.items()}
        found["final"][title] = {m: _short(statistics.fmean(values[-20:])) for m, values in rows.items()}
        found["gold_reward"][title] = _short(gold_reward(result, files["heldout"]))
        found["seconds"][title] = round(time.perf_counter() - began, 1)
        print(f"{name} {title}: {found['seconds'][title]} s", file=sys.stderr)
    base = curves["float32"]
    for key, other in (("bfloat16", "bfloat16"), ("between_seeds", "float32, another seed")):
        gaps = {m: differences(base[m], curves[other][m]) for m in method.metrics}
        found[f"{key}_max_abs_difference"] = {m: _short(max(gap)) for m, gap in gaps.items()}
        found[f"{key}_mean_abs_difference"] = {m: _short(statistics.fmean(gap)) for m, gap in gaps.items()}
    every = max(1, steps // POINTS)
    shown = {
        t: {m: [_short(v) for v in c[every - 1 :: every]] for m, c in of.items()} for t, of in curves.items()
    }
    return {**found, "curve_every": every, "curves": shown}


def _train(
    module: Any, model: Path, source: Path, out: Path, train: dict[str, Any], dtype: str, more: dict[str, Any]
) -> Result:
    config = module.Config.model_validate(
        {
            "model": {"path": str(model), "dtype": dtype},
            "data": {"sources": [{"path": str(source)}]},
            "train": train,
            "run": {"out": str(out)},
            **more,
        }
    )
    # The result is what the command prints on its standard output.
    with contextlib.redirect_stdout(sys.stderr):
        result: Result = module.train(config)
    return result


def gold_reward(result: Result, heldout: Path) -> float:
    """Mean gold score of two answers to each held-out prompt, sampled as the run computed."""
    lm: Any = result.lm
    prompts, _ = tokenise(as_prompts(SourceConfig(path=str(heldout)).read()[0]), lm.tokenizer)
    config = SamplingConfig(max_new_tokens=NEW_TOKENS)
    sampler, _ = choose_sampler(lm, config, probe_groups(lm.vocab_size))
    ends = end_tokens(lm.tokenizer, lm.model.generation_config.eos_token_id)
    mixture = build_mixture(RewardConfig.model_validate(GOLD))
    how: dict[str, Any] = {"samples": 2, "seed": 0, "end_tokens": ends}
    return statistics.fmean(evaluate_policy(lm, sampler, mixture, prompts, config, **how).scores)


def read_metrics(file: Path, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Each metric's value at every training step."""

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    return {name: [float(row[name]) for row in steps] for name in names}


def smoothed(values: list[float]) -> list[float]:
    """Trailing means over SMOOTHED_OVER values, fewer at the beginning."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHED_OVER) : i + 1]) for i in range(len(values))]


def differences(first: list[float], second: list[float]) -> list[float]:
    """Absolute differences, step by step."""
    return [abs(a - b) for a, b in zip(first, second, strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
