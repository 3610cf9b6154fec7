"""What a comparison showed, in sentences that claim no more than the intervals allow.

:func:`verdict` says it method by method, :func:`one_sentence` ends a comparison, :func:`head_to_head` puts
pairs of methods against each other. A method that learned from the judge itself (``sees_judge``) is
marked and never the winner, and a judge that is not better than chance shows nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from trimtab.errors import InputError
from trimtab.evaluation.figures import (
    MISSING,
    decimals,
    display_name,
    duration,
    has,
    interval,
    listed,
    lowered,
    number,
    plain_with_interval,
    share_with_interval,
    written,
)
from trimtab.evaluation.reward_model import better_than_chance

LENGTH_RATIO = 1.5
"""From this ratio of lengths on, the verdict says that length may explain a win."""
GOLD = "Gold reward"
"""What the score that decides is called, unless the summary's ``score_name`` says otherwise."""

Rows = Mapping[str, Mapping[str, Any]]


def rows_of(summary: Mapping[str, Any]) -> Rows:
    """The methods of a summary. Raises InputError if there are none."""
    methods = summary.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise InputError("the summary has no methods: give summary.json as compare writes it")
    return methods


def score_name(summary: Mapping[str, Any]) -> str:
    """The name of ``gold_reward``: on users' own data it is the judging reward model's score."""
    return str(summary.get("score_name") or GOLD)


