"""Feedback formats: one row of a file becomes one group, or a `BadRow` that says why not.

A row's format is recognised by its columns, the first line that fits deciding:

| columns | becomes |
|---|---|
| ``prompt`` + ``responses`` (+ ``rewards``, ``ratings``, ``ranks``, ``ranking``, ``labels``) | K responses |
| ``chosen`` + ``rejected`` (+ ``prompt``) | a pair |
| ``prompt`` + ``completions`` + ``labels`` | one response in labelled steps |
| ``prompt`` + ``completion`` (+ ``label``) | one response |
| ``messages`` | one response: all that follows the first request |
| ``prompt`` | no response yet: for methods that sample |
| ``text`` | one response to the empty prompt: plain language modelling |

Wherever text stands, a list of messages may stand. A column that should hold a list may hold it encoded
as JSON, which is the only way in CSV. Any row may have a ``group_weight``, a number that multiplies its loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.groups import Group, Message, Response, Text

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
LABELS = {"allow": True, "deny": False, "safe": True, "unsafe": False, "true": True, "false": False}
LABELS |= {"1": True, "0": False}
LARGEST = 1e30
"""Of numbers that training reads: sums of them fit into fp32."""
DEEPEST = 64
"""Lists and mappings within each other, at most: what copies and saves a row takes them one by one."""
ASSISTANT_MARKER = "\n\nAssistant:"
"""Ends every request in the HH-RLHF files, whose rows repeat the dialogue in both answers."""

Row = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be read: a kind to count by, what is wrong, and the mend."""

    def __init__(self, kind: str, what: str, mend: str) -> None:
        super().__init__(what)
        self.kind, self.what, self.mend = kind, what, mend


def parse_row(row: Row, *, id: str, source: str) -> tuple[Group, str]:
    """The group that a row describes, and the name of the row's format (its claimed columns).

    Raises `BadRow` only. Columns that the format does not claim are kept in ``Group.columns``.
    """
    _check(row, "row")
    build, claimed = _recognise(row)
    prompt, responses = build(row)
    claimed = (*claimed, "group_weight")
    weight = _number(row.get("group_weight", 1.0), "group_weight")
    if weight < 0:
        raise BadRow("negative weight", f"`group_weight` is {weight}", "give a number that is not negative")
    columns = {name: value for name, value in row.items() if name not in claimed}
    group = Group(id=id, prompt=prompt, responses=responses, columns=columns, weight=weight, source=source)
    return group, " + ".join(name for name in claimed if name in row)


Built = tuple[Text, list[Response]]


def _recognise(row: Row) -> tuple[Callable[[Row], Built], tuple[str, ...]]:
    if "responses" in row:
        # `ids` name the responses of a `ranking`, and are the row's own business without one.
        ranking = ("ranking", "ids") if "ranking" in row else ()
        return _responses, ("prompt", "responses", "rewards", "ratings", "ranks", *ranking, "labels")
    if "chosen" in row or "rejected" in row:
        return _pair, ("prompt", "chosen", "rejected")
    if "completions" in row:
        return _steps, ("prompt", "completions", "labels")
    if "completion" in row:
        return _completion, ("prompt", "completion", "label")
    if "messages" in row:
        return _conversation, ("messages",)
    if "prompt" in row:
        return _prompt_alone, ("prompt",)
    if "text" in row:
        return _text_alone, ("text",)
    what = f"no format has these columns ({_short(', '.join(sorted(row)))})"
    raise BadRow("missing column", what, 'rename yours with columns = {"yours" = "prompt", …}')


# ---------------------------------------------------------------- one builder per format


def _completion(row: Row) -> Built:
    label = _label(row["label"], "label") if "label" in row else None
    prompt, [completion] = _answers(_prompt(row), [_text(row["completion"], "completion")], ["completion"])
    return prompt, [Response(text=completion, label=label)]


def _pair(row: Row) -> Built:
    names = ["chosen", "rejected"]
    texts = [_text(_column(row, name), name) for name in names]
    if texts[0] == texts[1]:
        what = "`chosen` and `rejected` are identical"
        raise BadRow("identical chosen and rejected", what, "remove the row")
    if isinstance(texts[0], str) != isinstance(texts[1], str):
        raise BadRow(
            "wrong type", "`chosen` is text and `rejected` messages, or the reverse", "write both alike"
        )
    prompt, texts = _answers(_prompt(row), texts, names) if "prompt" in row else _implicit(texts, names)
    return prompt, [Response(text=texts[0], preferred=True), Response(text=texts[1], preferred=False)]


