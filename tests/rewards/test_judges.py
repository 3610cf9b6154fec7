"""The judge interface, and the judges that need no network."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from trimtab.config import dump_toml, load_config
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import RewardConfig, Scored
from trimtab.rewards.functions import build_mixture
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.judges import (
    Comparison,
    Judge,
    Judgement,
    JudgeScorer,
    RewardJudge,
    build_judge,
    from_comparisons,
    from_ranks,
)


def group(*texts: str, **columns: Any) -> Group:
    return Group(id="rows:0", prompt="p", responses=[Response(text=t) for t in texts], columns=columns)


def judge(**options: Any) -> Judge:
    return build_judge(JudgeConfig(**options))


# ---------------------------------------------------------------- judgements


def test_ranks_have_ties_and_gaps() -> None:
    assert Judgement([3.0, 1.0, 3.0, 2.0]).ranks == [1.0, 4.0, 1.0, 3.0]
    assert Judgement([3.0, "refused"]).ranks is None
    assert Judgement([3.0, "refused"]).abstained == "refused"


def test_win_fractions_by_hand() -> None:
    # 0 beats 1, ties with 2; 1 beats 2.
    pairs = [Comparison(0, 1, 1.0), Comparison(0, 2, 0.5), Comparison(1, 2, 1.0)]
    assert from_comparisons(3, pairs).values == [0.75, 0.5, 0.25]


def test_an_abstention_takes_the_value_of_its_two_responses_only() -> None:
    pairs = [Comparison(0, 1, None, "refused"), Comparison(0, 2, 1.0), Comparison(1, 2, 1.0)]
    found = from_comparisons(3, pairs)
    assert found.values == ["refused", "refused", 0.0]
    assert found.abstained == "refused"


def test_ranks_become_win_fractions() -> None:
    # Four ranked 1, 2, 2, 4: all below, then (1 below + ½ alike) / 3, then none.
    assert from_ranks([1, 2, 2, 4]).values == [1.0, 0.5, 0.5, 0.0]
    assert from_ranks([1, 2, 2, 4]).ranks == [1.0, 2.0, 2.0, 4.0]


def test_one_response_alone() -> None:
    for mode in ("pairwise", "listwise"):
        [found] = judge(kind="function", name="length", args={"limit": 1, "span": 1}, mode=mode).judge(
            [group("a")]
        )
        assert found.abstained == "one response alone cannot be compared"


# ---------------------------------------------------------------- functions


LENGTH = {"kind": "function", "name": "length", "args": {"limit": 0, "span": 10}}


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("score", [-0.1, -0.3, -0.2]),
        ("pairwise", [1.0, 0.0, 0.5]),
        ("listwise", [1.0, 0.0, 0.5]),
    ],
)
def test_a_rule_in_every_mode(mode: str, values: list[float]) -> None:
    by_rule = judge(**LENGTH, mode=mode)
    one = group("a", "a b c", "a b")
    [found] = by_rule.judge([one])
    assert found.values == pytest.approx(values)
    assert found.ranks == [1.0, 3.0, 2.0]
    assert [(p.first, p.second, p.outcome) for p in found.pairs()] == [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.0)]
    assert (by_rule.costs.groups, by_rule.costs.calls, by_rule.costs.abstained) == (1, 3, 0)
    assert one.responses[0].reward is None, "the groups stay as they are"


def test_a_margin_makes_ties() -> None:
    by_rule = judge(**LENGTH, mode="pairwise", margin=0.15)
    [found] = by_rule.judge([group("a", "a b c", "a b")])
    # 1 against 3 words differ by 0.2; the others by 0.1.
    assert found.values == [0.75, 0.25, 0.5]
    assert by_rule.costs.ties == 2


def test_a_rule_that_raises_stops_or_abstains(tmp_path: Path) -> None:
    file = tmp_path / "rule.py"
    file.write_text("def rule(prompt, response):\n    return 1 / (len(response) - 1)\n")
    groups = [group("abc", "a"), group("abc", "ab")]
    with pytest.raises(
        InputError, match=r"rows:0: ZeroDivisionError: .* on_error = \"skip\" abstains there$"
    ):
        judge(kind="function", name=f"{file}:rule").judge(groups)
    lenient = judge(kind="function", name=f"{file}:rule", on_error="skip")
    bad, good = lenient.judge(groups)
    assert bad.abstained == "ZeroDivisionError: division by zero"
    assert good.values == [0.0, 1.0]
    assert (lenient.costs.groups, lenient.costs.abstained) == (2, 1)
    strict = judge(kind="function", name=f"{file}:rule", on_error="skip", mode="listwise")
    assert strict.judge(groups)[0].ranks is None


def test_columns_reach_the_rule() -> None:
    [found] = judge(kind="function", name="exact_match", mode="score").judge([group("4", "5", answer=4)])
    assert found.values == [1.0, 0.0]


def test_a_reward_model_is_no_function() -> None:
    with pytest.raises(InputError, match="set kind instead"):
        judge(kind="function", name="reward_model")


# ---------------------------------------------------------------- reward models


class Scores:
    """Two outputs, of which the second weighs −2."""

    def __init__(self) -> None:
        self.outputs = {"good": 1.0, "bad": -2.0}
        self.notes = ["re-tokenised"]
        self.models = 1

    def score(self, groups: list[Group]) -> list[list[Scored]]:
        def one(text: str) -> Scored:
            return "too long" if len(text) > 5 else {"good": float(len(text)), "bad": float("x" in text)}

        return [[one(str(r.text)) for r in group.responses] for group in groups]

    def facts(self) -> dict[str, float]:
        return {"reward_model_truncated": 3.0}


def test_a_reward_model_as_judge() -> None:
    by_model = RewardJudge(JudgeConfig(kind="reward_model", mode="score"), Scores())
    [found] = by_model.judge([group("ab", "abx", "a")])
    assert found.values == [2.0, 1.0, 1.0]
    assert found.ranks == [1.0, 2.0, 2.0]
    assert by_model.costs.ties == 1
    assert by_model.facts()["reward_model_truncated"] == 3.0
    scorer = JudgeScorer(by_model)
    assert (scorer.models, scorer.notes) == (1, ["re-tokenised"])
    with pytest.raises(InputError, match="rows:0: too long"):
        by_model.judge([group("abcdef", "a")])
    lenient = RewardJudge(JudgeConfig(kind="reward_model", on_error="skip"), Scores())
    assert lenient.judge([group("abcdef", "a", "ab")])[0].values == ["too long"] * 3


def test_a_trained_reward_model_as_judge(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    args = {"path": str(tmp_path)}
    one = Group(id="rows:0", prompt="a b", responses=[Response(text=t) for t in ("c", "d e", "f")])
    by_model = judge(kind="reward_model", mode="score", args=args)
    [found] = by_model.judge([one])
    assert len(set(found.values)) == 3
    # The term of that name scores alike, and pairs and ranks follow the scores.
    terms = {"terms": [{"name": "reward_model", "args": args}]}
    build_mixture(RewardConfig.model_validate(terms)).score([one])
    assert [r.reward for r in one.responses] == found.values
    for mode in ("pairwise", "listwise"):
        assert judge(kind="reward_model", mode=mode, args=args).judge([one])[0].ranks == found.ranks


# ---------------------------------------------------------------- the user's own


OWN = """
def make(*, mode, answers):
    def answer(groups):
        assert mode in ("pairwise", "listwise", "score")
        return answers
    return answer

