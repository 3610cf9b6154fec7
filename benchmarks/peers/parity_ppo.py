"""TRL's experimental PPO on fixed rollouts: ``python -m benchmarks.peers.parity_ppo TASK_FILE…``.

Replaced are the drawing of responses (their logits are computed here by the policy, as generation would), the
reward model (scores are looked up), and the two shuffles. The rest is the trainer's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.peers.parity_tasks import Task, arguments, run_tasks

# The module above silences TRL's notice, so it comes first.
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # isort: skip

RECORDED = ("value_loss", "value_clipped", "loss")
"""What the trainer takes masked means of, with gradients on, in each optimiser step and in this order."""

ORIGINAL = {name: getattr(ppo_trainer, name) for name in ("get_reward", "masked_mean")}
"""Of the trainer's module, before :func:`replace`."""


class Rollouts:
    """The fixed responses and scores, one rollout after another."""

    def __init__(self, task: Task) -> None:
        self.left: Iterator[list[dict[str, Any]]] = iter(task.batches)
        self.groups: list[dict[str, Any]] = []

    def responses(self, policy: Any, queries: torch.Tensor, pad: int, temperature: float) -> Any:
        """Queries with their responses, and the logits of these, at the temperature, ``[N, T, V]``.

        Raises RuntimeError where the queries are not the prompts of our rollout.
        """
        self.groups = next(self.left)
        rows = [response["ids"] for group in self.groups for response in group["responses"]]
        prompts = [group["prompt_ids"] for group in self.groups for _ in group["responses"]]
        for query, prompt in zip(queries.tolist(), prompts, strict=True):
            if [i for i in query if i != pad] != prompt:
                raise RuntimeError(f"TRL's prompt is {query}, ours {prompt}")
        width = max(map(len, rows))
        responses = torch.full((len(rows), width), pad)
        for n, row in enumerate(rows):
            responses[n, : len(row)] = torch.tensor(row)
        whole = torch.cat([queries, responses], 1)
        logits = ppo_trainer.forward(policy, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / (temperature + 1e-7)

    def scores(self) -> torch.Tensor:
        """The rewards of the rollout in hand, ``[N]``."""
        return torch.tensor([reward for group in self.groups for reward in group["rewards"]])


def replace(task: Task, pad: int, reward_model: Any, seen: list[float]) -> None:
    """Put the fixed rollouts in the trainer's module; ``seen`` gets every masked mean that it takes."""
    rollouts = Rollouts(task)
    get_reward: Callable[..., Any] = ORIGINAL["get_reward"]
    masked_mean: Callable[..., Any] = ORIGINAL["masked_mean"]

    def batch_generation(model: Any, queries: Any, size: int, pad_id: int, config: Any) -> Any:
        return rollouts.responses(model, queries, pad_id, config.temperature - 1e-7)

    def reward(model: Any, *given: Any) -> Any:
        return (None, rollouts.scores(), None) if model is reward_model else get_reward(model, *given)

    def watched(*given: Any, **more: Any) -> Any:
        mean = masked_mean(*given, **more)
        if torch.is_grad_enabled():
            seen.append(float(mean))
        return mean

    ppo_trainer.batch_generation = batch_generation
    ppo_trainer.get_reward = reward
    ppo_trainer.masked_mean = watched
    ppo_trainer.np.random.permutation = np.arange


def run(task: Task) -> dict[str, list[float]]:
    """Train as the task says; loss and gradient norm of the policy and of the critic."""
    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")
    causal, scalar = AutoModelForCausalLM.from_pretrained, AutoModelForSequenceClassification.from_pretrained
    models = {
        "model": causal(task.model, dtype=torch.float32),
        "ref_model": causal(task.model, dtype=torch.float32).eval(),
        "value_model": scalar(task.reward, dtype=torch.float32),
        "reward_model": scalar(task.reward, dtype=torch.float32).eval(),
    }
    rollout = len(task.batches[0])
    config = PPOConfig(
        **arguments(
            task, per_device_train_batch_size=rollout // task.minibatches, gradient_accumulation_steps=1
        ),
        **{
            "total_episodes": len(task.batches) * rollout,
            "num_mini_batches": 1,
            "num_ppo_epochs": task.epochs,
            "response_length": task.new_tokens,
            "temperature": 1.0,
            "num_sample_generations": 0,
            "stop_token": "eos",
        }
        | task.options,
    )
    prompts = Dataset.from_dict(
        {"input_ids": [group["prompt_ids"] for batch in task.batches for group in batch]}
    )
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, train_dataset=prompts, eval_dataset=prompts, **models
    )
    trainer.dataloader = DataLoader(prompts, batch_size=rollout, collate_fn=trainer.data_collator)
    seen: list[float] = []
    norms: dict[str, list[float]] = {"grad_norm": [], "critic_grad_norm": []}
    replace(task, tokenizer.pad_token_id, trainer.reward_model, seen)
    backward = trainer.accelerator.backward

    def watched(loss: torch.Tensor, **more: Any) -> None:
        backward(loss, **more)
        for name, part in (("grad_norm", "policy"), ("critic_grad_norm", "value_model")):
            gradients = [p.grad for p in getattr(trainer.model, part).parameters() if p.grad is not None]
            norms[name].append(float(torch.nn.utils.get_total_norm(gradients)))

    trainer.accelerator.backward = watched
    trainer.train()
    losses = {name: seen[k :: len(RECORDED)] for k, name in enumerate(RECORDED)}
    return {
        "loss": losses["loss"],
        # The trainer halves the squared error after its mean.
        "value_loss": [0.5 * value for value in losses["value_loss"]],
        **norms,
    }


if __name__ == "__main__":
    run_tasks(run, sys.argv[1:])
