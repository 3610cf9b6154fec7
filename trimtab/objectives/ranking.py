"""Losses on scores that should explain a ranking. ``_K``: responses of a group, the longest group's number.

A lower rank is better and 1 is best; only the order of ranks matters. Scores are rewards, or β times
log-probabilities (nats) for a policy that is trained on rankings without a reward model.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
from torch.nn import functional as F

Ties = Literal["exact", "refuse"]

LARGEST_TIE = 10
"""Responses that may share one place above the last: 2^10 subsets are summed over."""


def bradley_terry_loss(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    *,
    margin_P: torch.Tensor | None = None,
    target_P: torch.Tensor | None = None,
    centre: float = 0.0,
) -> torch.Tensor:
    """A reward model's loss on pairs (Bradley and Terry, 1952; Stiennon et al., 2020, section 3.4).

        ℓ = −log σ(r_w − r_l − m) + c·(r_w + r_l)²
        ℓ = −p·log σ(r_w − r_l) − (1 − p)·log σ(r_l − r_w) + c·(r_w + r_l)²          with a soft label p

    r_w and r_l are the scores of the better and the worse response, ``[P]``. ``margin_P`` asks for a larger
    gap where the preference is clearer (Llama 2; Touvron et al., 2023, eq. 2). ``centre`` fixes what the
    first term leaves open, the rewards' origin: the mean of a pair goes to 0 (Eisenstein et al., 2023). Where
    a response meets several others, (r_i + r_j)² of all pairs also draws their differences together a little.
    ``target_P`` is the probability that the response called chosen is the better one (the share of annotators
    who say so); its minimum is r_w − r_l = log(p/(1 − p)), so certainty is not learned where people disagree.

    Returns the loss ``[P]``. Without centring ∂ℓ/∂r_w = −σ(r_l − r_w + m), or σ(r_w − r_l) − p, and its
    negative for r_l. Margins and targets carry no gradient; ValueError where both are given, since they ask
    for different gaps.
    """
    gap_P = chosen_P - rejected_P
    loss_P = _preferred(gap_P, margin_P, target_P)
    if centre:
        loss_P = loss_P + centre * (chosen_P + rejected_P).square()
    return loss_P


def _preferred(gap: torch.Tensor, margin: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor:
    """−log of the probability of a preference, from the better score less the worse."""
    if margin is not None and target is not None:
        raise ValueError("give margins or soft labels, not both: they ask for different gaps")
    if target is not None:
        target = target.detach()
        return -target * F.logsigmoid(gap) - (1 - target) * F.logsigmoid(-gap)
    return -F.logsigmoid(gap if margin is None else gap - margin.detach())


def pairwise_ranking_loss(
    scores_PK: torch.Tensor,
    ranks_PK: torch.Tensor,
    mask_PK: torch.Tensor,
    *,
    margin_PKK: torch.Tensor | None = None,
    target_PKK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every strictly ordered pair of a ranking, logistic, summed (RankNet; Burges et al., 2005, section 3).

        ℓ = Σ_{i, j: rank_i < rank_j} −log σ(s_i − s_j − m_ij)

    With rewards as scores this is InstructGPT's loss (Ouyang et al., 2022, eq. 1) before its division by the
    number of pairs. Tied responses form no pair with each other. A group of two is one Bradley–Terry pair.
    ``margin_PKK[p, i, j]`` and ``target_PKK[p, i, j]`` belong to i as the better one of i and j, and mean
    what they mean in :func:`bradley_terry_loss`; anything that broadcasts to ``[P, K, K]`` will do.

    Returns (loss, pairs), each ``[P]``: the sum and the number of pairs in it, an integer; both are 0 for a
    group in which nothing is ordered. ∂ℓ/∂s_i = −Σ σ(s_j − s_i) over what i beats, plus Σ σ(s_i − s_j) over
    what beats it.
    """
    both_PKK = mask_PK[:, :, None] & mask_PK[:, None, :]
    ordered_PKK = (ranks_PK[:, :, None] < ranks_PK[:, None, :]) & both_PKK
    # Filled before and after: log σ of what does not count would send NaN gradients back, and add ln 2.
    gap_PKK = (scores_PK[:, :, None] - scores_PK[:, None, :]).masked_fill(~ordered_PKK, 0.0)
    loss_PKK = _preferred(gap_PKK, margin_PKK, target_PKK).masked_fill(~ordered_PKK, 0.0)
    return loss_PKK.sum((1, 2)), ordered_PKK.sum((1, 2))


