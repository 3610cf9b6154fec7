"""Expected gradients of the real losses without sampling: every group that could be drawn, with its weight.

A tabular policy has one logit per token and state. Its responses can be listed, and so can the groups of G of
them; each enters the package's own advantages, loss and reduction with the probability that it is drawn.
Descent on that expectation then stops where training on endless samples would.

Axis suffixes: ``_S`` all responses, ``_M`` all groups (S to the power G), ``_G`` responses in a group,
``_N`` = M·G responses in the batch, ``_T`` tokens of a response, ``_K`` states, ``_V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.objectives.advantages import group_advantages
from trimtab.objectives.policy import relative_loss, truncated_importance_weights
from trimtab.objectives.reduce import Reduction, global_count, reduce_tokens


@dataclass
class Table:
    """A policy's responses: states visited and tokens said, padded to the longest.

    One token: one state. Two tokens: state 0 is the start, state 1 + a follows token a. ``end`` is the token,
    if any, after which a response stops.
    """

    ref_KV: torch.Tensor
    length: int = 1
    end: int | None = None
    answers: list[tuple[int, ...]] = field(init=False)
    """The responses' tokens, in the order of every ``[S]`` tensor."""
    states_ST: torch.Tensor = field(init=False)
    tokens_ST: torch.Tensor = field(init=False)
    mask_ST: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        vocabulary = range(self.ref_KV.shape[1])
        rows: list[tuple[int, ...]] = [(a,) for a in vocabulary]
        if self.length == 2:
            rows = [
                row for a in vocabulary for row in ([(a,)] if a == self.end else [(a, b) for b in vocabulary])
            ]
        self.answers = list(rows)
        self.tokens_ST = torch.tensor([[*row, *[0] * (self.length - len(row))] for row in rows])
        self.states_ST = torch.tensor([[0, *[1 + row[0]] * (self.length - 1)] for row in rows])
        self.mask_ST = torch.tensor([[t < len(row) for t in range(self.length)] for row in rows])

    def token_logps(self, logps_KV: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token of each response, ``[S, T]``, 0 where there is none."""
        return logps_KV[self.states_ST, self.tokens_ST].masked_fill(~self.mask_ST, 0.0)

    def probabilities(self, probs_KV: torch.Tensor) -> torch.Tensor:
        """Of each whole response, ``[S]``."""
        return self.token_logps(probs_KV.log()).sum(-1).exp()

    def visits(self, probs_KV: torch.Tensor) -> torch.Tensor:
        """Probability of reaching each state, ``[K]``."""
        reached = torch.ones(len(self.ref_KV), dtype=probs_KV.dtype)
        if self.length == 2:
            reached[1:] = probs_KV[0]
        return reached


@dataclass
class Setting:
    """What is trained: the responses, their rewards, and the arguments of the real functions."""

    table: Table
    rewards_S: torch.Tensor
    group_size: int
    baseline: str = "group_mean"
    loss: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``relative_loss``; without a beta the reference is left out of the loss."""
    reduction: Reduction = "constant"
    """Over a constant length of 1, unless it is another."""
    penalty: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """(policy_, ref_ log-probabilities of whole responses) → what is taken from their rewards."""
    sampler: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Policy's log-probabilities ``[K, V]`` → the sampler's; None draws from the policy itself."""
    cap: float | None = None
    """Cap of the importance weights; None leaves them out."""
    stale: bool = False
    """π_old is the sampler's, as after some steps on a rollout."""


def expected_gradient(logits_KV: torch.Tensor, setting: Setting) -> torch.Tensor:
    """∇ of the expected loss at these logits, ``[K, V]``: the real functions over every group."""
    table, size = setting.table, setting.group_size
    logits_KV = logits_KV.detach().requires_grad_(True)
    policy_KV = logits_KV.log_softmax(-1)
    policy_ST = table.token_logps(policy_KV)
    ref_ST = table.token_logps(table.ref_KV.log())
    sampler_KV = policy_KV.detach() if setting.sampler is None else setting.sampler(policy_KV.detach())
    sampler_ST = table.token_logps(sampler_KV)

    drawn_MG = torch.cartesian_prod(*[torch.arange(len(policy_ST))] * size)
    chance_M = sampler_ST.sum(-1)[drawn_MG].sum(-1).exp()
    drawn_MG, chance_M = drawn_MG[chance_M > 0], chance_M[chance_M > 0]
    rewards_S = setting.rewards_S
    if setting.penalty is not None:
        rewards_S = rewards_S - setting.penalty(policy_ST.sum(-1), ref_ST.sum(-1)).detach()
    advantages_MG = group_advantages(rewards_S[drawn_MG], baseline=setting.baseline, scale="none")  # type: ignore[arg-type]

    drawn_N = drawn_MG.flatten()
    mask_NT = table.mask_ST[drawn_N]
    policy_NT = policy_ST[drawn_N]
    importance_NT = None
    if setting.cap is not None:
        importance_NT = truncated_importance_weights(policy_NT.detach(), sampler_ST[drawn_N], setting.cap)
    loss_NT, clipped_NT, _ = relative_loss(
        policy_NT,
        sampler_ST[drawn_N] if setting.stale else policy_NT.detach(),
        ref_ST[drawn_N] if setting.loss.get("beta") else None,
        advantages_MG.flatten(),
        mask_NT,
        importance_NT=importance_NT,
        **setting.loss,
    )
    assert setting.stale or not clipped_NT.any(), "on policy nothing is clipped"
    # The batch holds every group once, so a weight of M·P(group) makes its mean the expectation.
    weights_N = (chance_M * len(chance_M)).repeat_interleave(size)
    count = global_count([mask_NT], setting.reduction, constant=1)
    reduce_tokens(loss_NT, mask_NT, count, setting.reduction, weights_N=weights_N).backward()
    assert logits_KV.grad is not None
    return logits_KV.grad


def descend(
    setting: Setting, *, rate: float = 1.0, steps: int = 2000, tolerance: float = 1e-9
) -> torch.Tensor:
    """Gradient descent from the reference until the gradient is gone; the policy, ``[K, V]``.

    Each logit's gradient is divided by how often its token comes up, which moves no stationary point and
    lets rare tokens arrive as soon as common ones.
    """
    logits_KV = setting.table.ref_KV.log()
    for _ in range(steps):
        probs_KV = logits_KV.softmax(-1)
        often_KV = setting.table.visits(probs_KV)[:, None] * probs_KV
        move_KV = expected_gradient(logits_KV, setting) / often_KV.clamp(min=1e-12)
        logits_KV = logits_KV - rate * move_KV
        if float(move_KV.abs().max()) < tolerance:
            return logits_KV.softmax(-1)
    raise AssertionError(f"still moving by {float(move_KV.abs().max()):.1e} after {steps} steps")
