"""Reductions: by hand, and the promise that how a batch is split never changes its gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from trimtab.objectives.policy import relative_loss
from trimtab.objectives.preference import dpo_loss
from trimtab.objectives.reduce import Reduction, global_count, reduce_items, reduce_tokens, response_sums
from trimtab.objectives.supervised import sft_loss

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
MASK = torch.tensor([[True, False, False], [True, True, True]])
LOSS = torch.tensor([[4.0, 99.0, 99.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
# One response of one token, loss 4; one of three tokens, losses 1, 2, 3.
BY_HAND = {
    "token_mean": 2.5,  # (4 + 6)/4
    "response_mean": 3.0,  # (4 + 2)/2
    "response_sum": 5.0,  # (4 + 6)/2
    "constant": 0.625,  # (4 + 6)/(2·8)
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_by_hand(reduction: Reduction) -> None:
    count = global_count([MASK], reduction, constant=8)
    assert reduce_tokens(LOSS, MASK, count, reduction).item() == pytest.approx(BY_HAND[reduction])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shares_of_a_split_add_up(reduction: Reduction) -> None:
    count = global_count((MASK[:1], MASK[1:]), reduction, constant=8)
    shares = [reduce_tokens(LOSS[i : i + 1], MASK[i : i + 1], count, reduction).item() for i in range(2)]
    assert sum(shares) == pytest.approx(BY_HAND[reduction])


def test_the_mean_of_means_is_another_number() -> None:
    # The token mean of each micro-batch, 4 and 2, averaged: 3.0 instead of 2.5.
    means = [
        reduce_tokens(LOSS[i : i + 1], MASK[i : i + 1], float(MASK[i].sum()), "token_mean").item()
        for i in range(2)
    ]
    assert sum(means) / 2 == pytest.approx(3.0)


def test_weights_multiply_a_responses_share() -> None:
    # Weights 2 and 0.5: token mean (2·4 + 0.5·6)/4 = 2.75; a count that were weighted too would give
    # 11/(2·1 + 0.5·3) = 3.1429.
    weights = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert reduce_tokens(LOSS, MASK, 4.0, "token_mean", weights_N=weights).item() == pytest.approx(2.75)
    # Response mean: (2·4 + 0.5·2)/2 = 4.5.
    assert reduce_tokens(LOSS, MASK, 2.0, "response_mean", weights_N=weights).item() == pytest.approx(4.5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_responses_without_counted_tokens_count_for_nothing(reduction: Reduction) -> None:
    mask = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.bool)])
    loss = torch.cat([LOSS, torch.full((2, 3), 7.0, dtype=torch.float64)])
    count = global_count([mask], reduction, constant=8)
    assert reduce_tokens(loss, mask, count, reduction).item() == pytest.approx(BY_HAND[reduction])


def test_nothing_to_count_is_zero_and_no_nan() -> None:
    mask = torch.zeros(1, 3, dtype=torch.bool)
    loss = LOSS[:1].clone().requires_grad_()
    for reduction in REDUCTIONS:
        total = reduce_tokens(loss, mask, global_count([mask], reduction), reduction)
        assert total.item() == 0.0
        assert not torch.autograd.grad(total, loss)[0].any()


def test_masked_infinities_do_not_leak() -> None:
    loss = LOSS.masked_fill(~MASK, torch.inf).requires_grad_()
    reduce_tokens(loss, MASK, 4.0, "token_mean").backward()
    assert loss.grad is not None
    assert torch.equal(loss.grad, MASK.double() / 4)


def test_items_and_sums_by_hand() -> None:
    assert reduce_items(torch.tensor([1.0, 2.0, 6.0]), 3).item() == pytest.approx(3.0)
    assert reduce_items(torch.tensor([1.0, 2.0]), 2, weights_P=torch.tensor([4.0, 0.0])).item() == 2.0
    assert response_sums(LOSS, MASK).tolist() == [4.0, 6.0]


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        global_count([MASK], "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_gradcheck(reduction: Reduction) -> None:
    loss = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    count = global_count([MASK], reduction, constant=8)
    assert torch.autograd.gradcheck(
        lambda values: reduce_tokens(values, MASK, count, reduction, weights_N=weights), (loss,)
    )


# Split into micro-batches = whole, for every loss: a batch of 8 responses (4 pairs) of unequal lengths, one
# of a single token, whose log-probabilities all depend on the same six weights.
N, T = 8, 5
LENGTHS = [5, 1, 3, 2, 4, 5, 1, 2]
LENGTH_MASK = torch.arange(T)[None, :] < torch.tensor(LENGTHS)[:, None]


def fixed(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FEATURES, OLD, REF = fixed(0, N, T, 6), -fixed(1, N, T).abs(), -fixed(2, N, T).abs()
ADVANTAGES, WEIGHTS = fixed(3, N), fixed(4, N).abs()

Share = Callable[[torch.Tensor, list[int], float], torch.Tensor]


def policy_logps(theta: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return -torch.nn.functional.softplus(FEATURES[rows] @ theta)


def sft_share(reduction: Reduction) -> Share:
    def share(theta: torch.Tensor, rows: list[int], count: float) -> torch.Tensor:
        loss = sft_loss(policy_logps(theta, rows))
        return reduce_tokens(loss, LENGTH_MASK[rows], count, reduction, weights_N=WEIGHTS[rows])

    return share


def grpo_share(reduction: Reduction, level: str) -> Share:
    def share(theta: torch.Tensor, rows: list[int], count: float) -> torch.Tensor:
        mask = LENGTH_MASK[rows]
        loss, *_ = relative_loss(
            policy_logps(theta, rows),
            OLD[rows],
            REF[rows],
            ADVANTAGES[rows],
            mask,
            beta=0.1,
            kl_level=level,  # type: ignore[arg-type]
        )
        return reduce_tokens(loss, mask, count, reduction)

    return share


def dpo_share(theta: torch.Tensor, pairs: list[int], count: float) -> torch.Tensor:
    """Pair p is responses 2p (chosen) and 2p + 1."""
    chosen, rejected = [2 * p for p in pairs], [2 * p + 1 for p in pairs]

    def sums(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return response_sums(values, LENGTH_MASK[rows])

    loss, *_ = dpo_loss(
        sums(policy_logps(theta, chosen), chosen),
        sums(policy_logps(theta, rejected), rejected),
        sums(REF[chosen], chosen),
        sums(REF[rejected], rejected),
        beta=0.3,
    )
    return reduce_items(loss, count, weights_P=WEIGHTS[chosen])


def gradient(share: Share, parts: list[list[int]], counts: list[float]) -> torch.Tensor:
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    for rows, count in zip(parts, counts, strict=True):
        share(theta, rows, count).backward()
    assert theta.grad is not None
    return theta.grad


def random_split(items: int, draw: random.Random) -> list[list[int]]:
    order = list(range(items))
    draw.shuffle(order)
    cuts = sorted(draw.sample(range(1, items), draw.randrange(1, items)))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, items], strict=True)]


def check_splits(share: Share, items: int, count: Callable[[list[int]], float]) -> None:
    everything = list(range(items))
    whole = gradient(share, [everything], [count(everything)])
    draw = random.Random(0)
    worst_mean_of_means = 0.0
    for _ in range(20):
        parts = random_split(items, draw)
        split = gradient(share, parts, [count(everything)] * len(parts))
        assert ((split - whole).norm() / whole.norm()).item() < 1e-12
        # The bug: each part divided by its own count, then the mean over parts.
        own = gradient(share, parts, [count(rows) * len(parts) for rows in parts])
        worst_mean_of_means = max(worst_mean_of_means, ((own - whole).norm() / whole.norm()).item())
    assert worst_mean_of_means > 0.05


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["sft", "grpo-token", "grpo-sequence"])
def test_split_into_micro_batches_is_the_whole(name: str, reduction: Reduction) -> None:
    share = sft_share(reduction) if name == "sft" else grpo_share(reduction, name.removeprefix("grpo-"))
    check_splits(share, N, lambda rows: global_count([LENGTH_MASK[rows]], reduction, constant=4))


def test_dpo_split_into_micro_batches_is_the_whole() -> None:
    check_splits(dpo_share, N // 2, lambda pairs: float(len(pairs)))
