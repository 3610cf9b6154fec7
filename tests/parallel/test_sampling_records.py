"""What a process tells the others of the responses that it sampled and scored."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import time

import pytest
import torch
from processes import Processes

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.parallel.world import world
from trimtab.spread.deal import Part, places_of, put_together
from trimtab.spread.records import packed, unpacked
from trimtab.spread.share import shared_out

ODD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, float(torch.tensor(-0.7))]


def _full() -> Response:
    """Every field is set, with numbers that a careless text form would round."""
    return Response(
        text="a\u2028\ud800 \x00é",
        tokens=[0, 2**31 - 1, 7],
        mask=[True, False, True],
        preferred=False,
        label=True,
        rank=1.5,
        ratings={"overall": 0.1},
        step_texts=["a", ""],
        step_labels=[1.0, 0.0],
        step_ends=[0, 2],
        step_rewards=[0.1 + 0.2, -0.0],
        reward=1 / 3,
        reward_terms={"z": -0.0, "a/b": 1e-320},
        advantage=-1e308,
        finish="stop",
        temperature=0.7,
        sampler_logps=ODD[:3],
        old_logps=ODD[3:6],
        ref_logps=ODD[4:],
        old_values=[],
        token_advantages=[1.0],
        returns=ODD,
    )


def test_a_response_arrives_as_it_was() -> None:
    fields = dataclasses.fields(Response)
    assert all(getattr(_full(), f.name) is not None for f in fields), "a new field: set it above"
    talk = Response(text=[{"role": "assistant", "content": None, "n": 1}], tokens=[])
    rows = [[_full(), Response()], [], [talk, _full()]]
    found, beside = unpacked(packed(rows, {"waited_s": math.nan, "x": None}))
    assert found == rows
    assert repr(found) == repr(rows)  # the sign of 0 too
    assert math.isnan(beside["waited_s"])
    assert beside["x"] is None


def test_a_number_is_its_bits() -> None:
    [[found]], _ = unpacked(packed([[Response(sampler_logps=[math.nan, *ODD], reward=math.nan)]]))
    assert struct.pack("<8d", *found.sampler_logps or ()) == struct.pack("<8d", math.nan, *ODD)
    assert found.reward is not None
    assert math.isnan(found.reward)


def _large() -> list[list[Response]]:
    """512 responses of 512 tokens, as 64 groups of 8."""
    logps = torch.randn(512).tolist()
    text = "word " * 512
    return [
        [Response(text=text, tokens=list(range(512)), sampler_logps=logps, reward=0.1) for _ in range(8)]
        for _ in range(64)
    ]


def test_512_responses_of_512_tokens_are_small_and_quick() -> None:
    rows = _large()
    began = time.perf_counter()
    message = packed(rows)
    assert unpacked(message)[0] == rows
    took = time.perf_counter() - began
    beside = sum(len(r.text) for row in rows for r in row)
    assert len(message) < 12 * 512 * 512 + beside + 512 * 200
    assert took < 2.0  # 0.1 s on an idle core
    as_json = json.dumps([[dataclasses.asdict(r) for r in row] for row in rows]).encode()
    assert 1.8 * len(message) < len(as_json)


def test_prompts_are_dealt_by_number_and_mixed_by_length() -> None:
    lengths = [100, 1, 90, 2, 80, 3, 70, 4]
    prompts = [Group(id=str(i), prompt_tokens=[0] * n) for i, n in enumerate(lengths)]
    places = places_of(prompts, 2, evenly=True)
    assert sorted(i for own in places for i in own) == list(range(8))
    assert [len(own) for own in places] == [4, 4]
    assert [sum(lengths[i] for i in own) for own in places] == [175, 175]
    assert all(own == sorted(own) for own in places)
    # One that is as long as all others together does not leave its process without company.
    long = Group(id="x", prompt_tokens=[0] * 999)
    assert [len(own) for own in places_of([long, *prompts], 3, evenly=True)] == [3, 3, 3]
    assert [len(own) for own in places_of(prompts[:2], 3, evenly=True)] == [1, 1, 0]


def _squared() -> dict[str, object]:
    """Each process answers its prompts with its rank; a column that JSON does not hold stays."""
    prompts = [Group(id=str(i), prompt_tokens=[0] * (9 - i), columns={"set": {i}}) for i in range(5)]
    shares: list[int] = []

    def work(share: list[Group]) -> tuple[list[Group], dict[str, object]]:
        shares.append(len(share))
        rank = world().rank
        row = [Response(text=str(rank), tokens=[rank], sampler_logps=[0.1 * rank])]
        return [dataclasses.replace(group, responses=list(row)) for group in share], {"rank": rank}

    groups, told = shared_out(prompts, work, world())
    assert [group.columns for group in groups] == [{"set": {i}} for i in range(5)]
    assert all(r.sampler_logps == [0.1 * int(str(r.text))] for g in groups for r in g.responses)
    return {
        "ids": [group.id for group in groups],
        "who": [group.responses[0].text for group in groups],
        "told": told,
        "shares": shares,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_every_process_gets_all_groups_in_order(processes: Processes, size: int) -> None:
    found = processes.run(_squared, size=size)
    assert [f["shares"][0] for f in found] == {1: [5], 2: [3, 2]}[size]
    for each in found:
        assert each["ids"] == list("01234")
        assert each["who"] == found[0]["who"]
        assert each["told"] == [{"rank": rank} for rank in range(size)]
    assert set(found[0]["who"]) == set("012"[:size])


def _refused(known: bool) -> str:
    def work(share: list[Group]) -> tuple[list[Group], dict[str, object]]:
        if world().rank == 1:
            raise InputError("row 7: no answer") if known else KeyError("seven")
        return share, {}

    try:
        shared_out([Group(id=str(i), prompt_tokens=[0]) for i in range(4)], work, world())
    except (InputError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_fails_in_one_process_fails_in_all(processes: Processes) -> None:
    assert processes.run(_refused, known=True) == ["Heard: row 7: no answer", "InputError: row 7: no answer"]
    assert processes.run(_refused, known=False) == [
        "Heard: process 1: KeyError: 'seven'",
        "KeyError: 'seven'",
    ]


def _both_refused() -> str:
    def work(share: list[Group]) -> tuple[list[Group], dict[str, object]]:
        raise (InputError if world().rank else KeyError)(f"row {world().rank}")

    try:
        shared_out([Group(id=str(i), prompt_tokens=[0]) for i in range(4)], work, world())
    except (InputError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_of_two_failures_all_say_the_first(processes: Processes) -> None:
    found = processes.run(_both_refused)
    assert found == ["KeyError: 'row 0'", "Heard: process 0: KeyError: 'row 0'"]


def _masked() -> list[list[float] | None]:
    """Lists as long as the tokens that count, which are fewer than all."""
    masks = [None, [True, False, False], [False, True, True], None]
    responses = [Response(tokens=[1, 2, 3], mask=mask) for mask in masks]
    groups = [Group(id=str(i), responses=[r]) for i, r in enumerate(responses)]
    own = [group for i, group in enumerate(groups) if i % 2 == world().rank]
    for group in own:
        response = group.responses[0]
        counted = 3 if response.mask is None else sum(response.mask)
        response.ref_logps = [int(group.id) + 0.1 * t for t in range(counted)]
    put_together([Part(own, None)], groups, "ref_logps")  # type: ignore[arg-type]
    return [response.ref_logps for response in responses]


def test_numbers_of_responses_with_masked_tokens_do_not_shift(processes: Processes) -> None:
    first, second = processes.run(_masked)
    assert first == second == [[0.0, 0.1, 0.2], [1.0], [2.0, 2.1], [3.0, 3.1, 3.2]]
