"""A win rate by a judge: sides, ties, abstentions, intervals over prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from trimtab.errors import InputError
from trimtab.evaluation.intervals import paired_win_rate
from trimtab.evaluation.judged import judged_win_rate
from trimtab.groups import Group, Response
from trimtab.rewards.judges import Comparison, Judge, Judgement, from_comparisons


class Scripted(Judge):
    """Compares two texts by a function; keeps what it was shown."""

    def __init__(self, compare: Callable[[str, str], Comparison]) -> None:
        super().__init__("pairwise")
        self.compare = compare
        self.shown: list[tuple[str, list[str]]] = []

    def _judge(self, groups: list[Group]) -> list[Judgement]:
        out = []
        for group in groups:
            texts = [str(r.text) for r in group.responses]
            self.shown.append((group.id, texts))
            self.costs.calls += 1
            out.append(from_comparisons(2, [self.compare(*texts)]))
        return out


def by_length(a: str, b: str) -> Comparison:
    return Comparison(0, 1, 0.5 if len(a) == len(b) else float(len(a) > len(b)))


def sides(*texts: tuple[list[str], list[str]]) -> tuple[list[Group], list[Group]]:
    """One prompt for each couple of lists."""
    ours, theirs = [], []
    for i, (mine, other) in enumerate(texts):
        group = Group(id=f"p:{i}", prompt=f"prompt {i}", columns={"facts": i})
        ours.append(dataclasses.replace(group, responses=[Response(text=t) for t in mine]))
        theirs.append(dataclasses.replace(group, responses=[Response(text=t) for t in other]))
    return ours, theirs


def test_by_hand() -> None:
    ours, theirs = sides((["aaa", "a"], ["b", "bb"]), (["aa", "aaaa"], ["bb", "b"]))
    judge = Scripted(by_length)
    found = judged_win_rate(judge, ours, theirs[::-1], seed=0)
    # Win, loss; tie, win.
    assert (found["win_rate"], found["wins"], found["losses"], found["ties"]) == (0.625, 2, 1, 1)
    assert found["longer_preferred"] == 1.0
    assert (found["abstained"], found["order_inconsistent"], found["comparisons"]) == (0, 0, 4)
    assert found["costs"]["judge_calls"] == 4.0
    assert found["win_rate_ci95"] == list(
        paired_win_rate([1, 0, 0.5, 1], [0.5] * 4, clusters=["p:0", "p:0", "p:1", "p:1"]).ci95
    )
    assert [id for id, _ in judge.shown] == ["p:0#0", "p:0#1", "p:1#0", "p:1#1"]
    assert judged_win_rate(judge, ours, theirs, seed=0)["costs"]["judge_calls"] == 4.0, "of this comparison"


def test_a_judge_that_loves_the_first_place_favours_neither_side() -> None:
    ours, theirs = sides(*[(["a"], ["b"])] * 400)
    for i, group in enumerate(theirs):
        group.responses[0].text = f"b{i}"
    judge = Scripted(lambda a, b: Comparison(0, 1, 1.0))
    found = judged_win_rate(judge, ours, theirs, seed=0)
    lo, hi = found["win_rate_ci95"]
    assert lo < 0.5 < hi
    firsts = {texts[0][0] for _, texts in judge.shown}
    assert firsts == {"a", "b"}
    again = Scripted(lambda a, b: Comparison(0, 1, 1.0))
    assert judged_win_rate(again, ours, theirs, seed=0) == {**found, "costs": again.costs.facts()}
    assert again.shown == judge.shown
    assert judged_win_rate(again, ours, theirs, seed=1)["wins"] != found["wins"]


def test_abstentions_are_counted_and_left_out() -> None:
    def picky(a: str, b: str) -> Comparison:
        if "?" in a + b:
            return Comparison(0, 1, None, "refused")
        if "=" in a + b:
            return Comparison(0, 1, 0.5, inconsistent=True)
        return by_length(a, b)

    ours, theirs = sides((["aa"], ["b"]), (["?"], ["b"]), (["a"], ["="]), (["a"], ["b?"]))
    found = judged_win_rate(Scripted(picky), ours, theirs)
    assert (found["win_rate"], found["wins"], found["ties"], found["losses"]) == (0.75, 1, 1, 0)
    assert (found["abstained"], found["abstentions"]) == (2, {"refused": 2})
    assert (found["order_inconsistent"], found["comparisons"]) == (1, 4)


def test_nothing_but_abstentions() -> None:
    ours, theirs = sides((["aa"], ["b"]))
    found = judged_win_rate(Scripted(lambda a, b: Comparison(0, 1, None, "busy")), ours, theirs)
    assert (found["win_rate"], found["win_rate_ci95"], found["abstained"]) == (None, None, 1)
    assert found["longer_preferred"] is None


def test_more_samples_of_few_prompts_are_not_more_prompts() -> None:
    few = sides(*[(["aa"] * 50, ["b"] * 50), (["a"] * 50, ["bb"] * 50)] * 5)
    many = sides(*[(["aa"], ["b"]), (["a"], ["bb"])] * 250)
    width = {}
    for name, (ours, theirs) in (("few", few), ("many", many)):
        lo, hi = judged_win_rate(Scripted(by_length), ours, theirs)["win_rate_ci95"]
        width[name] = hi - lo
    assert width["few"] > 4 * width["many"]


def test_sides_that_do_not_match() -> None:
    judge = Scripted(by_length)
    ours, theirs = sides((["a"], ["b"]), (["a"], ["b"]))
    with pytest.raises(InputError, match="2 prompts of ours and 1 of theirs do not match"):
        judged_win_rate(judge, ours, theirs[:1])
    with pytest.raises(InputError, match="do not match by id"):
        judged_win_rate(judge, ours, [theirs[0], theirs[0]])
    with pytest.raises(InputError, match="do not match by id"):
        judged_win_rate(judge, [], [])
    theirs[1].responses.append(Response(text="c"))
    with pytest.raises(InputError, match=r"p:1: .* there are 1 and 2"):
        judged_win_rate(judge, ours, theirs)
    theirs[1] = dataclasses.replace(theirs[1], prompt="other", responses=theirs[1].responses[:1])
    with pytest.raises(InputError, match="or the prompts differ"):
        judged_win_rate(judge, ours, theirs)
    judge.mode = "score"
    with pytest.raises(InputError, match="needs a judge with mode"):
        judged_win_rate(judge, ours, theirs)
