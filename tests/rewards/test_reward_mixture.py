"""The mixture: weighted sums by hand, and every way in which a term can fail."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import Mixture, RewardConfig, RewardTerm, response_text
from trimtab.rewards.functions import build_mixture


def words(prompt: str, response: str, **columns: Any) -> float:
    return len(response.split())


def group(*texts: str, **columns: Any) -> Group:
    return Group(
        id="rows.jsonl:3", prompt="2+2=", responses=[Response(text=t) for t in texts], columns=columns
    )


def test_reward_is_the_weighted_sum_and_terms_stay_unweighted() -> None:
    mixture = Mixture(
        [RewardTerm("words", -0.5, words), RewardTerm("right", 2.0, lambda prompt, response: "4" in response)]
    )
    one = group("it is 4", "five")
    report = mixture.score([one])
    assert [r.reward for r in one.responses] == [-0.5 * 3 + 2.0, -0.5]
    assert one.responses[0].reward_terms == {"words": 3.0, "right": 1.0}
    assert one.responses[1].reward_terms == {"words": 1.0, "right": 0.0}
    assert (report.scored, report.skipped, report.skipped_groups) == (2, 0, [])


def test_a_weight_of_zero_records_only() -> None:
    one = group("a b")
    Mixture([RewardTerm("words", 0.0, words)]).score([one])
    assert (one.responses[0].reward, one.responses[0].reward_terms) == (0.0, {"words": 2.0})


def test_functions_get_texts_and_columns() -> None:
    seen: dict[str, Any] = {}

    def spy(prompt: str, response: str, **columns: Any) -> float:
        seen.update(prompt=prompt, response=response, columns=columns)
        return 0.0

    chat = Group(
        id="chat:0",
        prompt=[{"role": "user", "content": "Hi"}],
        responses=[
            Response(
                text=[
                    {"role": "assistant", "content": "let me look"},
                    {"role": "tool", "content": "42"},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "42."}],
                    },
                ]
            )
        ],
        columns={"answer": 42},
    )
    Mixture([RewardTerm("spy", 1.0, spy)]).score([chat])
    assert seen == {"prompt": "user: Hi", "response": "let me look\nIt is 42.", "columns": {"answer": 42}}


def test_a_tool_call_without_text_is_empty() -> None:
    assert response_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


def test_a_function_gets_only_the_columns_that_it_names() -> None:
    def narrow(prompt: str, response: str, answer: int) -> float:
        return float(answer)

    one = group("x", answer=7, other="unused")
    Mixture([RewardTerm("narrow", 1.0, narrow)]).score([one])
    assert one.responses[0].reward == 7.0


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.bool_(True), np.int64(1), np.array(1.0)])
def test_numbers_of_every_kind_count(value: Any) -> None:
    one = group("x")
    Mixture([RewardTerm("term", 1.0, lambda prompt, response: value)]).score([one])
    assert one.responses[0].reward == 1.0
    assert type(one.responses[0].reward) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None, not a number"),
        ("1", "returned '1', not a number"),
        ([1.0], r"returned \[1.0\], not a number"),
        (np.array([1.0, 2.0]), "ValueError"),
        (1j, "not a number"),
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (np.float64("nan"), "returned nan"),
    ],
)
def test_anything_else_names_the_term_and_the_row(value: Any, message: str) -> None:
    mixture = Mixture([RewardTerm("odd", 1.0, lambda prompt, response: value)])
    with pytest.raises(InputError, match=rf"reward 'odd' on rows\.jsonl:3: .*{message}"):
        mixture.score([group("x")])


def fails_on_b(prompt: str, response: str, **columns: Any) -> float:
    if response == "b":
        raise ZeroDivisionError("no b,\nplease")
    return 1.0


def test_an_exception_is_named_in_one_line() -> None:
    with pytest.raises(InputError) as caught:
        Mixture([RewardTerm("picky", 1.0, fails_on_b)]).score([group("a", "b")])
    assert str(caught.value) == "reward 'picky' on rows.jsonl:3: ZeroDivisionError: no b, please"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_skip_leaves_no_reward_and_counts() -> None:
    mixture = Mixture(
        [RewardTerm("words", 1.0, words), RewardTerm("picky", 1.0, fails_on_b)], on_error="skip"
    )
    bad, good = group("a", "b", "b"), Group(id="good:0", responses=[Response(text="c")])
    bad.responses[1].reward = 9.0  # an old value must not survive
    report = mixture.score([bad, good])
    assert [r.reward for r in bad.responses] == [2.0, None, None]
    assert bad.responses[1].reward_terms == {}
    assert (report.scored, report.skipped, report.failures) == (2, 2, {"picky": 2})
    assert report.skipped_groups == ["rows.jsonl:3"]
    assert report.first_error is not None
    assert "no b" in report.first_error


def test_a_column_may_not_hide_the_response() -> None:
    with pytest.raises(InputError, match="column 'response'"):
        Mixture([RewardTerm("words", 1.0, words)]).score([group("x", response="y")])


def test_a_stop_from_the_keyboard_is_no_failed_term() -> None:
    def stopped(prompt: str, response: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Mixture([RewardTerm("stopped", 1.0, stopped)], on_error="skip").score([group("x")])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "at least one term"),
        ([RewardTerm("a", 1.0, words), RewardTerm("a", 2.0, words)], "two terms are called 'a'"),
        ([RewardTerm("a", math.nan, words)], "weight must be finite"),
    ],
)
def test_bad_mixtures(terms: list[RewardTerm], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(terms)


def test_configuration_to_rewards() -> None:
    config = RewardConfig.model_validate(
        {
            "terms": [
                {"name": "numeric"},
                {"name": "format", "weight": 0.2, "args": {"pattern": "#### -?[0-9]"}},
                {"name": "format", "weight": -1.0, "args": {"pattern": "sorry"}, "label": "apology"},
            ]
        }
    )
    one = group("2+2 is 4\n#### 4", "sorry, 4", "#### 5", answer="so #### 4")
    build_mixture(config).score([one])
    assert [r.reward for r in one.responses] == [1.2, 0.0, 0.2]
    assert one.responses[1].reward_terms == {"numeric": 1.0, "format": 0.0, "apology": 1.0}


def test_two_terms_need_two_labels() -> None:
    config = RewardConfig.model_validate({"terms": [{"name": "numeric"}, {"name": "numeric"}]})
    with pytest.raises(InputError, match="give each a label"):
        build_mixture(config)


@pytest.mark.parametrize(
    "values",
    [
        {"terms": []},
        {"terms": [{"name": "numeric", "wieght": 1.0}]},
        {"terms": [{"name": "numeric", "weight": math.inf}]},
        {"terms": [{"name": ""}]},
        {"terms": [{"name": "numeric"}], "on_error": "ignore"},
        {"terms": [{"name": "numeric"}], "extra": 1},
    ],
)
def test_strict_configuration(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate(values)


def test_the_rewards_room_needs_no_torch() -> None:
    code = "import sys, trimtab.rewards.functions; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
