"""Responses as bytes, so that what one process has sampled and scored every process gets, to the bit.

Token ids and per-token numbers travel as they are in memory (4 and 8 bytes each; as JSON they would be three
times as many), everything else that a response holds as JSON, which keeps a float exactly, nan and inf too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from trimtab.groups import Response

NUMBERS = ("sampler_logps", "old_logps", "ref_logps", "old_values", "token_advantages", "returns")
"""Fields that hold a float for each token."""
_HEAD = 8
"""Bytes that say how long the JSON is."""
_PLAIN = tuple(f.name for f in fields(Response) if f.name not in ("tokens", *NUMBERS))


def packed(rows: Sequence[Sequence[Response]], beside: Any = None) -> bytes:
    """Rows of responses, and anything ``beside`` them that JSON holds."""
    tokens: list[list[int]] = []
    numbers: list[list[float]] = []
    told: list[list[dict[str, Any]]] = []
    for row in rows:
        told.append([])
        for response in row:
            said = {name: value for name in _PLAIN if (value := getattr(response, name)) is not None}
            if response.tokens is not None:
                said["tokens"] = len(response.tokens)
                tokens.append(response.tokens)
            for name in NUMBERS:
                if (values := getattr(response, name)) is not None:
                    said[name] = len(values)
                    numbers.append(values)
            told[-1].append(said)
    text = json.dumps({"rows": told, "beside": beside}).encode()
    return b"".join(
        [
            len(text).to_bytes(_HEAD, "little"),
            text,
            *(np.asarray(values, dtype="<i4").tobytes() for values in tokens),
            *(np.asarray(values, dtype="<f8").tobytes() for values in numbers),
        ]
    )


def unpacked(message: bytes) -> tuple[list[list[Response]], Any]:
    """The inverse of :func:`packed`."""
    end = _HEAD + int.from_bytes(message[:_HEAD], "little")
    told = json.loads(message[_HEAD:end])
    said = [response for row in told["rows"] for response in row]
    count = sum(response.get("tokens", 0) for response in said)
    tokens = np.frombuffer(message, "<i4", count, end).tolist()
    numbers = np.frombuffer(message[end + 4 * count :], "<f8").tolist()
    token = number = 0
    for response in said:
        if (length := response.get("tokens")) is not None:
            response["tokens"] = tokens[token : token + length]
            token += length
        for name in NUMBERS:
            if (length := response.get(name)) is not None:
                response[name] = numbers[number : number + length]
                number += length
    return [[Response(**response) for response in row] for row in told["rows"]], told["beside"]
