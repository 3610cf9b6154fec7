"""Losses on scores that should equal something given: ratings, and whether a step is right.

``_N`` responses, ``_A`` attributes, ``_S`` steps of a response. Unreduced, and 0 where nothing counts.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rating_loss(scores_NA: torch.Tensor, ratings_NA: torch.Tensor, known_NA: torch.Tensor) -> torch.Tensor:
    """Squared error of each rating (regression reward models; Wang et al., 2024, HelpSteer2).

        ℓ = (r − y)²                                            ∂ℓ/∂r = 2·(r − y)

    ``scores_NA`` has one output for each attribute, ``ratings_NA`` what people gave, in the same unit, and
    ``known_NA`` is False where an attribute was not rated. Its minimum over r is the mean rating of such
    responses. Returns the loss ``[N, A]`` in the unit squared, 0 where not known; ratings are detached.
    """
    gap_NA = (scores_NA - ratings_NA.detach()).masked_fill(~known_NA, 0.0)
    return gap_NA.square()


def step_loss(logits_NS: torch.Tensor, labels_NS: torch.Tensor, mask_NS: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each step (Lightman et al., 2023; Wang et al., 2024, Math-Shepherd).

        p = σ(z)                                                the probability that the step is right
        ℓ = −y·log p − (1 − y)·log(1 − p)                       ∂ℓ/∂z = p − y

    z is what the head gives at the step's last token. Labels are 0, 1, or between: the share of
    continuations from there that came out right. The minimum over p is the mean label of such steps.
    Returns the loss ``[N, S]`` in nats, 0 where ``mask_NS`` is False; labels are detached. ValueError for a
    counted label outside [0, 1].
    """
    labels_NS = labels_NS.detach().masked_fill(~mask_NS, 0.0)
    if bool(((labels_NS < 0) | (labels_NS > 1) | labels_NS.isnan()).any()):
        raise ValueError("a step's label is a probability, from 0 to 1")
    logits_NS = logits_NS.masked_fill(~mask_NS, 0.0)
    loss_NS = -labels_NS * F.logsigmoid(logits_NS) - (1 - labels_NS) * F.logsigmoid(-logits_NS)
    return loss_NS.masked_fill(~mask_NS, 0.0)
