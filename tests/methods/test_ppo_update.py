"""One whole update of PPO against the formulas of its docstring, written out sequence by sequence.

Rollout → token rewards → GAE → whitening → losses → gradients of the policy and of the critic. No tree, no
padding, no masks: loops over lists. Each likely bug, put into these loops, gives visibly other gradients.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimtab.groups import Group, Response
from trimtab.methods import ppo
from trimtab.methods.shared.critic import load_critic
from trimtab.models.load import load_model
from trimtab.models.roles import frozen_copy
from trimtab.training.optimiser import Optimiser
from trimtab.training.run import Run
from trimtab.training.state import State

BETA, GAMMA, LAM = 0.3, 0.97, 0.9
LOW, HIGH, VALUE_CLIP = 0.1, 0.15, 0.05
TEMPERATURE, ENTROPY, PENALTY, CAP = 0.8, 0.02, 0.7, 1.1

Gradients = dict[str, torch.Tensor]


@pytest.fixture
def setting(configured: Callable[..., Any]) -> Callable[..., Any]:
    """Three models that differ, four groups of which a step takes two, and the configuration."""

    def make(importance: str) -> tuple[Any, ...]:
        config = configured(
            "ppo",
            model__dtype="float64",
            train__batch_groups=2,
            train__micro_batch_tokens=24,
            sampling__temperature=TEMPERATURE,
            ppo__rollout_groups=4,
            ppo__beta=BETA,
            ppo__gamma=GAMMA,
            ppo__lam=LAM,
            ppo__clip_low=LOW,
            ppo__clip_high=HIGH,
            ppo__value_clip=VALUE_CLIP,
            ppo__missing_end_penalty=PENALTY,
            ppo__entropy_bonus=ENTROPY,
            ppo__importance=importance,
            # Elsewhere a cap would have no effect, and say so.
            **({"ppo__importance_cap": CAP} if importance == "always" else {}),
        )
        lm = load_model(config.model)
        reference = frozen_copy(lm)
        critic = load_critic(config.critic, config.model, lm)
        for model, seed, size in ((lm, 1, 0.02), (reference, 2, 0.02), (critic, 3, 0.3)):
            disturb(model.model, seed, size)
        return config, lm, reference, critic, groups()

    return make


def disturb(model: torch.nn.Module, seed: int, size: float) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype))


def groups() -> list[Any]:
    """Two answers each of unequal length, a part of them cut off; ``sampler_logps`` a little off."""
    draw = random.Random(5)
    made = []
    for g, (prompt, lengths) in enumerate([(5, (6, 2)), (2, (1, 4)), (3, (5, 3)), (4, (2, 6))]):
        responses = [
            Response(
                tokens=[draw.randrange(64) for _ in range(length)],
                sampler_logps=[-4 + draw.random() for _ in range(length)],
                finish="length" if length > 4 else "stop",
                reward=draw.uniform(-2, 2),
            )
            for length in lengths
        ]
        tokens = [draw.randrange(64) for _ in range(prompt)]
        made.append(Group(id=str(g), prompt_tokens=tokens, responses=responses))
    return made


# ---------------------------------------------------------------- ours


def ours(setting: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Gradients, Gradients, Any, Any]:
    """The gradients of one step of ``learn`` after ``assess``, its metrics, and the state."""
    config, lm, reference, critic, rollout = setting
    state = State(Optimiser(lm.model, config.train, torch.float64))
    state.others["critic"] = Optimiser(critic.model, config.train, torch.float64)
    state.controllers |= {"beta": BETA, "rollouts": 1}
    state.micro_batch_tokens = config.train.micro_batch_tokens
    run = Run("ppo", config, config.run, config.train)
    ppo.evaluate_rollout(lm, critic, reference, rollout, config, state.micro_batch_tokens)
    ppo.assess(rollout, config, state)
    moved(lm, critic)
    seen: dict[int, Gradients] = {}

    def keep(self: Optimiser, lr: float) -> float:
        seen[id(self)] = {name: p.grad.clone() for name, p in self.masters.items() if p.grad is not None}
        return 0.0

    monkeypatch.setattr(Optimiser, "step", keep)
    metrics = ppo.learn(lm, critic, rollout[:2], config, run, state, 10)
    return seen[id(state.optimiser)], seen[id(state.others["critic"])], metrics, state


def moved(lm: Any, critic: Any) -> None:
    """As earlier steps would have: ratios differ from 1 and values from the old ones, some past a clip."""
    disturb(lm.model, 11, 0.02)
    disturb(critic.model, 12, 0.02)


# ---------------------------------------------------------------- the formulas, one sequence at a time


def forward(lm: Any, prompt: list[int], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(y_t) and the entropy of π(·|s_t), at the temperature."""
    logits = lm.model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    logp = (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return logp[range(len(tokens)), tokens], -(logp.exp() * logp).sum(-1)


def value(critic: Any, prompt: list[int], tokens: list[int], late: int = 0) -> torch.Tensor:
    """V(s_t), s_t being the prompt and what was said before token t."""
    hidden = critic.model.model(torch.tensor([prompt + tokens]), use_cache=False).last_hidden_state[0]
    values = hidden @ critic.model.score.weight[0]
    return values[len(prompt) - 1 + late : len(prompt) - 1 + late + len(tokens)]


def theirs(setting: tuple[Any, ...], bug: str = "") -> tuple[Gradients, Gradients, dict[str, float]]:
    config, lm, reference, critic, rollout = setting
    late = 1 if bug == "values one token late" else 0
    rows = [(g.prompt_tokens, r) for g in rollout for r in g.responses]
    old, old_values, advantages, returns, rollout_kl = [], [], [], [], []
    with torch.no_grad():
        for prompt, r in rows:
            T = len(r.tokens)
            logps, refs = forward(lm, prompt, r.tokens)[0], forward(reference, prompt, r.tokens)[0]
            values = value(critic, prompt, r.tokens, late)
            rollout_kl += (logps - refs).tolist()
            rewards = (BETA if bug == "KL sign" else -BETA) * (logps - refs)
            rewards[T - 1 if bug != "reward at the first token" else 0] += r.reward
            if r.finish == "length" and bug != "no penalty":
                rewards[-1] -= PENALTY
            after = torch.cat([values[1:], values.new_zeros(1)])
            delta = rewards + GAMMA * after - values
            discounts = (GAMMA * LAM) ** torch.arange(T, dtype=torch.float64)
            gae = [(discounts[: T - t] * delta[t:]).sum() for t in range(T)]
            old.append(logps)
            old_values.append(values)
            advantages.append(torch.stack(gae))
            returns.append(advantages[-1] + values)
    everything = torch.cat(advantages[:4] if bug == "whitening a mini-batch" else advantages)
    if bug == "whitening over padding":
        everything = torch.cat([everything, everything.new_zeros(8 * 6 - len(everything))])
    if bug != "no whitening":
        mean, std = everything.mean(), (everything.var(correction=1) + 1e-8).sqrt()
        advantages = [(a - mean) / std for a in advantages]

    moved(lm, critic)
    learnt = range(4)  # the responses of the first two groups
    count = sum(len(rows[i][1].tokens) for i in learnt)
    policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
    clipped, value_clipped, entropies, kls = 0, 0, 0.0, 0.0
    for i in learnt:
        prompt, r = rows[i]
        logps, entropy = forward(lm, prompt, r.tokens)
        ratio = (logps - old[i]).exp()
        held = ratio.clamp(1 - LOW, 1 + HIGH)
        surrogate = torch.minimum(ratio * advantages[i], held * advantages[i]) + ENTROPY * entropy
        if config.ppo.importance == "always":
            drawn = torch.tensor(r.sampler_logps, dtype=torch.float64)
            surrogate = surrogate * (old[i] - drawn).exp().clamp(max=CAP)
        policy_loss = policy_loss - surrogate.sum() / count
        clipped += int((held * advantages[i] < ratio * advantages[i]).sum())
        entropies += float(entropy.detach().sum()) / count
        d = (logps - forward(reference, prompt, r.tokens)[0]).detach()
        kls += float(((-d).exp() + d - 1).sum()) / count
        values = value(critic, prompt, r.tokens, late)
        near = old_values[i] + (values - old_values[i]).clamp(-VALUE_CLIP, VALUE_CLIP)
        free, bound = (values - returns[i]) ** 2, (near - returns[i]) ** 2
        value_loss = value_loss + 0.5 * torch.maximum(free, bound).sum() / count
        value_clipped += int((bound > free + 1e-12).sum())
    gradients = []
    for loss, model in ((policy_loss, lm.model), (value_loss, critic.model)):
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names])
        gradients.append(dict(zip(names, found, strict=True)))
    left = torch.cat(returns) - torch.cat(old_values)
    figures = {
        "loss": policy_loss.item(),
        "value_loss": value_loss.item(),
        "clip_fraction": clipped / count,
        "value_clip_fraction": value_clipped / count,
        "entropy": entropies,
        "kl": kls,
        "rollout_kl": sum(rollout_kl) / len(rollout_kl),
        "explained_variance": float(1 - left.var() / torch.cat(returns).var()),
    }
    return gradients[0], gradients[1], figures


