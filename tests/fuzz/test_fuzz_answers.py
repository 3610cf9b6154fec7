"""What models, judges and servers write: read or not read, within moments, whatever it is."""

from __future__ import annotations

import email.message
import io
import json
import math
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan import fuzzed, one_line

from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.rewards.answer_cache import Answer, AnswerCache
from trimtab.rewards.base import NoValue, function_value
from trimtab.rewards.chat_client import ChatClient, _Failure, _retry_after
from trimtab.rewards.functions import BUILT_INS
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.judges import Costs
from trimtab.rewards.numbers import find_number
from trimtab.rewards.questions import Abstained, read_ranks, read_score, read_winner

PIECES = st.lists(
    st.sampled_from(
        ['{"winner": ', '"A"', "}", '{"ranks": {"A": 1, "B": 2}}', '{"score": 7}', "{", "[", '"', "score",
         "winner: B", "tie",
         "abstain", " ", "\n", "*", "```json", "7/10", "1e999", "-", "NaN", "\ud800", "9" * 50, "\\"]
    ),
    max_size=12,
).map("".join)  # fmt: skip
ANSWERS = st.one_of(
    st.text(max_size=60), PIECES, st.builds(lambda text, n: text * n, PIECES, st.integers(1, 300))
)


@fuzzed(4)
@given(text=ANSWERS)
@example(" " * 200_000 + "x")
@example("score" + " " * 200_000 + "x")
@example("*`(" * 60_000)
@example("{" * 20_000)
@example('{"a":' * 4_000)
@example("[" * 100_000)
@example('{"score": ' + "9" * 5_000 + "}")
@example("5" + " " * 100_000 + "/")
def test_an_answer_is_a_verdict_or_none(text: str) -> None:
    assert read_winner(text) in (0.0, 0.5, 1.0, None) or isinstance(read_winner(text), Abstained)
    ranks = read_ranks(text, "AB")
    assert ranks is None or isinstance(ranks, Abstained) or sorted(ranks) in ([1.0, 2.0], [1.0, 1.0])
    score = read_score(text, 1.0, 10.0)
    assert score is None or isinstance(score, Abstained) or 1.0 <= score <= 10.0


