"""DAPO (Yu et al., 2025): GRPO with four changes for long answers.

    A_i  = (r_i − mean(r)) / (std(r) + ε),   r_i with the length's punishment
    ℓ_t  = −min(ρ_t·A_i, clip(ρ_t, 1 − 0.2, 1 + 0.28)·A_i)       1. the upper clip is higher
    L    = Σ_i Σ_t ℓ_t / Σ_i |o_i|                               2. every token weighs the same
    0 < number of right answers < G                              3. groups without contrast are replaced
    r_i += (limit − buffer − |o_i|)/buffer, within [−1, 0]        4. the last tokens before the limit cost

(eq. 8, 9, 11 and 13). No KL. ``mask_cut_off`` is the paper's overlong filtering, its alternative to 4.

Departures from the paper: contrast is any difference of the rewards as they come, before 4; as many further
prompts are sampled as groups are missing, for at most ``max_refills`` rounds; the buffer is a fifth of
``sampling.max_new_tokens``, the paper's 4,096 of 20,480 tokens.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trimtab.methods.shared.relative import train_relative
from trimtab.methods.shared.relative_options import FIFTH, RelativeConfig, RelativeOptions
from trimtab.methods.shared.setup import OnEval, Result
from trimtab.objectives.reduce import Reduction


class DAPOConfig(RelativeOptions):
    """Decoupled clip and dynamic sampling policy optimization."""

    group_size: int = Field(16, ge=2, description="responses sampled for each prompt (G)")
    beta: float = Field(0.0, ge=0, description="weight of the KL; 0 leaves it out")
    clip_high: float = Field(0.28, gt=0, description="the ratio's upper clip, 1 + this")
    reduction: Reduction = Field("token_mean", description="how token losses become one number")
    dynamic_sampling: bool = Field(
        True, description="replace groups whose rewards are all equal by those of further prompts"
    )
    overlong_buffer: int = Field(
        FIFTH,
        ge=FIFTH,
        description="last tokens before sampling.max_new_tokens over which the reward falls by up to "
        "overlong_penalty; -1 takes a fifth of it, 0 none",
    )


class Config(RelativeConfig):
    """Options of ``trimtab dapo``."""

    section: ClassVar[str] = "dapo"
    dapo: DAPOConfig = Field(default_factory=DAPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run DAPO. Raises InputError for anything that the user can mend."""
    return train_relative(config, on_eval=on_eval)