def apart(ours: Gradients, theirs: Gradients) -> float:
    """The largest difference, as a share of the largest entry."""
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / largest


@pytest.mark.usefixtures("norms_in_their_own_dtype")
@pytest.mark.parametrize("importance", ["never", "always"])
def test_the_gradients_are_those_of_the_formulas(
    importance: str, setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, critic, metrics, _ = ours(setting(importance), monkeypatch)
    their_policy, their_critic, figures = theirs(setting(importance))
    assert apart(policy, their_policy) < 1e-9
    assert apart(critic, their_critic) < 1e-9
    for key, figure in figures.items():
        assert metrics[key] == pytest.approx(figure, abs=1e-9), key
    # Every branch was taken: some ratios and values clipped, not all.
    assert 0 < metrics["clip_fraction"] < 1
    assert 0 < metrics["value_clip_fraction"] < 1
    # And the rewards in the log are the raw ones, of the two groups learned from.
    assert metrics["reward_mean"] == pytest.approx(
        sum(r.reward for g in groups()[:2] for r in g.responses) / 4
    )
    assert metrics["cut_off"] == 0.25
    assert math.isclose(metrics["beta"], BETA)


@pytest.mark.usefixtures("norms_in_their_own_dtype")
@pytest.mark.parametrize(
    ("bug", "in_critic"),
    [
        ("values one token late", True),
        ("KL sign", True),
        ("reward at the first token", True),
        ("no penalty", True),
        ("no whitening", False),
        ("whitening a mini-batch", False),
        ("whitening over padding", False),
    ],
)
def test_a_likely_bug_would_be_seen(bug: str, in_critic: bool, setting: Callable[..., Any]) -> None:
    right, wrong = theirs(setting("auto")), theirs(setting("auto"), bug)
    assert apart(right[0], wrong[0]) > 1e-2
    assert (apart(right[1], wrong[1]) > 1e-2) == in_critic


@pytest.mark.usefixtures("norms_in_their_own_dtype")
def test_time_passes_over_a_masked_token(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole in the mask (a tool's output) has no KL, value or loss of its own; what follows sees it."""
    made = setting("auto")
    response = made[4][0].responses[0]
    response.mask = [True, True, False, True, True, True]
    response.sampler_logps = response.sampler_logps[:5]
    ours(made, monkeypatch)
    _, lm, reference, critic, rollout = setting("auto")
    prompt, tokens, keep = rollout[0].prompt_tokens, response.tokens, [0, 1, 3, 4, 5]
    with torch.no_grad():
        logps, refs = forward(lm, prompt, tokens)[0][keep], forward(reference, prompt, tokens)[0][keep]
        values = value(critic, prompt, tokens)[keep]
    rewards = -BETA * (logps - refs)
    rewards[-1] += response.reward - PENALTY
    delta = rewards + GAMMA * torch.cat([values[1:], values.new_zeros(1)]) - values
    returns = [
        float(values[t] + sum((GAMMA * LAM) ** (k - t) * delta[k] for k in range(t, 5))) for t in range(5)
    ]
    assert response.returns == pytest.approx(returns, abs=1e-9)
