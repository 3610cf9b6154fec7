"""Scorers in a mixture: whole groups at once, several outputs, and what happens where there is no value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import Mixture, RewardConfig, RewardTerm, Scored
from trimtab.rewards.functions import build_mixture, load_function


class Table:
    """A scorer that looks its answers up by the response's text."""

    def __init__(self, answers: dict[str, Scored], outputs: dict[str, float] | None = None) -> None:
        self.answers = answers
        self.outputs = {"": 1.0} if outputs is None else outputs
        self.notes = ["a table"]
        self.models = 1
        self.calls: list[list[str]] = []

    def score(self, groups: list[Group]) -> list[list[Scored]]:
        self.calls.append([group.id for group in groups])
        return [[self.answers[str(r.text)] for r in group.responses] for group in groups]

    def facts(self) -> dict[str, float]:
        return {"table_calls": float(len(self.calls))}


def group(id: str, *texts: str) -> Group:
    return Group(id=id, prompt="p", responses=[Response(text=text) for text in texts])


def words(prompt: str, response: str, **columns: Any) -> float:
    return float(len(response.split()))


def test_a_scorer_is_called_once_on_all_groups() -> None:
    table = Table({"a": {"": 2.0}, "b": {"": -1.0}, "c d": {"": 0.5}})
    mixture = Mixture([RewardTerm("learned", 3.0, table), RewardTerm("words", 0.5, words)])
    groups = [group("g:0", "a", "b"), group("g:1", "c d")]
    report = mixture.score(groups)
    assert table.calls == [["g:0", "g:1"]]
    assert [r.reward for g in groups for r in g.responses] == [6.5, -2.5, 2.5]
    assert groups[0].responses[1].reward_terms == {"learned": -1.0, "words": 1.0}
    assert list(groups[0].responses[1].reward_terms) == ["learned", "words"], "the order of the terms"
    assert report.facts == {"table_calls": 1.0}
    assert (report.scored, report.skipped) == (3, 0)
    assert mixture.notes == ["a table"]
    assert mixture.models == 1


def test_named_outputs_have_weights_of_their_own() -> None:
    table = Table({"a": {"toxic": 0.25, "true": 1.0}}, {"toxic": -2.0, "true": 1.0})
    one = group("g:0", "a")
    Mixture([RewardTerm("model", 0.5, table)]).score([one])
    assert one.responses[0].reward_terms == {"model/toxic": 0.25, "model/true": 1.0}
    assert one.responses[0].reward == pytest.approx(0.5 * (-2 * 0.25 + 1.0))


def test_what_two_scorers_count_is_added() -> None:
    tables = [Table({"a": {"": 1.0}}), Table({"a": {"": 1.0}})]
    mixture = Mixture([RewardTerm(str(i), 1.0, table) for i, table in enumerate(tables)])
    assert mixture.score([group("g:0", "a")]).facts == {"table_calls": 2.0}


def test_a_reason_in_place_of_values_stops_the_run_in_one_line() -> None:
    mixture = Mixture([RewardTerm("judge", 1.0, Table({"a": {"": 1.0}, "b": "the judge\nrefused"}))])
    with pytest.raises(InputError) as caught:
        mixture.score([group("rows:7", "a", "b")])
    assert str(caught.value) == (
        "reward 'judge' on rows:7: the judge refused; "
        'set reward.on_error = "skip" to leave such responses out'
    )


def test_skip_counts_it_and_keeps_the_others() -> None:
    table = Table({"a": {"": 1.0}, "b": "refused"})
    mixture = Mixture([RewardTerm("judge", 1.0, table), RewardTerm("words", 1.0, words)], on_error="skip")
    groups = [group("g:0", "a", "b"), group("g:1", "a")]
    report = mixture.score(groups)
    assert [r.reward for g in groups for r in g.responses] == [2.0, None, 2.0]
    assert groups[0].responses[1].reward_terms == {}
    assert (report.scored, report.skipped) == (2, 1)
    assert (report.failures, report.skipped_groups) == ({"judge": 1}, ["g:0"])
    assert report.first_error == "reward 'judge' on g:0: refused"


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        ({"": math.nan}, "the scorer returned nan"),
        ({"": None}, "the scorer returned None, not a number"),
        ({"other": 1.0}, "the scorer gave no output ''"),
        ("", "no reason given"),
    ],
)
def test_bad_values_are_failures(scored: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"'learned' on g:0: {message}"):
        Mixture([RewardTerm("learned", 1.0, Table({"a": scored}))]).score([group("g:0", "a")])


