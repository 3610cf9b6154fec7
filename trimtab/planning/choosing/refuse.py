"""Situations that nothing can be made of, each refused in one line that says what is missing."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.errors import InputError
from trimtab.planning.choosing.needs import learns_a_reward, samples_scored
from trimtab.planning.choosing.situation import TOO_FEW, Situation


def check(s: Situation) -> None:
    """Raises InputError for a situation that nothing can be made of, or that contradicts itself."""
    if not s.rows and not s.scorer:
        raise InputError(
            "trimtab choose: nothing is given; name a file (--data pairs.jsonl) or amounts "
            "(--have pairs:20000,thumbs:500), and what can score a new answer (--verifier, --reward-model, "
            "--judge)"
        )
    if not s.rows:
        raise InputError(
            "trimtab choose: there is nothing to answer: prompts are missing; give --data or "
            "--have prompts:NUMBER"
        )
    only_prompts = s.rows == s.count("prompts")
    if only_prompts and not s.scorer:
        raise InputError(
            "trimtab choose: prompts alone hold no feedback: name what scores an answer to them (--verifier, "
            "--reward-model or --judge), or let a judge label answers (trimtab label)"
        )
    if s.goal == "reward" and only_prompts:
        raise InputError(
            "trimtab choose: prompts alone teach no reward model: let a judge label answers to them first "
            "(trimtab label), and give its rows"
        )
    if s.exploration == "yes" and s.goal == "policy" and not s.scorer and not learns_a_reward(s):
        raise InputError(
            "trimtab choose: --exploration yes, but nothing can score an answer that the data do not hold: "
            "name a --verifier, a --judge or a --reward-model; or compare answers first (trimtab label with "
            f"a judge writes pairs): from {TOO_FEW} comparisons on a reward model can be learned"
        )
    _check_options(s)
    if s.noisy == "no" and (s.flips or 0) >= 0.1:
        raise InputError(
            f"trimtab choose: --noisy no, but {s.wrong} of the labels are said to be wrong; leave one out"
        )


def _check_options(s: Situation) -> None:
    """Raises InputError for what would be given and have no effect."""
    if s.goal == "reward":
        names = (
            "verifier",
            "reward_model",
            "judge",
            "exploration",
            "reasoning",
            "long_horizon",
            "keep_short",
        )
        given = [name for name in (*names, "reuse") if getattr(s, name) not in ("", "unknown")]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(
                f"trimtab choose: {shown} with --goal reward has no effect: a reward model learns from given "
                "feedback alone; leave it out"
            )
    if s.judge and (s.verifier or s.reward_model):
        other = "--verifier" if s.verifier else "--reward-model"
        raise InputError(
            f"trimtab choose: --judge beside {other}: a choice is made for one of them; leave one out, and "
            "add it to reward.terms in the recipe if both are to score"
        )
    if s.tuned == "these" and not s.count("demonstrations"):
        raise InputError(
            "trimtab choose: --tuned these has no effect without demonstrations: say --tuned yes, or give "
            "the demonstrations that the model was tuned on"
        )
    if s.keep_short == "yes" and not s.scorer and s.comparisons < TOO_FEW and not learns_a_reward(s):
        raise InputError(
            "trimtab choose: --keep-short has no effect on what learns from thumbs, demonstrations or few "
            f"comparisons: give {TOO_FEW} comparisons or what scores an answer, or leave it out"
        )
    if s.reuse == "yes" and not samples_scored(s):
        raise InputError(
            "trimtab choose: --reuse is about rollouts, and nothing scores samples here: name a --verifier, "
            "a --judge or a --reward-model, or leave it out"
        )


def nothing_left(s: Situation, ruled_out: Mapping[str, str]) -> str:
    """Why no method is left, and what would help."""
    if s.goal == "reward":
        why = ruled_out["process-reward" if s.count("steps") else "reward"]
        return (
            f"trimtab choose: no reward model can be learned: {why}; collect more, or let a "
            "judge label answers (trimtab label), then trimtab reward"
        )
    if s.count("steps"):
        return (
            f"trimtab choose: {s.count('steps'):,} answers in labelled steps are too few to learn a reward "
            f"of steps from: {TOO_FEW} at least; collect more, or name a --verifier, a --judge or a "
            "--reward-model"
        )
    if s.count("thumbs"):
        return (
            f"trimtab choose: {s.count('thumbs'):,} thumbs down and nothing else say what to avoid "
            "and not what "
            "to do: add thumbs up, pairs or demonstrations"
        )
    if s.count("scores"):
        return (
            f"trimtab choose: {s.count('scores'):,} single ratings are too few to learn a reward from "
            f"({TOO_FEW} at least), and compare nothing: collect more, or rate several answers to each prompt"
        )
    return "trimtab choose: no method can learn from this; see docs/choose.md for what each one needs"
