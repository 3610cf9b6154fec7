"""What a response is worth by its place among the others of its group, where scores only say an order.

Each turns rewards ``[P, G]`` into values ``[P, G]``, which are then treated as rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def places(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last place that each response takes, from 0, ``[P, G]``; they differ under a tie."""
    above_PG = (rewards_PG[..., None, :] > rewards_PG[..., :, None]).sum(-1)
    equal_PG = (rewards_PG[..., None, :] == rewards_PG[..., :, None]).sum(-1)
    return above_PG, above_PG + equal_PG - 1


def listwise_gains(rewards_PG: torch.Tensor, gains: Sequence[float]) -> torch.Tensor:
    """The gain of each response's place, ``[P, G]``; those that tie share the mean of their places'.

    ``gains`` are those of the first place, the second …; every further place has the last one's. So
    (1, 0) is winner takes all, and three that share the first place have 1/3 each.
    """
    size = rewards_PG.shape[-1]
    table = [gains[min(place, len(gains) - 1)] for place in range(size)]
    sums = torch.tensor([0.0, *table], dtype=rewards_PG.dtype, device=rewards_PG.device).cumsum(0)
    first_PG, last_PG = places(rewards_PG)
    return (sums[last_PG + 1] - sums[first_PG]) / (last_PG - first_PG + 1)


def dcg_gains(size: int) -> list[float]:
    """The discounts of DCG (Järvelin and Kekäläinen, 2002): 1/log2(place + 1), places from 1."""
    return [
        1.0 / float(torch.log2(torch.tensor(place + 1.0, dtype=torch.float64)))
        for place in range(1, size + 1)
    ]


def bradley_terry_shares(rewards_PG: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Soft labels, ``[P, G]``: the mean over the others j of P(i beats j) = σ((r_i − r_j)/temperature).

    Between 0 and 1, ½ on average over the group. A temperature near 0 gives win shares (a tie ½), a high
    one nearly nothing. ValueError unless it is above 0, and for a group of one.
    """
    size = rewards_PG.shape[-1]
    if size < 2:
        raise ValueError("a Bradley–Terry label needs at least two responses a prompt")
    if not temperature > 0:
        raise ValueError(f"the temperature of Bradley–Terry labels must be above 0, not {temperature}")
    beats_PGG = torch.sigmoid((rewards_PG[..., :, None] - rewards_PG[..., None, :]) / temperature)
    # A response's own entry is σ(0) = ½.
    return (beats_PGG.sum(-1) - 0.5) / (size - 1)
