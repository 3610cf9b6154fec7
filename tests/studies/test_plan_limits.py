"""Plans from a configuration's limits, before there is data: what every micro-batch would refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trimtab.errors import InputError
from trimtab.studies.job import job_of

NOWHERE = [{"path": "nowhere/prompts.jsonl"}]


@pytest.mark.parametrize(
    ("changed", "least"),
    [
        ({}, 31),  # nothing bounds the prompt: one token at the least
        ({"data__max_prompt_tokens": 12}, 42),
    ],
)
def test_answers_alone_over_the_budget(
    changed: dict[str, Any], least: int, configured: Callable[..., Any]
) -> None:
    """A prompt of one token was taken, and an answer of 30 tokens passed a budget of 20."""
    config = configured(
        "grpo",
        data__sources=NOWHERE,
        sampling__max_new_tokens=30,
        train__micro_batch_tokens=20,
        train__steps=1,
        **changed,
    )
    with pytest.raises(InputError) as refused:
        job_of("grpo", config)
    told = str(refused.value)
    assert told.startswith(f"train.micro_batch_tokens: one group needs {least} tokens")
    assert "\n" not in told


def test_answers_that_leave_a_prompt_one_token(configured: Callable[..., Any]) -> None:
    config = configured(
        "grpo",
        data__sources=NOWHERE,
        sampling__max_new_tokens=30,
        train__micro_batch_tokens=31,
        train__steps=1,
    )
    job, _, _ = job_of("grpo", config)
    assert job.batch.longest == 31


def test_no_room_for_a_pair(configured: Callable[..., Any]) -> None:
    config = configured("dpo", data__sources=NOWHERE, train__micro_batch_tokens=2)
    with pytest.raises(InputError, match=r"train\.micro_batch_tokens: one group needs 3 tokens"):
        job_of("dpo", config)
