"""Dr. GRPO (Liu et al., 2025, "Understanding R1-Zero-Like Training"): GRPO without its two divisors.

    A_i  = r_i − mean(r)                                         no standard deviation
    ℓ_t  = −min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i)                no KL
    L    = Σ_i Σ_t ℓ_t / (number of responses · a constant length)   no 1/|o_i|

Dividing by the deviation makes very easy and very hard prompts weigh more, dividing by |o_i| makes long wrong
answers cheaper. Without both, on policy, the gradient is that of the expected reward times (G−1)/G, which the
sample's own part in the mean takes, over the constant length; tests/theory/ enumerates it.

Departure from the paper: the constant is ``sampling.max_new_tokens`` unless ``constant_length`` says another.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result
from trimtab.objectives.advantages import Scale
from trimtab.objectives.reduce import Reduction


class DrGRPOConfig(RelativeOptions):
    """Group Relative Policy Optimization done right."""

    beta: float = Field(0.0, ge=0, description="weight of the KL; 0 leaves it out")
    scale: Scale = Field("none", description="what an advantage is divided by")
    reduction: Reduction = Field("constant", description="how token losses become one number")


class Config(RelativeConfig):
    """Options of ``trimtab dr-grpo``."""

    section: ClassVar[str] = "dr_grpo"
    dr_grpo: DrGRPOConfig = Field(default_factory=DrGRPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run Dr. GRPO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