def _steps(row: Row) -> Built:
    prompt = _prompt(row)
    steps = _list(_column(row, "completions"), "completions")
    labels = _list(_column(row, "labels"), "labels")
    _same_length(steps, labels, "completions", "labels")
    texts = [_answer(_string(step, "completions"), "completions") for step in steps]
    values = [
        float(_label(v, "labels")) if isinstance(v, bool | str) else _number(v, "labels") for v in labels
    ]
    strings = [text for text in texts if isinstance(text, str)]
    return prompt, [Response(text="".join(strings), step_texts=strings, step_labels=values)]


def _responses(row: Row) -> Built:
    values = _list(row["responses"], "responses")
    names = [f"responses[{i}]" for i in range(len(values))]
    texts = [_text(value, name) for value, name in zip(values, names, strict=True)]
    if len({isinstance(text, str) for text in texts}) > 1:
        raise BadRow("wrong type", "`responses` mixes text and messages", "write all of them alike")
    prompt, texts = _answers(_prompt(row), texts, names)
    responses = [Response(text=text) for text in texts]
    for response, value in _per_response(row, "rewards", responses):
        response.reward = _number(value, "rewards")
    for response, value in _per_response(row, "ratings", responses):
        response.ratings = _rating(value)
    for response, value in _per_response(row, "ranks", responses):
        response.rank = _number(value, "ranks")
    if "ranking" in row:
        for response, rank in zip(responses, _ranking(row, len(responses)), strict=True):
            response.rank = rank
    for response, value in _per_response(row, "labels", responses):
        response.label = _label(value, "labels")
    return prompt, responses


def _conversation(row: Row) -> Built:
    messages = _messages(_list(row["messages"], "messages"), "messages")
    cut = _first_reply(messages, "messages")
    return messages[:cut], [Response(text=_answer(messages[cut:], "messages"))]


def _prompt_alone(row: Row) -> Built:
    prompt = _prompt(row)
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow("empty prompt", "`prompt` is empty", "remove the row or fill it in")
    return prompt, []


def _text_alone(row: Row) -> Built:
    return "", [Response(text=_answer(_string(row["text"], "text"), "text"))]


# ---------------------------------------------------------------- prompts and answers