def marked_name(name: str, method: Mapping[str, Any]) -> str:
    """The display name; of a method that learned from the judge, with that fact."""
    return display_name(name) + (" (sees the judge)" if method.get("sees_judge") else "")


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What the comparison showed, in sentences, the strongest method first.

    A method beats the reference, or loses to it, only if the whole interval of its win rate lies on one
    side of 50 %; otherwise no difference is shown. A win by a method whose responses are at least 1.5
    times as long as the reference's (or as short) is followed by a warning that length may explain it.
    Methods that see the judge come last. Over-optimisation is named: see :func:`_over_optimised`. If the
    judge is not better than chance, none of this is said.

    >>> verdict({"reference": "sft", "methods": {"grpo": {"win_rate": 0.78, "win_rate_ci95": [0.73, 0.82]}}})
    ['GRPO beats SFT: win rate 78 % [73, 82].']
    """
    methods = rows_of(summary)
    sentences = [one_sentence(summary)] if _judge_fails(summary) else _by_score(summary, methods)
    for name, m in methods.items():
        bounds = interval(m, "implicit_accuracy")
        if has(m, "implicit_accuracy") and bounds:
            low, high = (100 * bound for bound in bounds)
            chance = (
                "above chance" if low > 50 else "below chance" if high < 50 else "no different from chance"
            )
            sentences.append(
                f"{display_name(name)}'s implicit reward prefers the chosen answer in "
                f"{100 * m['implicit_accuracy']:.1f} % [{low:.1f}, {high:.1f}] of held-out pairs: {chance}."
            )
    return sentences or [
        f"Nothing was compared: no method has a win rate or a {lowered(score_name(summary))}."
    ]


def one_sentence(summary: Mapping[str, Any]) -> str:
    """The sentence that ends a comparison: which method, by how much, at what cost; or that nothing is shown.

    A winner's whole win-rate interval against the reference lies above 50 %, and it did not see the judge.
    The one with the highest win rate is named; with it every other winner that ``head_to_head`` does not
    separate from it; a winner of quite another length is named with that caveat. The cost is the stage's
    wall time, that of the reward model it learned from, and the tokens that it sampled.

    >>> sft = {"gold_reward": 0.4}
    >>> dpo = {"win_rate": 0.62, "win_rate_ci95": [0.57, 0.67], "wall_s": 300, "generated_tokens": 0}
    >>> ppo = {"win_rate": 0.6, "win_rate_ci95": [0.55, 0.65], "wall_s": 900, "generated_tokens": 81920}
    >>> study = {"reference": "sft", "methods": {"sft": sft, "dpo": dpo}}
    >>> one_sentence(study)
    'DPO beats SFT: win rate 62 % [57, 67], at a cost of 5 min 00 s and 0 generated tokens.'
    >>> one_sentence(study | {"judge": {"pairs": 80, "accuracy": 0.55, "accuracy_ci95": [0.44, 0.66]}})
    "Nothing is shown: the judge's accuracy, 55.0 % [44.0, 66.0] of held-out pairs, is not clear of chance."
    >>> study["methods"]["ppo"] = ppo
    >>> duels = {"dpo>ppo": {"win_rate": 0.52, "ci95": [0.47, 0.57]}}
    >>> print(one_sentence(study | {"head_to_head": duels}))  # doctest: +NORMALIZE_WHITESPACE
    DPO and PPO both beat SFT; no difference shown between them: win rates 62 % [57, 67] and 60 % [55, 65],
    at a cost of 5 min 00 s and 0 generated tokens (DPO) and 15 min 00 s and 81,920 generated tokens (PPO).
    >>> dpo["win_rate"], dpo["win_rate_ci95"] = 0.52, [0.47, 0.57]
    >>> one_sentence({"reference": "sft", "methods": {"sft": sft, "dpo": dpo}})
    'No difference shown: the best against SFT is DPO with a win rate of 52 % [47, 57].'
    """
    methods = rows_of(summary)
    if _judge_fails(summary):
        shown = share_with_interval(summary["judge"], "accuracy", 1)
        if shown == MISSING:
            return "Nothing is shown: the judge's accuracy was not measured."
        return f"Nothing is shown: the judge's accuracy, {shown} of held-out pairs, is not clear of chance."
    fair = {
        name: m
        for name, m in methods.items()
        if name != summary.get("reference") and has(m, "win_rate") and not m.get("sees_judge")
    }
    ranked = sorted(fair, key=lambda name: -fair[name]["win_rate"])
    winners = [name for name in ranked if _side(fair[name]) > 0]
    if not winners:
        return _no_winner(summary, ranked) + "."
    warning = _length_warning(winners[0], fair[winners[0]], summary.get("reference"), methods)
    # The sentence is what gets quoted, so its caveat goes with it.
    return _winner(summary, winners) + (f"; but {warning}" if warning else ".")


def head_to_head(summary: Mapping[str, Any]) -> list[str]:
    """Every pair of methods that was compared directly, one sentence each; none by a judge at chance.

    >>> duels = {"dpo>ppo": {"win_rate": 0.52, "ci95": [0.47, 0.57]}}
    >>> head_to_head({"methods": {"dpo": {}, "ppo": {}}, "head_to_head": duels})
    ['DPO against PPO: no difference shown, win rate 52 % [47, 57].']
    """
    methods = rows_of(summary)
    sentences: list[str] = []
    if _judge_fails(summary):
        return sentences
    for ours, theirs in itertools.combinations(methods, 2):
        duel = _duel(summary, ours, theirs)
        if duel:
            names = marked_name(ours, methods[ours]), marked_name(theirs, methods[theirs])
            sentences.append(_against(*names, duel) + ".")
    return sentences


# --- parts of sentences


def _by_score(summary: Mapping[str, Any], methods: Rows) -> list[str]:
    """What rests on the score of answers."""
    reference = summary.get("reference")
    compared = {name: m for name, m in methods.items() if name != reference and has(m, "win_rate")}
    sentences = []
    for name in sorted(
        compared, key=lambda name: (bool(compared[name].get("sees_judge")), -compared[name]["win_rate"])
    ):
        sentences.append(
            _against(marked_name(name, compared[name]), _reference(summary), compared[name]) + "."
        )
        warning = _length_warning(name, compared[name], reference, methods)
        if warning:
            sentences.append(warning)
    sentences += _best_score(methods, score_name(summary))
    return sentences + _over_optimised(methods, reference, score_name(summary))


def _winner(summary: Mapping[str, Any], winners: list[str]) -> str:
    """The first of the winners against the others, without the full stop."""
    methods, reference, best = rows_of(summary), _reference(summary), display_name(winners[0])
    duels = {name: _duel(summary, winners[0], name) for name in winners[1:]}
    level = [name for name, duel in duels.items() if duel and _side(duel) == 0]
    beaten = [name for name, duel in duels.items() if duel and _side(duel) > 0]
    if level:
        sentence = _undecided([winners[0], *level], reference, methods)
    else:
        sentence = _against(best, reference, methods[winners[0]])
        for name in beaten:
            shown = share_with_interval(duels[name], "win_rate")
            sentence += f", and {display_name(name)} head to head: {shown}"
        cost = _cost(methods[winners[0]])
        sentence += f", at a cost of {cost}" if cost else ""
    for name in duels:
        if name in level or name in beaten:
            continue
        shown = share_with_interval(methods[name], "win_rate")
        sentence += f"; {display_name(name)} beats {reference} too, {shown}, "
        if duels[name]:
            won = share_with_interval(_duel(summary, name, winners[0]), "win_rate")
            sentence += f"and {best} head to head: {won}"
        else:
            sentence += f"and was not compared with {best} head to head"
    return sentence


def _undecided(level: list[str], reference: str, methods: Rows) -> str:
    """Winners of which the first is not separated from the others."""
    names = [display_name(name) for name in level]
    shares = listed([share_with_interval(methods[name], "win_rate") for name in level])
    costs = [f"{_cost(methods[name])} ({display_name(name)})" for name in level if _cost(methods[name])]
    all_of, between = (
        ("both", "them")
        if len(level) == 2
        else ("all", f"{names[0]}, which has the highest win rate, and the others")
    )
    sentence = f"{listed(names)} {all_of} beat {reference}; no difference shown between {between}: "
    return f"{sentence}win rates {shares}" + (f", at a cost of {listed(costs)}" if costs else "")


def _no_winner(summary: Mapping[str, Any], ranked: list[str]) -> str:
    methods, reference = rows_of(summary), _reference(summary)
    if ranked:
        best = f"{display_name(ranked[0])} with a win rate of "
        best += share_with_interval(methods[ranked[0]], "win_rate")
        if all(_side(methods[name]) < 0 for name in ranked):
            sentence = f"No method beats {reference}: the best of those that lose to it is {best}"
        else:
            sentence = f"No difference shown: the best against {reference} is {best}"
    else:
        sentence = "Nothing was compared: no method has a win rate against the reference"
    seeing = [marked_name(name, m) for name, m in methods.items() if m.get("sees_judge") and _side(m) > 0]
    return sentence + (f"; not counted: {listed(seeing)}" if seeing else "")


def _judge_fails(summary: Mapping[str, Any]) -> bool:
    judge = summary.get("judge") or {}
    return bool(judge) and not better_than_chance(judge)


def _reference(summary: Mapping[str, Any]) -> str:
    reference = summary.get("reference")
    return display_name(reference) if reference else "the reference"


def _duel(summary: Mapping[str, Any], ours: str, theirs: str) -> dict[str, Any]:
    """``head_to_head`` from the side of ``ours``, with the keys of a row; empty if it was not measured."""
    duels = summary.get("head_to_head") or {}
    for key, turned in ((f"{ours}>{theirs}", False), (f"{theirs}>{ours}", True)):
        rate, bounds = number(duels.get(key, {}).get("win_rate")), duels.get(key, {}).get("ci95")
        if rate is None:
            continue
        bounds = interval({"win_rate_ci95": bounds}, "win_rate")
        if turned:
            rate, bounds = 1 - rate, bounds and (1 - bounds[1], 1 - bounds[0])
        return {"win_rate": rate, "win_rate_ci95": bounds}
    return {}


def _side(method: Mapping[str, Any]) -> int:
    """On which side of 50 % the whole interval of the win rate lies: 1 above, −1 below, 0 neither."""
    bounds = interval(method, "win_rate")
    if bounds is None or not has(method, "win_rate"):
        return 0
    return 1 if bounds[0] > 0.5 else -1 if bounds[1] < 0.5 else 0


def _cost(method: Mapping[str, Any]) -> str:
    parts = []
    if has(method, "wall_s"):
        more = written(method, "learned_reward_s", duration) if has(method, "learned_reward_s") else ""
        parts.append(
            written(method, "wall_s", duration) + (f" (and {more} for the learned reward)" if more else "")
        )
    if has(method, "generated_tokens"):
        parts.append(written(method, "generated_tokens", "{:,.0f}".format) + " generated tokens")
    return " and ".join(parts)


def _against(ours: str, theirs: str, method: Mapping[str, Any]) -> str:
    """A win rate as a claim, without the full stop."""
    shown, side = share_with_interval(method, "win_rate"), _side(method)
    if interval(method, "win_rate") is None:
        return f"{ours} against {theirs}: win rate {shown} without an interval, so no difference is shown"
    if side:
        return f"{ours} {'beats' if side > 0 else 'loses to'} {theirs}: win rate {shown}"
    return f"{ours} against {theirs}: no difference shown, win rate {shown}"


def _length_warning(name: str, method: Mapping[str, Any], reference: Any, methods: Rows) -> str | None:
    """Judges and reward models favour length (Singhal et al., 2023): a longer winner needs a second look."""
    other = methods.get(reference, {})
    ours, theirs = number(method.get("response_tokens")), number(other.get("response_tokens"))
    if _side(method) <= 0 or not ours or not theirs:
        return None
    ratio = max(ours / theirs, theirs / ours)
    if ratio < LENGTH_RATIO:
        return None
    way = "long" if ours > theirs else "short"
    return (
        f"{display_name(name)}'s responses are {ratio:.1f} times as {way} as {display_name(reference)}'s: "
        "length may explain part of its win."
    )


def _best_score(methods: Rows, score: str) -> list[str]:
    """Which method has the highest gold reward, and whether its interval stands clear of the others'."""
    scored = sorted(
        (name for name, m in methods.items() if has(m, "gold_reward") and not m.get("sees_judge")),
        key=lambda name: -methods[name]["gold_reward"],
    )
    if len(scored) < 2:
        return []
    best = methods[scored[0]]
    kl = written(best, "kl_nats_per_token", decimals)
    sentence = (
        f"Highest {lowered(score)}: {display_name(scored[0])}, {plain_with_interval(best, 'gold_reward')}"
    )
    sentence += "." if kl == MISSING else f", at a KL of {kl} nats per token."
    near = [display_name(name) for name in scored[1:] if not _below(methods[name], best, "gold_reward")]
    if near:
        sentence += f" Its interval is not clear of {listed(near)}, so their order is not settled."
    return [sentence]


