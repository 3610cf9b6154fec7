"""What one step of off-policy overlap costs in learning and saves in time, where the reward is slow.

    make quickstart
    python recipes/overlap_effect.py runs/quickstart

GRPO on the quickstart's gold score, made to take SLEEP seconds a response as a remote judge would: with
overlap (the next rollout is drawn and scored while this one is learned from) and without. From the last steps
of each: mean reward, the gap between the sampler's and the trainer's log-probabilities, seconds a step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trimtab.methods import grpo
from trimtab.newsroom import gold

STEPS, LAST = 60, 20
SLEEP = 0.004


def slow_gold(prompt: str, response: str, *, facts: dict[str, str], **columns: Any) -> float:
    """The newsroom's score, late."""
    time.sleep(SLEEP)
    return gold.score(prompt, response, facts=facts, **columns)


def run(folder: Path, out: Path, *, overlap: bool, seed: int) -> dict[str, float]:
    """Means over the last steps of one run."""
    config = grpo.Config.model_validate(
        {
            "model": {"path": str(folder / "sft/model"), "dtype": "float32"},
            "data": {"sources": [{"path": str(folder / "world/prompts.jsonl")}]},
            "train": {"steps": STEPS, "batch_groups": 24, "lr": 1e-3, "warmup_steps": 10, "seed": seed},
            "sampling": {"max_new_tokens": 48},
            "grpo": {"group_size": 8, "beta": 0.02, "overlap": overlap},
            "reward": {"terms": [{"name": "overlap_effect:slow_gold", "label": "gold"}]},
            "run": {"out": str(out)},
        }
    )
    grpo.train(config)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][-LAST:]
    names = ("reward_mean", "sampler_gap", "kl", "step_s")
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


def main(folder: Path) -> None:
    """Two seeds each way, as a table."""
    print(f"means over the last {LAST} of {STEPS} steps\n")
    print("overlap  seed  reward  sampler gap      KL  seconds a step")
    with tempfile.TemporaryDirectory() as scratch:
        for seed in (0, 1):
            for overlap in (False, True):
                row = run(folder, Path(scratch) / f"{seed}-{overlap}", overlap=overlap, seed=seed)
                print(
                    f"{'on' if overlap else 'off':7}  {seed:4}  {row['reward_mean']:6.2f}  "
                    f"{row['sampler_gap']:11.4f}  {row['kl']:6.3f}  {row['step_s']:14.2f}"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