def broken(*, mode):
    def answer(groups):
        raise KeyError("facts")
    return answer

def no_judge(*, mode):
    return 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return f"{file}:"


@pytest.mark.parametrize(
    ("mode", "answer", "values"),
    [
        ("score", {"scores": [3, 1.5, 3]}, [3.0, 1.5, 3.0]),
        ("listwise", {"ranks": [2, 2, 1]}, [0.25, 0.25, 1.0]),
        ("pairwise", {"preferences": [[0, 1, 1], [0, 2, 0.5], [1, 2, 0]]}, [0.75, 0.0, 0.75]),
        ("score", "cannot say", ["cannot say"] * 3),
    ],
)
def test_a_judge_of_the_users_own(own: str, mode: str, answer: Any, values: list[Any]) -> None:
    by_own = judge(kind="custom", name=f"{own}make", args={"answers": [answer]}, mode=mode)
    assert by_own.judge([group("a", "b", "c")])[0].values == values


@pytest.mark.parametrize(
    ("mode", "answers", "message"),
    [
        ("score", [], "an answer for each of 1 groups"),
        ("score", [None], "score mode wants a text or {'scores': "),
        ("score", [{"scores": [1, 2]}], "with 3 finite numbers"),
        ("score", [{"scores": [1, 2, float("nan")]}], "with 3 finite numbers"),
        ("listwise", [{"scores": [1, 2, 3]}], "wants a text or {'ranks'"),
        ("pairwise", [{"preferences": [[0, 1, 1]]}], "once for every i < j of 3"),
        ("pairwise", [{"preferences": [[0, 1, 1], [0, 2, 2], [1, 2, 0]]}], "once for every i < j of 3"),
        ("pairwise", [{"preferences": [[0, 1, 1], [0, 2, 1], [1, 2, 0], [0, 1, 0]]}], "once for every"),
        ("pairwise", [{"preferences": [[[], 1, 1], [0, 2, 1], [1, 2, 0]]}], "once for every"),
    ],
)
def test_what_a_judge_of_the_users_own_may_not_say(own: str, mode: str, answers: Any, message: str) -> None:
    by_own = judge(kind="custom", name=f"{own}make", args={"answers": answers}, mode=mode)
    with pytest.raises(InputError, match=r"^judge '.*own\.py:make'") as caught:
        by_own.judge([group("a", "b", "c")])
    assert message in str(caught.value)


