"""Group Relative Policy Optimization (DeepSeekMath, 2024): sample a group, learn from its contrast.

    A_i  = (r_i − mean(r)) / (std(r) + ε)                        over the G responses to one prompt
    ρ_t  = exp(log π(y_t) − log π_old(y_t))
    ℓ_t  = −min(ρ_t·A_i, clip(ρ_t, 1−ε_low, 1+ε_high)·A_i) + β·KL_t
    L    = mean over responses of (1/|o|)·Σ_t ℓ_t

With ``supervision = "process"`` A_t is the sum of the normalised rewards of the steps that end at t or later
(section 4.1.3). Every other option of the family (``shared/relative_options.py``) is GRPO's too.

Departures from the paper: the standard deviation is the population's (÷G); G is 8 (64); ``π_old`` is the
trainer's own forward pass, never the sampler's numbers; everything is taken at the sampling temperature.

Feedback: a reward function on the text of what was sampled. What KL in the loss converges to depends on the
estimator; see ``objectives/kl.py`` and docs/methods/grpo.md.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result


class GRPOConfig(RelativeOptions):
    """Group Relative Policy Optimization."""


class Config(RelativeConfig):
    """Options of ``trimtab grpo``."""

    section: ClassVar[str] = "grpo"
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run GRPO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
