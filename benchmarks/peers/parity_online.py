"""TRL's GRPO and RLOO on fixed rollouts: ``python -m benchmarks.peers.parity_online TASK_FILE…``.

Only the drawing of responses is replaced: prompts are tokenised, rewards are asked for, and old
log-probabilities are computed by the trainer itself.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer import grpo_trainer, rloo_trainer

from benchmarks.peers.parity_tasks import Task, arguments, curves_of, run_tasks

# Rows are cut into steps in the order that they come in.
grpo_trainer.shuffle_sequence_dict = lambda rows: rows
rloo_trainer.shuffle_sequence_dict = lambda rows: rows


class Replay:
    """What a trainer draws, taken from the task instead."""

    fixed: list[list[dict[str, Any]]]
    drawn = 0

    def _next(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The next rollout's responses. Raises RuntimeError where the prompts are not those of ours."""
        groups = self.fixed[self.drawn]
        self.drawn += 1
        expected = [group["prompt_ids"] for group in groups for _ in group["responses"]]
        if [list(ids) for ids in prompt_ids] != expected:
            raise RuntimeError(
                f"rollout {self.drawn}: TRL's prompts are {prompt_ids[0]} …, ours {expected[0]} …"
            )
        return [response["ids"] for group in groups for response in group["responses"]]


class ReplayGRPO(Replay, GRPOTrainer):
    """GRPO with fixed responses."""

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        return self._next(prompt_ids), None


class ReplayRLOO(Replay, RLOOTrainer):
    """RLOO with fixed responses."""

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        return self._next(prompt_ids)


TRAINERS: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, ReplayGRPO), "rloo": (RLOOConfig, ReplayRLOO)}


def run(task: Task) -> dict[str, list[float]]:
    """Train as the task says; the curves."""
    config_class, trainer_class = TRAINERS[task.trainer]
    rewards = {
        (group["prompt"], tuple(response["ids"])): reward
        for rollout in task.batches
        for group in rollout
        for response, reward in zip(group["responses"], group["rewards"], strict=True)
    }

    def looked_up(prompts: list[str], completion_ids: list[list[int]], **more: Any) -> list[float]:
        return [rewards[prompt, tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    options = dict(task.options)
    rewarded: list[Any] = [looked_up]
    if buffer := options.pop("soft_overlong", 0):
        rewarded.append(get_soft_overlong_punishment(task.new_tokens, buffer))
    rollout = len(task.batches[0])
    config = config_class(
        **arguments(task, per_device_train_batch_size=rollout // task.minibatches * task.responses),
        **{
            "num_generations": task.responses,
            "num_iterations": task.epochs,
            "steps_per_generation": task.minibatches,
            "max_completion_length": task.new_tokens,
            "shuffle_dataset": False,
            "temperature": 1.0,
        }
        | options,
    )
    prompts = [{"prompt": group["prompt"]} for batch in task.batches for group in batch]
    trainer = trainer_class(
        model=task.model, reward_funcs=rewarded, args=config, train_dataset=Dataset.from_list(prompts)
    )
    trainer.fixed = task.batches
    trainer.train()
    return curves_of(trainer)


if __name__ == "__main__":
    run_tasks(run, sys.argv[1:])
