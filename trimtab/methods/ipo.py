"""Identity Preference Optimisation (Azar et al., 2023) on pairs.

    h(y) = log π(y|x) − log π_ref(y|x)
    ℓ    = (h(y_w) − h(y_l) − 1/(2β))²                      eq. 17, β their τ; mean over pairs

A regression: the gap is drawn to 1/(2β) and, once wider, back again, so that pairs that were judged once
(or always alike) do not drive it to infinity as in DPO. Sums over tokens, as published; ``logps = "mean"``
divides each side by its number of tokens, which TRL does. The rest is DPO's.

Feedback: pairs; rankings or ratings; with ``pairs_from`` labels.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trimtab.methods.shared.pairs import BetaOptions, GivenPairs, PairOptions, train_pairs
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result


class IPOConfig(GivenPairs, BetaOptions):
    """Identity Preference Optimisation."""

    beta: float = Field(0.1, gt=0, description="the paper's τ: the gap to reach is 1/(2β) nats")
    logps: Literal["sum", "mean"] = Field(
        "sum", description="of a response: summed over its tokens, or divided by their number"
    )
    reference: str = Field("", description="folder or hub name of the reference; empty takes model.path")


class Config(MethodConfig):
    """Options of ``trimtab ipo``."""

    ipo: IPOConfig = Field(default_factory=IPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run IPO. Raises InputError for anything that the user can mend."""
    given = config.ipo.model_dump(exclude={"pairs_from"})
    options = PairOptions(loss="ipo", **given)
    return train_pairs("ipo", config, options, pairs_from=config.ipo.pairs_from, on_eval=on_eval)
