"""Situations and the method for each, argued by hand from the sources: for the tests of ``trimtab choose``.

Sources: the production guide and the textbook chapter (docs/method-notes.md), the papers of docs/papers.md,
our own measurements (docs/results.md).
"""

from __future__ import annotations

from typing import Any

from trimtab.planning.choosing.situation import Situation, parse_have, with_thumbs


def at(have: str = "", **more: Any) -> Situation:
    """A situation from ``--have`` and the rest."""
    rows, ups, downs = with_thumbs(parse_have(have)) if have else ({}, None, None)
    return Situation(rows, **{"ups": ups, "downs": downs} | more)


VERIFIER = {"verifier": "math"}
REWARD = {"reward_model": "runs/rm/model"}
JUDGE = {"judge": "judges.py:mine"}

SITUATIONS: list[tuple[str, Situation, str, str | None]] = [
    # --- offline
    ("pairs alone: both texts start with DPO; IPO is the same run where margins run away", at("pairs:20k"),
     "dpo", "ipo"),
    ("memory is no reason for SimPO here: DPO's reference is computed once", at("pairs:20k", tuned="yes"),
     "dpo", "ipo"),
    ("a base model with pairs alone: SFT then DPO, 7.77 in ours; ORPO (7.00) is one stage (the chapter)",
     at("pairs:20k", tuned="no"), "dpo", "orpo"),
    ("a base model with demonstrations too: SFT then DPO (the guide's FAQ), ORPO not needed",
     at("pairs:20k,demonstrations:5k", tuned="no"), "dpo", "ipo"),
    ("noisy pairs: DPO with a robust loss; KTO leaves what looks mislabelled alone",
     at("pairs:20k", noisy="yes"), "dpo", "kto"),
    ("few pairs that always agree: DPO's margin may have no end, IPO's has (Azar et al.); level in ours",
     at("pairs:2k", noisy="no"), "dpo", "ipo"),
    ("many clean pairs: the chapter's own case for DPO", at("pairs:50k", noisy="no"), "dpo", "ipo"),
    ("better answers are mostly longer: SimPO's reward is a mean a token, but 7.22 in ours",
     at("pairs:20k", longer=0.8), "dpo", "simpo"),
    ("… but 55 % is no bias", at("pairs:20k", longer=0.55), "dpo", "ipo"),
    ("answers must stay short: as above", at("pairs:20k", keep_short="yes"), "dpo", "simpo"),
    ("… and both together count once", at("pairs:20k", longer=0.8, keep_short="yes"), "dpo", "simpo"),
    ("rankings of several: measured 7.94 against DPO's 7.77", at("rankings:5k"), "rank", "dpo"),
    ("ratings of several answers are read as their order", at("ratings:5k"), "rank", "dpo"),
    ("mostly pairs with a few rankings: pairs decide", at("pairs:20k,rankings:1k"), "dpo", "ipo"),
    ("thumbs only: KTO (the chapter, its paper); the guide's pairs with random negatives come second",
     at("thumbs:20k"), "kto", "dpo"),
    ("thumbs nine to one: KTO, weighed", at("ups:9k,downs:1k"), "kto", "dpo"),
    ("thumbs up alone cannot be told from anything: imitate them", at("ups:9k,downs:0"), "sft", None),
    ("pairs and as many thumbs: DPO; together they did worse in our newsroom (7.28)",
     at("pairs:5k,thumbs:5k"), "dpo", "kto"),
    ("a few pairs among many thumbs: the bulk decides", at("pairs:500,thumbs:20k"), "kto", "dpo"),
    ("neither enough alone: both in one run", at("pairs:250,thumbs:250"), "mixed", "sft"),
    ("50 pairs show nothing: imitate the better answers and collect", at("pairs:50"), "sft", None),
    ("demonstrations only: SFT, then SPIN", at("demonstrations:5k", tuned="no"), "sft", "spin"),
    ("demonstrations that the model has learned: SPIN is left", at("demonstrations:5k", tuned="these"),
     "spin", "sft"),
    # --- something scores new answers
    ("a verifier: GRPO (the chapter's guide)", at("prompts:8k", **VERIFIER), "grpo", "dr-grpo"),
    ("a verifier and long reasoning: DAPO's four changes, GRPO next",
     at("prompts:17k", reasoning="yes", **VERIFIER), "dapo", "grpo"),
    ("a verifier, and answers must not grow: Dr. GRPO", at("prompts:8k", keep_short="yes", **VERIFIER),
     "dr-grpo", "grpo"),
    ("a mixture of experts: a ratio a response", at("prompts:8k", experts=True, **VERIFIER), "gspo", "grpo"),
    ("dear samples or a mixture of experts mean nothing where nothing is sampled",
     at("pairs:20k", experts=True), "dpo", "ipo"),
    ("sampling is dear, many steps a rollout: CISPO", at("prompts:8k", reuse="yes", **VERIFIER),
     "cispo", "grpo"),
    ("a verifier beside pairs: what it checks is worth more (8.9 against 7.8)", at("pairs:20k", **VERIFIER),
     "grpo", "dr-grpo"),
    ("… unless nothing has to be explored", at("pairs:20k", exploration="no", **VERIFIER), "dpo", "grpo"),
    ("a reward model: level in ours, RLOO has no critic", at("prompts:20k", **REWARD), "rloo", "ppo"),
    ("a reward model and exploration: PPO (the guide)", at("prompts:20k", exploration="yes", **REWARD),
     "ppo", "rloo"),
    ("several rewards: PPO (the guide)", at("prompts:20k", **VERIFIER, **REWARD), "ppo", "grpo"),
    ("tools and many turns: PPO and GRPO alike (the guide), so the verifier decides",
     at("prompts:20k", long_horizon="yes", **VERIFIER), "grpo", "dr-grpo"),
    ("many turns, pairs alone: a reward is learned and sampled for", at("pairs:60k", long_horizon="yes"),
     "rloo", "ppo"),
    ("a judge: online DPO, 7.97; GRPO on its ranks is the guide's", at("prompts:20k", **JUDGE),
     "online-dpo", "grpo"),
    ("a judge beside pairs: asked while it trains (7.97 against 7.77)", at("pairs:20k", **JUDGE),
     "online-dpo", "dpo"),
    # --- a scorer has to be made first
    ("pairs and exploration: a reward model, then PPO (the guide)", at("pairs:60k", exploration="yes"),
     "ppo", "rloo"),
    ("single ratings compare nothing: a reward by regression, then RLOO", at("scores:20k"), "rloo", "ppo"),
    ("labelled steps and exploration: GRPO, with that reward model as a stage before it",
     at("steps:5k", exploration="yes"), "grpo", "ppo"),
    ("labelled steps: a reward model of steps, then GRPO on it", at("steps:5k"), "grpo", None),
    ("a few labelled steps beside pairs: the pairs", at("pairs:20k,steps:10"), "dpo", "ipo"),
    # --- the goal is a reward model
    ("a reward model of pairs", at("pairs:20k", goal="reward"), "reward", None),
    ("a reward model of steps", at("steps:5k", goal="reward"), "process-reward", None),
]  # fmt: skip
