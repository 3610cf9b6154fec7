"""Losses on scores that should explain a ranking. ``_K``: responses of a group, the longest group's number.

A lower rank is better and 1 is best; only the order of ranks matters. Scores are rewards, or β times
log-probabilities (nats) for a policy that is trained on rankings without a reward model.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def bradley_terry_loss(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    *,
    margin_P: torch.Tensor | None = None,
    centre: float = 0.0,
) -> torch.Tensor:
    """A reward model's loss on pairs (Bradley and Terry, 1952; Stiennon et al., 2020, section 3.4).

        ℓ = −log σ(r_w − r_l − m) + c·(r_w + r_l)²

    r_w and r_l are the scores of the better and the worse response, ``[P]``. ``margin_P`` asks for a larger
    gap where the preference is clearer (Llama 2; Touvron et al., 2023, eq. 2). ``centre`` fixes what the
    first term leaves open, the rewards' origin: the mean of a pair goes to 0 (Eisenstein et al., 2023). Where
    a response meets several others, (r_i + r_j)² of all pairs also draws their differences together a little.

    Returns the loss ``[P]``. Without centring ∂ℓ/∂r_w = −σ(r_l − r_w + m), and its negative for r_l.
    """
    gap_P = chosen_P - rejected_P
    if margin_P is not None:
        gap_P = gap_P - margin_P.detach()
    loss_P = -F.logsigmoid(gap_P)
    if centre:
        loss_P = loss_P + centre * (chosen_P + rejected_P).square()
    return loss_P


def pairwise_ranking_loss(
    scores_PK: torch.Tensor, ranks_PK: torch.Tensor, mask_PK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every strictly ordered pair of a ranking, logistic, summed (RankNet; Burges et al., 2005, section 3).

        ℓ = Σ_{i, j: rank_i < rank_j} −log σ(s_i − s_j)

    With rewards as scores this is InstructGPT's loss (Ouyang et al., 2022, eq. 1) before its division by the
    number of pairs. Tied responses form no pair with each other. A group of two is one Bradley–Terry pair.

    Returns (loss, pairs), each ``[P]``: the sum and the number of pairs in it, an integer; both are 0 for a
    group in which nothing is ordered. ∂ℓ/∂s_i = −Σ σ(s_j − s_i) over what i beats, plus Σ σ(s_i − s_j) over
    what beats it.
    """
    both_PKK = mask_PK[:, :, None] & mask_PK[:, None, :]
    ordered_PKK = (ranks_PK[:, :, None] < ranks_PK[:, None, :]) & both_PKK
    # Filled before and after: log σ of what does not count would send NaN gradients back, and add ln 2.
    gap_PKK = (scores_PK[:, :, None] - scores_PK[:, None, :]).masked_fill(~ordered_PKK, 0.0)
    loss_PKK = -F.logsigmoid(gap_PKK).masked_fill(~ordered_PKK, 0.0)
    return loss_PKK.sum((1, 2)), ordered_PKK.sum((1, 2))


def plackett_luce_loss(
    scores_PK: torch.Tensor, ranks_PK: torch.Tensor, mask_PK: torch.Tensor
) -> torch.Tensor:
    """−log P(ranking | scores) under Plackett–Luce (Plackett, 1975; ListMLE, Xia et al., 2008).

        ℓ = −Σ_k (s_(k) − log Σ_{j ≥ k} exp s_(j)),        (k) = the response ranked k-th

    The best is drawn by a softmax over all, the next by a softmax over those not yet placed, and so on; the
    last draw is certain and adds 0. A group of two is one Bradley–Terry pair, a group of one has loss 0.

    Returns the loss ``[P]``. ValueError where two counted responses of a group share a rank: the model
    orders all of them.
    """
    itself_KK = torch.eye(scores_PK.shape[1], dtype=torch.bool, device=scores_PK.device)
    both_PKK = mask_PK[:, :, None] & mask_PK[:, None, :]
    if bool((both_PKK & ~itself_KK & (ranks_PK[:, :, None] == ranks_PK[:, None, :])).any()):
        raise ValueError("two responses share a rank: Plackett–Luce orders all of them; leave ties to pairs")
    # Row k: who is still to be placed when k is. A row that does not count holds itself alone and adds 0.
    left_PKK = (both_PKK & (ranks_PK[:, None, :] >= ranks_PK[:, :, None])) | itself_KK
    scores_PK = scores_PK.masked_fill(~mask_PK, 0.0)
    rest_PK = scores_PK[:, None, :].masked_fill(~left_PKK, float("-inf")).logsumexp(-1)
    return (rest_PK - scores_PK).sum(-1)
