"""REINFORCE Leave-One-Out (Ahmadian et al., 2024, "Back to Basics"; Kool et al., 2019).

    R_i = r_i − β·(log π(y_i) − log π_ref(y_i))                  the KL is in the reward, of whole responses
    A_i = R_i − mean of the other R_j
    L   = −mean_i ρ_i·A_i,   ρ_i = π(y_i)/π_old(y_i)             on policy ∇L = −mean_i A_i·∇log π(y_i)

A response is one action: nothing is clipped, divided by a deviation or by a length. The gradient is that of
E[r] − β·KL(π‖π_ref) without bias, and the optimum π_ref·exp(r/β)/Z; tests/theory/ enumerates both.

Departures from the paper: β 0.05, which it tunes by data set; with several steps a rollout the exact ratio
ρ_i weighs each response, where the paper takes one step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result
from trimtab.objectives.advantages import Baseline, Scale
from trimtab.objectives.kl import Estimator
from trimtab.objectives.policy import Ratio, Surrogate
from trimtab.objectives.reduce import Reduction


class RLOOConfig(RelativeOptions):
    """REINFORCE with a leave-one-out baseline."""

    group_size: int = Field(4, ge=2, description="responses sampled for each prompt (k)")
    beta: float = Field(0.05, ge=0, description="weight of the KL; 0 leaves it out")
    kl_in: Literal["loss", "reward"] = Field(
        "reward", description="KL as a term of the loss, or taken from each response's reward"
    )
    kl_estimator: Estimator = Field("k1", description="estimator of the KL term; decides the optimum")
    surrogate: Surrogate = Field("reinforce", description="the ratio as it is, or clipped: clip, cispo")
    ratio: Ratio = Field("response", description="what π/π_old is taken of")
    baseline: Baseline = Field("leave_one_out", description="what a reward is compared with")
    scale: Scale = Field("none", description="what an advantage is divided by")
    reduction: Reduction = Field("response_sum", description="how token losses become one number")


class Config(RelativeConfig):
    """Options of ``trimtab rloo``."""

    section: ClassVar[str] = "rloo"
    rloo: RLOOConfig = Field(default_factory=RLOOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run RLOO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
