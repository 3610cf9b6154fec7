"""SimPO, simple preference optimisation without a reference (Meng et al., 2024), on pairs.

    r(y) = β·log π(y|x) / number of tokens
    ℓ    = −log σ(r(y_w) − r(y_l) − γ)                      eq. 6; mean over pairs

The reward is what decoding maximises a token, so that length by itself wins nothing; γ is the margin by which
the chosen response has to lead. Nothing anchors the policy: the paper relies on a low learning rate (3e-7 to
1e-6). Defaults are its Llama-3-Base setting, β 2.0 and γ/β 0.5 (Mistral-Base: 2.0 and 0.8).

Feedback: pairs; rankings or ratings; with ``pairs_from`` labels. One model in memory.
"""

from __future__ import annotations

from pydantic import Field

from trimtab.methods.shared.pairs import BetaOptions, GivenPairs, PairOptions, train_pairs
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result


class SimPOConfig(GivenPairs, BetaOptions):
    """Simple preference optimisation."""

    beta: float = Field(2.0, gt=0, description="scale of the reward, nats a token: larger than DPO's")
    gamma: float = Field(1.0, ge=0, description="margin γ of the reward; the paper tunes γ/β within 0 to 1")


class Config(MethodConfig):
    """Options of ``trimtab simpo``."""

    simpo: SimPOConfig = Field(default_factory=SimPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run SimPO. Raises InputError for anything that the user can mend."""
    given = config.simpo.model_dump(exclude={"pairs_from"})
    options = PairOptions(loss="sigmoid", reference_free=True, logps="mean", **given)
    return train_pairs("simpo", config, options, pairs_from=config.simpo.pairs_from, on_eval=on_eval)