MATHEMATICS = st.lists(
    st.sampled_from(
        ["1", "23", ",", "000", ".", "-", "−", "e", "/", "\\frac{", "}{", "}", "{", "\\boxed{", "####", "$",
         " ", "\n", "٣", "(", "x", "%"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@fuzzed(4)
@given(
    text=st.one_of(
        MATHEMATICS, st.text(max_size=40), st.builds(lambda t, n: t * n, MATHEMATICS, st.integers(1, 200))
    )
)
@example("\\frac{" + " " * 100_000)
@example("\\frac{1}" + " " * 100_000)
@example("9" * 100_000)
@example("1,111" * 30_000)
@example("1e999/1e-999")
@example("\\boxed{" * 20_000)
@example("-" * 100_000)
@example("0." * 50_000)
@example("1/0")
def test_numbers(text: str) -> None:
    found = find_number(text)
    assert found is None or found == found.limit_denominator(10**2000)
    for name in ("numeric", "exact_match"):
        reward = BUILT_INS[name]()
        group = Group(id="rows:0", columns={"answer": text})
        try:
            assert function_value(reward, None, group, "p", text) in (0.0, 1.0)
        except NoValue as caught:
            reason = str(caught)
            assert "no number in the row's answer" in reason


@pytest.mark.parametrize(
    "text",
    [
        "\\frac{" * 3000,
        "9" * 20_000,
        "\\boxed{" + "(" * 3000,
        "$" * 20_000,
        "\\sqrt{" * 500 + "x",
        "2^{" * 300,
    ],
)
def test_mathematics_that_never_ends(text: str) -> None:
    """The library gives up by itself; its own limit is five seconds for each of reading and comparing."""
    pytest.importorskip("math_verify")
    reward = BUILT_INS["math"]()
    began = time.monotonic()
    try:
        value = function_value(reward, None, Group(id="rows:0", columns={"answer": "2"}), "p", text)
    except NoValue:
        value = 0.0
    assert value in (0.0, 1.0)
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- a server


@pytest.fixture(scope="module")
def client() -> ChatClient:
    config = JudgeConfig(kind="endpoint", base_url="http://127.0.0.1:9/v1", model="m", cache="")
    return ChatClient(config, Costs(), sleep=lambda seconds: None)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def objects(**known: Any) -> Any:
    return st.one_of(VALUES, st.fixed_dictionaries({}, optional={k: v | VALUES for k, v in known.items()}))


MESSAGE = objects(content=st.lists(objects(text=st.text())), refusal=st.text())
COMPLETION = objects(
    error=objects(message=st.text()),
    choices=st.lists(objects(message=MESSAGE, finish_reason=st.text()), max_size=2),
    usage=objects(prompt_tokens=st.integers(), completion_tokens=st.floats()),
    message=st.text(),
    detail=VALUES,
)


@fuzzed(4)
@given(raw=st.one_of(st.binary(max_size=80), COMPLETION.map(lambda v: json.dumps(v).encode())))
@example(b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}')
@example(b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": NaN}}')
@example(b"[" * 100_000)
@example(b'{"choices": ' + b"[" * 50_000)
@example(b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b"9" * 5000)
def test_a_body(client: ChatClient, raw: bytes) -> None:
    try:
        answer = client._answer(raw)
    except _Failure as caught:
        reason = caught.reason
        assert len(reason) < 300
    else:
        assert isinstance(answer, Answer)
        json.dumps(answer.content).encode()


@fuzzed(2)
@given(
    raw=st.one_of(st.binary(max_size=80), COMPLETION.map(lambda v: json.dumps(v).encode())),
    status=st.sampled_from([301, 307, 400, 401, 403, 404, 408, 429, 500, 503, 599]),
    header=st.text(max_size=30),
)
@example(b'{"error": ' + b"[" * 2000 + b"]" * 2000 + b"}", 500, "")
@example(b"[" * 100_000, 400, "nan")
def test_a_refusal(client: ChatClient, raw: bytes, status: int, header: str) -> None:
    headers = email.message.Message()
    headers["Retry-After"] = headers["Location"] = header.replace("\r", "").replace("\n", "")
    error = urllib.error.HTTPError(client.url, status, "words", headers, io.BytesIO(raw))
    try:
        assert client._refused(error).finish == "content_filter"
    except InputError as error:
        one_line(error)
    except _Failure as caught:
        found = caught.status
        assert found == status


@fuzzed(2)
@given(value=st.text(max_size=40))
@example("Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
@example("Mon, 31 Dec 9999 23:59:59 -2359")
@example("inf")
@example("nan")
@example("-1e999")
def test_a_time_to_wait(value: str) -> None:
    seconds = _retry_after(value)
    assert seconds is None or (seconds >= 0 and not math.isnan(seconds))


@fuzzed(2)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40),
            objects(key=st.text(), content=st.text(), prompt_tokens=st.integers()).map(
                lambda v: json.dumps(v).encode()
            ),
            st.just(json.dumps({"key": "k", "content": "kept"}).encode()),
        ),
        max_size=6,
    )
)
@example([b'{"key": ' + b"[" * 900 + b"]" * 900 + b', "content": ""}'])
@example([b"[" * 100_000])
def test_a_cache_of_answers(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.getbasetemp() / "cache.jsonl"
    file.write_bytes(b"\n".join(lines))
    cache = AnswerCache(str(file))
    cache.put("new", Answer("a"))
    again = AnswerCache(str(file))
    assert again.get("new") == Answer("a")
    assert len(again) == len(cache)
    if json.dumps({"key": "k", "content": "kept"}).encode() in lines:
        assert again.get("k") is not None


@pytest.mark.parametrize("host", ["a..b", "." * 70, "x" * 300, "\u2024", "[::1", "host name", "h\u0130"])
def test_a_host_that_is_none(host: str, unsleeping: Callable[[JudgeConfig], ChatClient]) -> None:
    try:
        config = JudgeConfig(kind="endpoint", base_url=f"http://{host}/v1", model="m", retries=0, cache="")
    except ValueError:
        return
    from trimtab.rewards.chat_client import NoAnswer

    with pytest.raises((InputError, NoAnswer)):
        unsleeping(config).post({"model": "m"})


@pytest.fixture
def unsleeping() -> Callable[[JudgeConfig], ChatClient]:
    return lambda config: ChatClient(config, Costs(), sleep=lambda seconds: None)


def test_the_cache_file_is_what_it_says(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot use the cache"):
        AnswerCache(str(tmp_path))