def test_a_judge_that_cannot_be_made(own: str) -> None:
    with pytest.raises(InputError, match="KeyError: 'facts'"):
        judge(kind="custom", name=f"{own}broken").judge([group("a", "b")])
    with pytest.raises(InputError, match="must return a function of the groups, not 3"):
        judge(kind="custom", name=f"{own}no_judge")
    with pytest.raises(InputError, match="answers"):
        judge(kind="custom", name=f"{own}make")
    with pytest.raises(InputError, match="has no 'mak': did you mean 'make'"):
        judge(kind="custom", name=f"{own}mak")
    with pytest.raises(InputError, match=r"write package\.module:function"):
        judge(kind="custom", name="make")


# ---------------------------------------------------------------- configuration

ENDPOINT = {"kind": "endpoint", "base_url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "function", "name": "numeric", "model": "m"}, 'model has no effect with kind = "function"'),
        ({**ENDPOINT, "name": "numeric"}, 'name has no effect with kind = "endpoint"'),
        ({**ENDPOINT, "margin": 0.1}, 'margin has no effect with kind = "endpoint"'),
        ({**ENDPOINT, "on_error": "skip"}, 'on_error has no effect with kind = "endpoint"'),
        ({**ENDPOINT, "score_max": 5.0}, 'score_max has no effect with mode = "pairwise"'),
        ({**LENGTH, "mode": "score", "margin": 0.1}, 'margin has no effect with mode = "score"'),
        ({**LENGTH, "mode": "listwise", "margin": 0.1}, 'margin has no effect with mode = "listwise"'),
        ({"kind": "reward_model", "cache": ""}, 'cache has no effect with kind = "reward_model"'),
        (
            {"kind": "custom", "name": "a:b", "on_error": "skip"},
            'on_error has no effect with kind = "custom"',
        ),
        ({"kind": "custom"}, 'kind = "custom" needs name'),
        ({"kind": "endpoint", "model": "m"}, "base_url must be an address"),
        ({**ENDPOINT, "base_url": "file:///etc/passwd"}, "base_url must be an address"),
        ({**ENDPOINT, "base_url": "http://h:port/v1"}, "base_url must be an address"),
        ({**ENDPOINT, "base_url": "http://h/v1?key=1"}, "base_url must be an address"),
        ({**ENDPOINT, "base_url": "https://me:secret@h/v1"}, "must not hold a password"),
        ({**ENDPOINT, "model": ""}, 'kind = "endpoint" needs model'),
        ({**ENDPOINT, "rubric": "a", "rubric_file": "b"}, "leave one out"),
        ({**ENDPOINT, "mode": "score", "score_min": 10.0}, "score_min must be below score_max"),
        ({**ENDPOINT, "extra": {"stream": True}}, "extra may not set 'stream'"),
        ({**ENDPOINT, "timeout_s": 0}, "greater than 0"),
        ({**ENDPOINT, "mode": "tournament"}, "'pairwise', 'listwise' or 'score'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JudgeConfig(**options)
    assert message in str(caught.value)


def test_a_configuration_survives_being_written_out() -> None:
    """A run writes every key with its value; read again, none of them may count as given in vain."""
    for options in (ENDPOINT, LENGTH, {"kind": "reward_model", "args": {"path": "x"}}):
        config = JudgeConfig(**options)
        assert load_config(JudgeConfig, None, tomllib.loads(dump_toml(config))) == config