def _prompt(row: Row) -> Text:
    prompt = _text(_column(row, "prompt"), "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow("wrong role", "`prompt` ends with an assistant message", "move it into the response")
    return prompt


def _answers(prompt: Text, answers: list[Text], names: list[str]) -> tuple[Text, list[Text]]:
    """The prompt in the form its answers have, and the answers without any copy of the prompt.

    Data sets often give the prompt as text beside answers that are whole conversations; trained as they
    stand, the request would count as part of the response.
    """
    lists = [answer for answer in answers if isinstance(answer, list)]
    if not lists:
        pass
    elif isinstance(prompt, list):
        answers = [a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in answers]
    elif all(answer[0]["role"] == "assistant" for answer in lists):
        prompt = [{"role": "user", "content": prompt}]
    else:
        request = prompt.strip()
        prompt, answers = _implicit(answers, names)
        if not any(isinstance(m, dict) and request == m["content"].strip() for m in prompt):
            what = f"`{names[0]}` is a conversation in which the text of `prompt` does not occur"
            raise BadRow("no common prompt", what, "rename the `prompt` column to leave it out")
    return prompt, [_answer(answer, name) for answer, name in zip(answers, names, strict=True)]


def _implicit(answers: list[Text], names: list[str]) -> tuple[Text, list[Text]]:
    """Splits off what all answers begin with. Raises `BadRow` when that is no prompt."""
    conversations = [answer for answer in answers if isinstance(answer, list)]
    if len(conversations) == 1:
        cut = _first_reply(conversations[0], names[0])
    elif conversations:
        cut = _common_messages(conversations, names)
    else:
        cut = _common_text([answer for answer in answers if isinstance(answer, str)], names)
    return answers[0][:cut], [
        _answer(answer[cut:], name) for answer, name in zip(answers, names, strict=True)
    ]


def _common_text(texts: list[str], names: list[str]) -> int:
    """Length of the shared prompt: to the last common turn marker, else to the last common whitespace.

    The whitespace itself opens the answers, since tokenizers join a space to the word after it.
    """
    common = texts[0][: _common_length(texts)]
    if any(ASSISTANT_MARKER in text for text in texts):
        at = common.rfind(ASSISTANT_MARKER)
        if at < 0:
            raise _no_common_prompt(names)
        return at + len(ASSISTANT_MARKER)
    return max((i for i, character in enumerate(common) if character.isspace()), default=0)


def _common_messages(conversations: list[list[Message]], names: list[str]) -> int:
    """Number of shared leading messages after which every conversation goes on with the assistant."""
    for cut in range(_common_length(conversations), 0, -1):
        if all(len(c) > cut and c[cut]["role"] == "assistant" for c in conversations):
            return cut
    raise _no_common_prompt(names)


def _common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How much all begin with alike, by bisection: dialogues are long and there are many."""
    first, low, high = sequences[0], 0, min(map(len, sequences))
    while low < high:
        middle = (low + high + 1) // 2
        if all(s[low:middle] == first[low:middle] for s in sequences[1:]):
            low = middle
        else:
            high = middle - 1
    return low


def _no_common_prompt(names: list[str]) -> BadRow:
    what = f"{' and '.join(names)} do not begin with the same request"
    return BadRow("no common prompt", what, "give the request in a `prompt` column")


def _first_reply(messages: list[Message], name: str) -> int:
    """Index of the first assistant message, which must have a request before it."""
    cut = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if cut is None:
        what = f"`{name}` has no assistant message"
        raise BadRow("empty response", what, "remove the row or add the reply")
    if cut == 0:
        what = f"`{name}` begins with an assistant message"
        raise BadRow("wrong role", what, "begin with a system or user message")
    return cut


def _answer(answer: Text, name: str) -> Text:
    """Checks that an answer says something, and, in messages, that the assistant opens it."""
    if isinstance(answer, list) and answer and answer[0]["role"] != "assistant":
        what = f"`{name}` goes on with a {answer[0]['role']} message where the assistant should reply"
        raise BadRow("wrong role", what, "put what comes before the reply into `prompt`")
    if isinstance(answer, str):
        empty = not answer.strip()
    else:
        replies = [m for m in answer if m["role"] == "assistant"]
        empty = not any(m["content"].strip() or m.get("tool_calls") for m in replies)
    if empty:
        raise BadRow("empty response", f"the response in `{name}` is empty", "remove the row or fill it in")
    return answer


# ---------------------------------------------------------------- values


def _check(value: Any, name: str, depth: int = 0) -> None:
    """Refuses text that no file can hold and nesting that no checkpoint can, in any column."""
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError:
            what = f"`{_short(name)}` holds half of a surrogate pair"
            raise BadRow("invalid text", what, "write the text as UTF-8") from None
    elif isinstance(value, dict | list):
        if depth > DEEPEST:
            what = f"`{_short(name)}` is nested more than {DEEPEST} deep"
            raise BadRow("too deep", what, "flatten it or remove the column")
        if isinstance(value, list):
            for inner in value:
                _check(inner, name, depth + 1)
            return
        for key, inner in value.items():
            _check(key, name, depth + 1)
            _check(inner, name if depth else str(key), depth + 1)


def _column(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    found = ", ".join(sorted(row))
    mend = f'add it, or rename yours with columns = {{"yours" = "{name}"}} (found: {_short(found)})'
    raise BadRow("missing column", f"column `{name}` is missing", mend)


def _text(value: Any, name: str) -> Text:
    return _messages(value, name) if isinstance(value, list) else _string(value, name)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text")
    return value


def _messages(value: list[Any], name: str) -> list[Message]:
    if not value:
        raise BadRow("empty list", f"`{name}` is an empty list", "remove the row or fill it in")
    return [_message(message, name) for message in value]


def _message(message: Any, name: str) -> Message:
    """One message with text content, without the null keys that columnar files add to every message."""
    if not isinstance(message, dict):
        raise _wrong_type(name, message, 'messages such as {"role": "user", "content": "…"}')
    if message.get("role") not in tuple(ROLES):
        what = f"`{name}` has a message with role {_short(repr(message.get('role')))}"
        raise BadRow("unknown role", what, f"use {', '.join(sorted(ROLES))}")
    clean = {key: value for key, value in message.items() if value is not None}
    content = clean.get("content")
    if content is None and clean.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_string(_text_part(part, name), name) for part in content)
    return clean | {"content": _string(content, f"{name}.content")}


def _text_part(part: Any, name: str) -> Any:
    if isinstance(part, dict) and part.get("type") == "text":
        return part.get("text")
    raise _wrong_type(f"{name}.content", part, "text parts; other media are not supported")


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong type", f"`{name}` is not a valid JSON list", "mend its quoting") from None
        _check(value, name)
    if not isinstance(value, list):
        raise _wrong_type(name, value, "a list")
    if not value:
        raise BadRow("empty list", f"`{name}` is an empty list", "remove the row or fill it in")
    return value


def _same_length(first: list[Any], second: list[Any], *names: str) -> None:
    if len(first) != len(second):
        what = f"`{names[0]}` has {len(first)} entries and `{names[1]}` {len(second)}"
        raise BadRow("lists of unequal length", what, "give one entry each")


def _per_response(row: Row, name: str, responses: list[Response]) -> list[tuple[Response, Any]]:
    """Pairs each response with its entry; a mapping of lists by attribute is turned about first."""
    if name not in row:
        return []
    value = row[name]
    if name == "ratings" and isinstance(value, dict) and value:
        columns = {key: _list(scores, f"ratings.{key}") for key, scores in value.items()}
        for key, scores in columns.items():
            _same_length(responses, scores, "responses", f"ratings.{key}")
        value = [{key: scores[i] for key, scores in columns.items()} for i in range(len(responses))]
    value = _list(value, name)
    _same_length(responses, value, "responses", name)
    return list(zip(responses, value, strict=True))


def _ranking(row: Row, count: int) -> list[float]:
    """The rank of each response, from a list of them best first, by number from 1 or by the row's ``ids``.

    An entry that is a list is a tie; responses that are not named are tied below those that are.
    """
    if "ranks" in row:
        raise BadRow("two rankings", "the row has both `ranks` and `ranking`", "keep one of them")
    names: list[Any] = list(range(1, count + 1))
    if "ids" in row:
        names = _list(row["ids"], "ids")
        _same_length(["" for _ in range(count)], names, "responses", "ids")
        if any(isinstance(name, bool) or not isinstance(name, str | int) for name in names):
            raise BadRow("wrong type", "`ids` holds something other than text and numbers", "name each so")
        if len(set(names)) < count:
            raise BadRow("repeated id", "`ids` names two responses alike", "give each its own")
    ranks: dict[Any, float] = {}
    for entry in _list(row["ranking"], "ranking"):
        tied = _list(entry, "ranking") if isinstance(entry, list) else [entry]
        place = 1.0 + len(ranks)
        for name in tied:
            if isinstance(name, bool) or not isinstance(name, str | int) or name not in names:
                known = _short(", ".join(map(str, names)))
                what = f"`ranking` names {_short(repr(name))}, and the responses are {known}"
                raise BadRow("unknown id", what, "name each response by its number from 1, or by its id")
            if name in ranks:
                raise BadRow("repeated id", f"`ranking` names {_short(repr(name))} twice", "name each once")
            ranks[name] = place
    return [ranks.get(name, 1.0 + len(ranks)) for name in names]


def _rating(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        return {"overall": _number(value, "ratings")}
    ratings = {str(key): _number(v, f"ratings.{key}") for key, v in value.items() if v is not None}
    if not ratings:
        what = "`ratings` has an entry without any attribute"
        raise BadRow("empty list", what, "remove the row or fill it in")
    return ratings


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        what = f"`{name}` holds {number}"
        raise BadRow("not a finite number", what, "remove the row or give a finite number")
    if abs(number) > LARGEST:
        what = f"`{name}` holds {number:g}"
        raise BadRow("too large a number", what, f"give one of at most {LARGEST:g}")
    return number


def _label(value: Any, name: str) -> bool:
    label = LABELS.get(value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, int | float) and value in (0, 1):
        label = bool(value)
    if label is None:
        what = f"`{name}` is {_short(repr(value))}"
        raise BadRow("unknown label", what, "use true/false, 1/0, allow/deny or safe/unsafe")
    return label


def _wrong_type(name: str, value: Any, wanted: str) -> BadRow:
    found = "null" if value is None else type(value).__name__
    return BadRow(
        "wrong type", f"`{name}` holds {found}, not {wanted}", "correct the value or remove the row"
    )


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
