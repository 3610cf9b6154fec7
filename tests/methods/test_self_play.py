"""Couples from rewards, and their loss on one tree. The numbers are worked out by hand in the comments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate
from trimtab.groups import Group, Response
from trimtab.methods.shared.pairs import PairOptions, pair_losses
from trimtab.methods.shared.self_play import (
    Couple,
    accumulate_couples,
    compared,
    couple_losses,
    couples_of,
    meetings,
    own_responses,
    win_rate,
)
from trimtab.models.load import ModelConfig, load_model
from trimtab.objectives.preference import PAIR_LOSSES, ipo_loss, sigmoid_loss
from trimtab.training.config import TrainConfig
from trimtab.training.optimiser import Optimiser


def group(*rewards: float, name: str = "g", **more: Any) -> Group:
    """Responses of 1, 2, 3 … tokens, all different."""
    responses = [
        Response(tokens=[7 + i + k for k in range(i + 1)], reward=value) for i, value in enumerate(rewards)
    ]
    return Group(id=name, prompt_tokens=[40, 41], responses=responses, **more)


def test_who_meets_whom() -> None:
    assert meetings(3, 0, "self") == [(0, 1), (0, 2), (1, 2)]
    # Five responses, the last two the reference's.
    assert meetings(5, 2, "reference") == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    assert len(meetings(5, 2, "both")) == 10


def test_couples_by_hand() -> None:
    four = group(0.2, 0.9, 0.9, 0.1)
    every = meetings(4, 0, "self")
    # The tie of 1 and 2 is left out; of the equally wide gaps 0.8 (1, 3) comes before (2, 3).
    assert couples_of(four, every, "all") == [(1, 0), (2, 0), (0, 3), (1, 3), (2, 3)]
    assert couples_of(four, every, "best_worst") == [(1, 3)]
    # Among meetings with the reference alone, responses 2 and 3: neither (0, 1) nor (1, 3)'s twin (2, 3).
    across = meetings(4, 2, "reference")
    assert couples_of(four, across, "all") == [(2, 0), (0, 3), (1, 3)]
    assert couples_of(four, across, "best_worst") == [(1, 3)]


def test_ties_and_twins_give_no_couple() -> None:
    pair = group(0.5, 0.5)
    assert couples_of(pair, [(0, 1)], "best_worst") == couples_of(pair, [(0, 1)], "all") == []
    twins = group(0.0, 1.0)
    twins.responses[1].tokens = list(twins.responses[0].tokens or [])
    assert couples_of(twins, [(0, 1)], "all") == []
    assert compared(twins, [])[0].responses == []


def test_what_is_compared_keeps_the_very_responses() -> None:
    four = group(0.2, 0.9, 0.5, 0.1)
    tree, couples = compared(four, [(1, 3), (3, 0)])
    assert [id(r) for r in tree.responses] == [id(four.responses[k]) for k in (0, 1, 3)]
    assert couples == [(1, 2), (2, 0)]


def test_win_rate_by_hand() -> None:
    # Two of the policy's, 0.9 and 0.2, against 0.2: a win and a tie; then 0.1 and 0.4 against 0.4.
    groups = [group(0.9, 0.2, 0.2), group(0.1, 0.4, 0.4)]
    assert win_rate(groups, 1) == (1 + 0.5 + 0 + 0.5) / 4
    own, theirs = own_responses(groups, 1)
    assert [len(g.responses) for g in own] == [2, 2]
    assert [r.reward for r in theirs] == [0.2, 0.4]


# ---------------------------------------------------------------- the loss on a tree


class Fixed:
    """Says the given log-probabilities; padding is what must not count."""

    layout = "tree"

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        longest = max(map(len, rows))
        filled = [[*row, *[-99.0] * (longest - len(row))] for row in rows]
        self.logps_NT = torch.tensor(filled, dtype=torch.float64, requires_grad=True)

    def token_logprobs(self, batch: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logps_NT, torch.zeros_like(self.logps_NT)


def three() -> tuple[Group, Any]:
    """log π −1, −4 (−1.5 − 2.5), −6 (−1 − 2 − 3); log π_ref −2, −3, −7: h = 1, −1, 1."""
    tree = group(0.0, 0.0, 0.0)
    for response, ref in zip(tree.responses, ([-2.0], [-1.0, -2.0], [-3.0, -2.0, -2.0]), strict=True):
        response.ref_logps = ref
    return tree, Fixed([[-1.0], [-1.5, -2.5], [-1.0, -2.0, -3.0]])


def losses(
    tree: Group, lm: Any, couples: Sequence[Couple], loss: Any, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    better_C, worse_C = torch.tensor(couples).T
    return couple_losses(lm, [tree], collate([tree]), better_C, worse_C, loss, beta)


def test_losses_by_hand() -> None:
    # β = 0.5. (0, 1): 0.5·(1 + 1) = 1, −log σ(1) = 0.3133. (1, 2): −1, 1.3133. (0, 2): 0, 0.6931.
    # Means over tokens in place of sums: h = 1, −½, ⅓, and (1, 2) would be −log σ(−5/12) = 0.9226.
    # The reference forgotten: (0, 1) would be 0.5·(−1 + 4) = 1.5, 0.2014.
    tree, lm = three()
    loss_C, shown = losses(tree, lm, [(0, 1), (1, 2), (0, 2)], sigmoid_loss, 0.5)
    assert loss_C.tolist() == pytest.approx([0.3133, 1.3133, 0.6931], abs=5e-5)
    assert shown["chosen_reward"].tolist() == [0.5, -0.5, 0.5]
    assert shown["rejected_reward"].tolist() == [-0.5, 0.5, 0.5]
    assert shown["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert shown["rejected_tokens"].tolist() == [2, 3, 3]
    assert not shown["chosen_reward"].requires_grad
    # IPO, 1/(2β) = 1: (2 − 1)², (−2 − 1)², (0 − 1)².
    assert losses(tree, lm, [(0, 1), (1, 2), (0, 2)], ipo_loss, 0.5)[0].tolist() == [1.0, 9.0, 1.0]


def test_the_gradient_makes_the_better_likelier_and_skips_padding() -> None:
    tree, lm = three()
    losses(tree, lm, [(0, 1), (0, 2)], sigmoid_loss, 0.5)[0].sum().backward()
    # −β·(σ(−1) + σ(0)) for response 0, +β·σ(−1) = 0.1345 and +β·½ for each token of the other two.
    first, second, third = lm.logps_NT.grad.tolist()
    assert first == pytest.approx([-0.5 * (0.26894 + 0.5), 0, 0], abs=1e-5)
    assert second == pytest.approx([0.13447, 0.13447, 0], abs=1e-5)
    assert third == pytest.approx([0.25, 0.25, 0.25])


def test_masked_tokens_change_nothing() -> None:
    tree, lm = three()
    tree.responses[2].mask = [True, True, False]
    tree.responses[2].ref_logps = [-3.0, -2.0]  # of counted tokens
    # Response 2 without its last token: −3 against −5, h = 2; (2, 1) is 0.5·(2 + 1) = 1.5, 0.2014.
    loss_C, _ = losses(tree, lm, [(2, 1)], sigmoid_loss, 0.5)
    assert loss_C.tolist() == pytest.approx([0.2014], abs=5e-5)
    loss_C.sum().backward()
    assert lm.logps_NT.grad[2].tolist()[2] == 0
    with torch.no_grad():
        lm.logps_NT[2, 2] = 50.0
    assert losses(tree, lm, [(2, 1)], sigmoid_loss, 0.5)[0].tolist() == loss_C.tolist()


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "sppo", "exo"])
def test_gradcheck(name: str) -> None:
    tree, lm = three()
    given = lm.logps_NT.detach().clone().requires_grad_(True)
    smoothed = {"label_smoothing": 0.1} if name == "exo" else {}
    loss = functools.partial(PAIR_LOSSES[name], **smoothed)

    def of(logps_NT: torch.Tensor) -> torch.Tensor:
        lm.logps_NT = logps_NT
        return losses(tree, lm, [(0, 1), (1, 2), (0, 2)], loss, 0.3)[0]

    assert torch.autograd.gradcheck(of, (given,))


# ---------------------------------------------------------------- on a model


@pytest.fixture
def lm(tiny_model: Path) -> Any:
    model = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))
    model.model.double()
    return model


def scored() -> list[Group]:
    """Groups of unequal size, weight and number of couples, one of a single pair."""
    groups = [
        group(0.3, 0.1, 0.9, name="a", weight=0.5),
        group(0.3, 0.4, name="b", weight=2.0),
        group(0.1, 0.2, 0.3, 0.4, name="c"),
    ]
    for one in groups:
        for response in one.responses:
            response.ref_logps = [-3.0 - 0.1 * t for t in range(len(response.tokens or []))]
    return groups


def gradients(lm: Any, groups: list[Group], max_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    lm.model.zero_grad()
    optimiser = Optimiser(lm.model, TrainConfig(), torch.float64)

    def couples(one: Group) -> list[Couple]:
        return couples_of(one, meetings(len(one.responses), 0, "self"), "all")

    loss, _ = accumulate_couples(lm, optimiser, groups, couples, sigmoid_loss, 0.2, max_tokens)
    return loss, {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}


def test_one_tree_for_all_couples_is_as_a_tree_for_each(lm: Any) -> None:
    """A response in three couples is computed once; pair by pair, as DPO has them, the sum is the same."""
    groups = scored()
    loss, ours = gradients(lm, groups, 4096)
    pairs = []
    for one in groups:
        for better, worse in couples_of(one, meetings(len(one.responses), 0, "self"), "all"):
            sides = [(better, True), (worse, False)]
            responses = [dataclasses.replace(one.responses[k], preferred=p) for k, p in sides]
            pairs.append(dataclasses.replace(one, responses=responses))
    assert len(pairs) == 3 + 1 + 6
    lm.model.zero_grad()
    batch = collate(pairs)
    loss_P, _ = pair_losses(lm, pairs, batch, PairOptions(), beta=0.2)
    total = (loss_P * batch.weights_N[::2]).sum() / 10
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-12)
    assert loss != pytest.approx(math.log(2), abs=1e-2)
    for name, parameter in lm.model.named_parameters():
        assert torch.allclose(parameter.grad, ours[name], atol=1e-8), name


def test_micro_batches_add_up(lm: Any) -> None:
    whole, one = gradients(lm, scored(), 4096)
    parts, other = gradients(lm, scored(), 12)
    assert parts == pytest.approx(whole, abs=1e-12)
    assert all(torch.allclose(one[name], other[name], atol=1e-8) for name in one)
