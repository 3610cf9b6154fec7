"""Direct Preference Optimization (Rafailov et al., 2023) on pairs, and the losses that grew from it.

    r̂(y) = β·(log π(y|x) − log π_ref(y|x))
    ℓ    = −log σ(r̂(y_w) − r̂(y_l))                        mean over pairs, weighted by the group's weight

Feedback: pairs; a ranking or ratings of K responses give every pair without a tie; with ``pairs_from``
labels.

Log-probabilities are summed over a response's tokens, end token included, as in the paper. The
reference's are computed once, before the first step, and kept with the pairs; then the reference is dropped,
so one model is in memory while training. Chosen and rejected share their prompt in one tree.
``loss``, ``label_smoothing``, ``gamma``, ``logps`` and ``nll_weight`` change the formula (shared/pairs.py).
"""

from __future__ import annotations

from pydantic import Field

from trimtab.methods.shared.pairs import GivenPairs, PairOptions, train_pairs
from trimtab.methods.shared.setup import MethodConfig, OnEval, Result


class DPOConfig(GivenPairs, PairOptions):
    """Direct Preference Optimization."""


class Config(MethodConfig):
    """Options of ``trimtab dpo``."""

    dpo: DPOConfig = Field(default_factory=DPOConfig)


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run DPO. Raises InputError for anything that the user can mend."""
    return train_pairs("dpo", config, config.dpo, pairs_from=config.dpo.pairs_from, on_eval=on_eval)
