"""Group Sequence Policy Optimization (Zheng et al., 2025): GRPO with one ratio a response.

    s_i = exp(mean_t (log π(y_t) − log π_old(y_t)))              the tokens' geometric mean (eq. 7)
    ℓ_i = −min(s_i·A_i, clip(s_i, 1 − 3e-4, 1 + 4e-4)·A_i)       A_i as in GRPO (eq. 5)
    L   = mean_i ℓ_i

Rewards are of responses, so ratio and clip are: a response is clipped whole or not at all. A mean over many
tokens moves little, so the clips are small. ``ratio = "sequence_token"`` is GSPO-token (eq. 13 and 14): the
same numbers with an advantage a token. With one token a response it is GRPO. ``reduction = "response_sum"``
weighs a response by its length, as LUSPO does.

Departures from the paper: KL, which it leaves out of its equations, has weight 0; the group's size, which it
does not state, is GRPO's here.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result
from trimtab.objectives.policy import Ratio


class GSPOConfig(RelativeOptions):
    """Group Sequence Policy Optimization."""

    beta: float = Field(0.0, ge=0, description="weight of the KL; 0 leaves it out")
    ratio: Ratio = Field("sequence", description="what π/π_old is taken of")
    clip_low: float = Field(3e-4, gt=0, le=1, description="the ratio's lower clip, 1 − this; 1 has none")
    clip_high: float = Field(4e-4, gt=0, description="the ratio's upper clip, 1 + this")


class Config(RelativeConfig):
    """Options of ``trimtab gspo``."""

    section: ClassVar[str] = "gspo"
    gspo: GSPOConfig = Field(default_factory=GSPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run GSPO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