def _over_optimised(methods: Rows, reference: Any, score: str) -> list[str]:
    """Methods whose learned (proxy) reward rose while what it stands for fell (Gao et al., 2023).

    Named is a method whose proxy reward's interval lies above the reference's, and whose gold reward's
    interval lies below the reference's; a figure without an interval counts as it stands, the method's own
    gold reward excepted.
    """
    base = methods.get(reference, {})
    sentences = []
    for name, m in methods.items():
        rises = _below(base, m, "proxy_reward", points=True)
        if not rises or interval(m, "gold_reward") is None or not _below(m, base, "gold_reward", points=True):
            continue
        moves = [
            f"{what} {way} from {plain_with_interval(base, key)} to {plain_with_interval(m, key)}"
            for what, way, key in (
                ("proxy reward", "rises", "proxy_reward"),
                (lowered(score), "falls", "gold_reward"),
            )
        ]
        sentences.append(f"{display_name(name)} is over-optimised: its {moves[0]} while the {moves[1]}.")
    return sentences


def _below(low: Mapping[str, Any], high: Mapping[str, Any], key: str, points: bool = False) -> bool:
    """Whether the whole interval of the one lies below that of the other.

    A figure without an interval is not known to, or (``points``) is taken as an interval of no width.
    """
    (_, top), (bottom, _) = (_range(m, key, points) for m in (low, high))
    return top is not None and bottom is not None and top < bottom


def _range(method: Mapping[str, Any], key: str, points: bool) -> tuple[float | None, float | None]:
    value = number(method.get(key)) if points else None
    return interval(method, key) or (value, value)