def plackett_luce_loss(
    scores_PK: torch.Tensor, ranks_PK: torch.Tensor, mask_PK: torch.Tensor, *, ties: Ties = "exact"
) -> torch.Tensor:
    """−log P(ranking | scores) under Plackett–Luce (Plackett, 1975; ListMLE, Xia et al., 2008).

        ℓ = −Σ_k (s_(k) − log Σ_{j ≥ k} exp s_(j)),        (k) = the response ranked k-th

    The best is drawn by a softmax over all, the next by a softmax over those not yet placed, and so on; the
    last draw is certain and adds 0. A group of two is one Bradley–Terry pair, a group of one has loss 0.

    Equal ranks are an order that is not known. ``ties = "exact"`` is the exact marginal, the probability of
    all strict rankings that agree with what is known (Kalbfleisch and Prentice, 1973, for the likelihood of
    the same form in Cox's model; "exactm" in Stata's rank-ordered logit):

        P(tied D before the rest) = Σ over orders σ of D of Π_k exp s_σ(k) / Σ_{j not yet placed} exp s_j

    So a tie in the last place costs nothing, and a ranking of the k best alone is written by giving all the
    others one rank. Breslow's and Efron's approximations of it have neither property. A tie says nothing of
    whether its members are equally good: it neither draws their scores together nor apart. (Models in which
    ties are outcomes of their own, such as Davidson's, have a parameter more.) The sum over orders is taken
    over subsets, all terms positive, and a tie above the last place holds at most LARGEST_TIE responses.

    Returns the loss ``[P]``. ValueError for a larger tie, and, with ``ties = "refuse"``, for any tie.
    """
    both_PKK = mask_PK[:, :, None] & mask_PK[:, None, :]
    itself_KK = torch.eye(scores_PK.shape[1], dtype=torch.bool, device=scores_PK.device)
    equal_PKK = (both_PKK & (ranks_PK[:, :, None] == ranks_PK[:, None, :])) | itself_KK
    tied_PK = equal_PKK.sum(-1) > 1
    if ties == "refuse" and bool(tied_PK.any()):
        raise ValueError('two responses share a rank, which ties = "refuse" does not allow')
    # Row k: who is still to be placed when k is. A row that does not count holds itself alone and adds 0.
    left_PKK = (both_PKK & (ranks_PK[:, None, :] >= ranks_PK[:, :, None])) | itself_KK
    scores_PK = scores_PK.masked_fill(~mask_PK, 0.0)
    rest_PK = scores_PK[:, None, :].masked_fill(~left_PKK, float("-inf")).logsumexp(-1)
    loss_P = (rest_PK - scores_PK).masked_fill(tied_PK, 0.0).sum(-1)
    for p, k in tied_PK.nonzero().tolist():
        members, below = equal_PKK[p, k], left_PKK[p, k] & ~equal_PKK[p, k]
        if k == int(members.int().argmax()) and bool(below.any()):
            loss = _tie(scores_PK[p, members], scores_PK[p, below].logsumexp(0))
            loss_P = loss_P.index_add(0, torch.tensor([p], device=loss_P.device), loss[None])
    return loss_P


def _tie(tied_M: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """−log P that all of ``tied_M`` are drawn before the rest, whose log Σ exp is ``below``; a scalar.

    f(S), the probability that the first |S| drawn are just the set S, is Σ_{i ∈ S} f(S∖i)·P(i after S∖i).
    """
    size = len(tied_M)
    if size > LARGEST_TIE:
        raise ValueError(f"{size} responses share a place above the last; at most {LARGEST_TIE} may")
    log_f = tied_M.new_zeros(1)
    for *places, left in _subsets(size):
        before_SM, drawn_SM = (torch.tensor(at, device=tied_M.device) for at in places)
        left_SM = tied_M.masked_fill(~torch.tensor(left, device=tied_M.device), float("-inf"))
        all_S = torch.cat([left_SM, below.expand(len(left), 1)], 1).logsumexp(1)
        log_f = (log_f[before_SM] + tied_M[drawn_SM] - all_S[before_SM]).logsumexp(1)
    return -log_f[0]


@functools.cache
def _subsets(size: int) -> list[tuple[list[list[int]], list[list[int]], list[list[bool]]]]:
    """For each number of drawn members: of every such subset its subsets one smaller, by place, and who is
    drawn then; and of each smaller subset who is left.
    """
    out = []
    smaller: list[tuple[int, ...]] = [()]
    for count in range(1, size + 1):
        place = {subset: at for at, subset in enumerate(smaller)}
        subsets = list(itertools.combinations(range(size), count))
        before = [[place[s[:i] + s[i + 1 :]] for i in range(count)] for s in subsets]
        left = [[member not in subset for member in range(size)] for subset in smaller]
        out.append((before, [list(s) for s in subsets], left))
        smaller = subsets
    return out