def test_a_scorer_that_raises() -> None:
    class Broken(Table):
        def score(self, groups: list[Group]) -> list[list[Scored]]:
            raise ZeroDivisionError("no\nluck")

    with pytest.raises(InputError, match=r"^reward 'x': ZeroDivisionError: no luck$"):
        Mixture([RewardTerm("x", 1.0, Broken({}))]).score([group("g:0", "a")])
    report = Mixture([RewardTerm("x", 1.0, Broken({}))], on_error="skip").score([group("g:0", "a", "b")])
    assert (report.skipped, report.failures) == (2, {"x": 2})


def test_what_only_the_user_can_mend_stops_even_with_skip() -> None:
    class WrongKey(Table):
        def score(self, groups: list[Group]) -> list[list[Scored]]:
            raise InputError("check the key")

    with pytest.raises(InputError, match=r"^check the key$"):
        Mixture([RewardTerm("x", 1.0, WrongKey({}))], on_error="skip").score([group("g:0", "a")])


def test_too_few_entries_are_no_silent_shift() -> None:
    class Short(Table):
        def score(self, groups: list[Group]) -> list[list[Scored]]:
            return [[{"": 1.0}] for _ in groups]

    with pytest.raises(InputError, match="one entry per group and response"):
        Mixture([RewardTerm("x", 1.0, Short({}))]).score([group("g:0", "a", "b")])


def test_a_function_that_fails_costs_no_call_of_a_scorer() -> None:
    table = Table({"a": {"": 1.0}})

    def fails(prompt: str, response: str) -> float:
        raise ValueError("no")

    with pytest.raises(InputError, match="'fails' on g:0"):
        Mixture([RewardTerm("t", 1.0, table), RewardTerm("fails", 1.0, fails)]).score([group("g:0", "a")])
    assert table.calls == []


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([("x", Table({}, {}))], "no outputs"),
        ([("x", Table({}, {"a": math.inf}))], "'x/a': the weight must be finite"),
        ([("x", Table({}, {"a": 1.0})), ("x/a", words)], "two terms are called 'x/a'"),
    ],
)
def test_bad_scorers(terms: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture([RewardTerm(name, 1.0, term) for name, term in terms])


def test_the_judge_is_a_built_in_term() -> None:
    config = RewardConfig.model_validate(
        {
            "terms": [
                {
                    "name": "judge",
                    "weight": 2.0,
                    "args": {"kind": "function", "name": "numeric", "mode": "pairwise"},
                },
                {"name": "numeric", "weight": 0.0},
            ]
        }
    )
    one = Group(
        id="g:0", responses=[Response(text=t) for t in ("4", "5", "four is 4")], columns={"answer": 4}
    )
    report = build_mixture(config).score([one])
    # 4 beats 5 and ties with the other right answer: 3/4; 5 loses both.
    assert [r.reward for r in one.responses] == [1.5, 0.0, 1.5]
    assert report.facts["judge_groups"] == 1.0
    assert report.facts["judge_ties"] == 1.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args.kind: Field required"),
        ({"kind": "function", "name": "numeric", "mod": "score"}, "args.mod: Extra inputs are not permitted"),
        ({"kind": "function"}, r'^reward \'judge\': kind = "function" needs name$'),
        ({"kind": "function", "name": "numerik"}, "did you mean 'numeric'"),
    ],
)
def test_bad_arguments_of_the_judge(args: dict[str, Any], message: str) -> None:
    config = RewardConfig.model_validate({"terms": [{"name": "judge", "args": args}]})
    with pytest.raises(InputError, match=message):
        build_mixture(config)


def test_suggestions_know_the_scorers() -> None:
    with pytest.raises(InputError, match="did you mean 'reward_model'"):
        load_function("reward_mode")
