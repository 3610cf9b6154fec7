"""Memory with adapters, as a worker: ``python -m benchmarks.roles roles MODEL DATA "sft adapter"``.

The variant is the method, then what its roles stand on: ``adapter`` (all on one frozen base), ``apart``
(the critic and the reward model on bases of their own) or ``whole`` (a model a role, every weight of policy
and critic trained). Peaks are counted above what the process held once its imports were done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import settings
from benchmarks.ours import StepOnRequest, exact_length, shared_sections, write_rows
from benchmarks.protocol import Channel
from trimtab.methods import ppo, sft

SEQUENCES = 8
MICRO_BATCH_TOKENS = 2048


def sections(model_dir: str, rows: list[dict[str, str]], roles: str) -> dict[str, Any]:
    """What both methods have in common."""
    made = shared_sections(model_dir, write_rows(rows, Path("rows.jsonl")), SEQUENCES)
    made["train"]["micro_batch_tokens"] = MICRO_BATCH_TOKENS
    return made if roles == "whole" else made | {"adapter": {"kind": "lora"}}


def run_sft(model_dir: str, prompts: list[list[int]], roles: str, channel: Channel) -> None:
    """SFT on as many tokens as a PPO step has."""
    cut = settings.RESPONSE_TOKENS
    rows = [{"prompt": settings.to_text(p), "completion": settings.to_text(p[: cut - 1])} for p in prompts]
    config = sft.Config.model_validate(sections(model_dir, rows, roles))
    sft.train(config, on_eval=StepOnRequest(channel))


def run_ppo(model_dir: str, prompts: list[list[int]], roles: str, channel: Channel) -> None:
    """PPO, one epoch: a step is a rollout."""
    folder = Path(model_dir)
    scorer = str(folder.with_name(f"{folder.name}-reward-adapter"))
    critic = {}
    if roles != "adapter":
        scorer = str(folder.with_name(f"{folder.name}-reward"))
        critic = {"critic": {"path": scorer}}
    args = {"path": scorer} if roles == "adapter" else {"path": scorer, "dtype": "bfloat16"}
    rows = [{"prompt": settings.to_text(ids)} for ids in prompts]
    config = ppo.Config.model_validate(
        {
            **sections(model_dir, rows, roles),
            **critic,
            "sampling": exact_length(),
            "reward": {"terms": [{"name": "reward_model", "label": "learned", "args": args}]},
            "ppo": {"epochs_per_rollout": 1, "beta": settings.PPO_BETA, "missing_end_penalty": 0.0},
        }
    )
    ppo.train(config, on_eval=StepOnRequest(channel))


def main(name: str, model_dir: str, data_file: str, variant: str) -> None:
    """Train until told to stop."""
    channel = Channel()
    channel.loaded()  # nothing is loaded yet: what is held from here on counts
    method, roles = variant.split()
    prompts = json.loads(Path(data_file).read_text())["prompts"][: 4 * SEQUENCES]
    run = {"sft": run_sft, "ppo": run_ppo}[method]
    run(model_dir, prompts, roles, channel)


if __name__ == "__main__":
    main(*sys.argv[1:])
