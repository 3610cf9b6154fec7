"""ORPO, odds ratio preference optimisation (Hong et al., 2024): tuning and preference in one stage, on pairs.

    log p(y)   = log π(y|x) / number of tokens,     odds(y) = p(y) / (1 − p(y))
    ℓ          = −log p(y_w) − β·log σ(log odds(y_w) − log odds(y_l))         eq. 6 and 7, β their λ

The first term is SFT on the chosen response, so that a base model can be started from; there is no reference.
Feedback: pairs; rankings or ratings; with ``pairs_from`` labels. One model in memory.

Departures: the likelihood is the response's alone, a mean over its tokens and then over pairs
(``nll_reduction = "token_mean"`` weighs every token alike); TRL counts the prompt's tokens in it too.
"""

from __future__ import annotations

from pydantic import Field

from trimtab.methods.shared.pairs import BetaOptions, GivenPairs, NLLReduction, PairOptions, train_pairs
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result


class ORPOConfig(GivenPairs, BetaOptions):
    """Odds ratio preference optimisation."""

    beta: float = Field(
        0.1, gt=0, description="the paper's λ: weight of the odds ratio beside the likelihood"
    )
    nll_reduction: NLLReduction = Field(
        "response_mean", description="of the likelihood: every pair weighs the same, or every token"
    )


class Config(MethodConfig):
    """Options of ``trimtab orpo``."""

    orpo: ORPOConfig = Field(default_factory=ORPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run ORPO. Raises InputError for anything that the user can mend."""
    given = config.orpo.model_dump(exclude={"pairs_from"})
    options = PairOptions(loss="odds", reference_free=True, logps="mean", nll_weight=1.0, **given)
    return train_pairs("orpo", config, options, pairs_from=config.orpo.pairs_from, on_eval=on_eval)
