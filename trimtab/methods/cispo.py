"""CISPO (MiniMax-M1, 2025, eq. 4 and 5): clip the importance weight, not the update.

    w_t = sg[clip(ρ_t, 1 − ε_low, 1 + ε_high)]                   sg stops the gradient
    ℓ_t = −w_t·A_i·log π(y_t)                                    A_i as in GRPO
    L   = Σ_i Σ_t ℓ_t / Σ_i |o_i|

Where PPO's clip drops a token, here it goes on teaching with a bounded weight: rare words at which reasoning
turns are not lost. On policy w = 1 and the gradient is REINFORCE's.

Departures from the paper: it tunes ε_high and does not print it; 4 bounds weights by 5, what TRL recommends
after Khatri et al., 2025. As in the paper there is no lower bound (ε_low 1) and no KL. Its dynamic sampling
and length penalty are the options ``dynamic_sampling`` and ``overlong_buffer``, off by default.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result
from trimtab.objectives.policy import Surrogate
from trimtab.objectives.reduce import Reduction


class CISPOConfig(RelativeOptions):
    """Clipped importance-weight policy optimization."""

    beta: float = Field(0.0, ge=0, description="weight of the KL; 0 leaves it out")
    surrogate: Surrogate = Field("cispo", description="a clipped weight on log π; or clip, reinforce")
    clip_low: float = Field(1.0, gt=0, le=1, description="the weight's lower bound, 1 − this; 1 has none")
    clip_high: float = Field(4.0, gt=0, description="the weight's upper bound, 1 + this")
    reduction: Reduction = Field("token_mean", description="how token losses become one number")


class Config(RelativeConfig):
    """Options of ``trimtab cispo``."""

    section: ClassVar[str] = "cispo"
    cispo: CISPOConfig = Field(default_factory=CISPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run CISPO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
