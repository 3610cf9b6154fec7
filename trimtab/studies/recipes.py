"""How a comparison on the user's own data runs each method: one entry of one table a method.

An entry says what the method is given beyond its defaults, how many tokens one optimiser step takes, and
what a token of its budget costs in seconds. A new method joins by an entry in :data:`RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GRPO_GROUP = 8
"""Responses to a prompt in GRPO; its own default, named here because the plan counts with it."""
PPO_EPOCHS = 4
"""PPO's passes over a rollout; its own default likewise."""
REFERENCE_SIZE = 0.5e9
"""Parameters of the model for which a recipe's learning rate is stated."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the feedback looks like in tokens: means over rows of the methods' part."""

    prompt: float
    chosen: float
    """The best response."""
    comparison: float
    """A whole row: its prompt once, and all its responses."""
    pairs: float
    """All pairs that a row gives, each with its prompt."""
    pair: float
    """One pair with its prompt."""
    new: int
    """Longest response that is sampled."""

    @property
    def sampled(self) -> float:
        """A sampled response, expected to be as long as those that SFT learned from."""
        return min(self.chosen, self.new)


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured on the model itself, in seconds; prompt tokens count once for all responses."""

    parameters: int
    dtype: str
    """What training computes in. Evaluation and reward models compute in fp32."""
    load: float
    """Loading the model and checking its layout."""
    train: float
    """Forward and backward, a token."""
    update: float
    """The optimiser's part of a step."""
    forward: float
    """Forward alone, a token."""
    sampling: tuple[float, float]
    """Sampling one token for each of n responses at once takes the first plus n times the second."""
    forward_fp32: float
    sampling_fp32: tuple[float, float]

    def draw(self, tokens: int, responses: int) -> float:
        """Sampling so many responses at once, of so many tokens."""
        return tokens * (self.sampling[0] + responses * self.sampling[1])

    def draw_fp32(self, tokens: int, responses: int) -> float:
        """The same in fp32."""
        return tokens * (self.sampling_fp32[0] + responses * self.sampling_fp32[1])


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the plan settles for a stage."""

    responses: int
    """Responses in one optimiser step."""
    new: int
    critic_lr: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one method runs on the user's own data."""

    lr: float
    """Peak learning rate of a model of REFERENCE_SIZE; see :func:`learning_rate`."""
    power: float
    reward_seen: str
    step_tokens: Callable[[Shape, int], float]
    """Tokens of one optimiser step of so many responses."""
    token_seconds: Callable[[Shape, Speeds, int], float]
    """Seconds a token of its budget costs with so many responses a step, without the optimiser's update."""
    sections: Callable[[Sizes], dict[str, Any]]
    """The method's own sections, without data, budget and rate."""
    learned_reward: bool = False
    """Needs the stage "rm", the reward model trained on the methods' own part."""
    row_seconds: Callable[[Shape, Speeds], float] = lambda shape, speeds: 0.0
    """Seconds that each row of feedback costs before the first step."""
    updates: int = 1
    """Optimisers that step."""
    models: int = 1
    """Models that are loaded."""


def learning_rate(lr: float, power: float, parameters: int) -> float:
    """lr · (0.5e9 / parameters)^power, to two digits: small models take, and need, larger steps."""
    return float(f"{lr * (REFERENCE_SIZE / parameters) ** power:.1e}")


def _dpo_step(shape: Shape, responses: int) -> float:
    return max(1, responses // 2) * shape.pair


def _ppo_step(shape: Shape, responses: int) -> float:
    return responses * (shape.prompt + shape.sampled)


def _grpo_step(shape: Shape, responses: int) -> float:
    return max(1, responses // GRPO_GROUP) * (shape.prompt + GRPO_GROUP * shape.sampled)


def _ppo_token(shape: Shape, speeds: Speeds, responses: int) -> float:
    """A rollout is drawn, scored and read by policy, reference and critic once; two models learn from it.

    Drawing lasts as long as the longest response, whatever the others' lengths.
    """
    drawn = speeds.draw(shape.new, responses) / _ppo_step(shape, responses)
    return (drawn + 3 * speeds.forward + speeds.forward_fp32) / PPO_EPOCHS + 2 * speeds.train


def _grpo_token(shape: Shape, speeds: Speeds, responses: int) -> float:
    """Every step draws its own responses; they are scored and read by the reference."""
    drawn = speeds.draw(shape.new, max(GRPO_GROUP, responses)) / _grpo_step(shape, responses)
    return drawn + speeds.forward + speeds.forward_fp32 + speeds.train


def _learned_reward() -> dict[str, Any]:
    return {"terms": [{"name": "reward_model", "label": "learned", "args": {"path": "{out}/rm/model"}}]}


def _dpo(sizes: Sizes) -> dict[str, Any]:
    return {"train": {"batch_groups": max(1, sizes.responses // 2)}}


def _ppo(sizes: Sizes) -> dict[str, Any]:
    return {
        "train": {"batch_groups": sizes.responses},
        "sampling": {"max_new_tokens": sizes.new},
        "reward": _learned_reward(),
        "critic": {"path": "{out}/rm/model", "lr": sizes.critic_lr},
    }


def _grpo(sizes: Sizes) -> dict[str, Any]:
    return {
        "train": {"batch_groups": max(1, sizes.responses // GRPO_GROUP)},
        "sampling": {"max_new_tokens": sizes.new},
        "reward": _learned_reward(),
    }


SUPERVISED = {"sft": (2e-5, 0.5), "reward": (1e-5, 0.5)}
"""Rate and power of the stages that come before the methods."""

RECIPES: dict[str, Recipe] = {
    "dpo": Recipe(
        lr=2e-6,
        power=0.6,
        reward_seen="none: the comparisons themselves",
        step_tokens=_dpo_step,
        token_seconds=lambda shape, speeds, responses: speeds.train,
        sections=_dpo,
        # The reference's log-probabilities, before the first step.
        row_seconds=lambda shape, speeds: shape.pairs * speeds.forward,
    ),
    "ppo": Recipe(
        lr=2e-6,
        power=0.6,
        reward_seen="the learned reward",
        step_tokens=_ppo_step,
        token_seconds=_ppo_token,
        sections=_ppo,
        learned_reward=True,
        updates=2,
        models=4,
    ),
    "grpo": Recipe(
        lr=2e-6,
        power=0.6,
        reward_seen="the learned reward",
        step_tokens=_grpo_step,
        token_seconds=_grpo_token,
        sections=_grpo,
        learned_reward=True,
        models=3,
    ),
}
"""Every method that `trimtab compare --data` knows besides SFT, which all of them start from."""
