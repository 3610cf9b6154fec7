"""The benchmark of one process and two: its cases, what is made of its runs, what the page shows."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.plan.cases import METHODS as PLANNED
from benchmarks.plan.cases import MODELS, PROMPT, QWEN2, RESPONSE
from benchmarks.plan.inputs import write_model
from benchmarks.plan.worker import overrides
from benchmarks.scale import cases, command, measure, pages
from benchmarks.scale.cases import ALONE, CASES, WAYS, Case
from benchmarks.scale.messages import CALLS, Messages
from trimtab import methods
from trimtab.config import load_config

SFT = Case("sft", "all weights")
FSDP = "torch.distributed.fsdp._fully_shard._fsdp_collectives"


def test_every_case_has_the_tokens_of_a_step_and_halves_them() -> None:
    for case in CASES:
        config: Any = methods.find(case.method).Config
        kind, _ = PLANNED[case.method]
        responses = 2 if kind == "pairs" else 1
        if case.method == "grpo":
            responses = config.model_fields["grpo"].default_factory().group_size
        if case.method == "ppo":
            responses = config.model_fields["ppo"].default_factory().samples
        groups = int(case.options(ALONE)["train.batch_groups"])
        assert groups * (PROMPT + responses * RESPONSE) == cases.TOKENS, case.name
        assert groups % 2 == 0
    assert cases.TOKENS // 2 <= 4096 < cases.TOKENS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_accepts_its_options(case: Case, tmp_path: Path) -> None:
    for way in WAYS:
        given = overrides(case.method, tmp_path / "model", tmp_path, case.options(way, steps=2))
        config: Any = load_config(methods.find(case.method).Config, None, given)
        assert config.train.steps == 2
        assert config.parallel.weights == ("auto" if way.processes == 1 else way.weights)
        assert config.adapter.kind == ("lora" if case.adapter == "LoRA" else "none")


def process(ends: list[float], calls: list[list[float]], peak: float = 100.0) -> dict[str, Any]:
    return {"ends": ends, "calls": calls, "peak_mb": peak, "baseline_mb": 50.0}


def test_who_comes_last_to_a_message_waits_for_nobody() -> None:
    # The first step counts for nothing. In the second the first process waits 1 s in message one, the other
    # 2 s in message two; without either, messages take 0.5 + 0.5 s. Each process spends (2 + 3) / 2 = 2.5 s
    # in them on average, 1.5 of which is waiting; not 3 s, the larger sum, nor 5, both.
    one = process([10.0, 14.0, 20.0], [[9.0], [1.5, 0.5], [1.0, 1.0]])
    other = process([10.5, 14.5, 20.5], [[1.0], [0.5, 2.5], [1.0, 1.0]], peak=120.4)
    found = measure.figures([one, other])
    # Steps of 4 and 6 s; messages 2.5 and 2 s; waiting 1.5 and 0 s: medians.
    assert found["step_s"] == 5.0
    assert found["messages_s"] == pytest.approx(2.25)
    assert found["waiting_s"] == pytest.approx(0.75)
    assert found["messages"] == 2
    assert found["peak_mb"] == [100, 120]
    other["calls"][1].pop()
    with pytest.raises(ValueError, match=r"\[2, 1\] messages in one step"):
        measure.figures([one, other])


def entry(way: str, number: int, step: float, peak: int, **more: Any) -> dict[str, Any]:
    given = {"case": SFT.name, "way": way, "run": number, "steps": cases.STEPS, "messages": 7}
    figures = {"step_s": step, "messages_s": step / 10, "waiting_s": step / 20, "peak_mb": [peak, peak - 1]}
    return {**given, **figures, "load": 0.5, "others": 0.02, **more}


def test_a_row_is_the_middle_of_its_runs_and_says_what_is_wrong_with_them() -> None:
    names = [way.name for way in WAYS]
    entries = [
        entry(names[0], i, step, peak) for i, (step, peak) in enumerate([(4, 900), (8, 1000), (5, 1100)])
    ]
    entries += [entry(names[1], i, 2.5, 1000, others=noise) for i, noise in enumerate([0.02, 0.9, 0.01])]
    failed = {"load": 0.5, "others": 0.0, "failed": "out of memory"}
    entries += [
        entry(names[2], 0, 3.0, 1000),
        {"case": SFT.name, "way": names[2], "run": 1, "steps": cases.STEPS, **failed},
    ]
    entries += [entry(names[3], 0, 10.0, 500)]
    rows = command.rows_of([SFT], entries, {SFT.name: dict.fromkeys(names, 1100)})
    by = {row["way"]: row for row in rows}
    alone = by[names[0]]
    assert (alone["step_s"], alone["runs"], alone["speedup"]) == (5, 3, 1.0)
    assert alone["tokens_per_s"] == cases.TOKENS / 5
    assert alone["peak_mb"] == [1000, 999]
    assert alone["error"] == pytest.approx(0.1)  # of the larger of the two, 1000
    assert "noisy" not in alone
    assert by[names[1]]["noisy"]
    assert by[names[1]]["others"] == 0.9
    assert by[names[1]]["speedup"] == 2.0
    assert by[names[2]]["failed"] == "out of memory"
    assert "step_s" not in by[names[2]]
    assert by[names[3]]["speedup"] == 0.5
    text = "\n".join(pages.tables({"rows": rows}))
    assert "| sft, all weights | 1 process | 5.00 s | 1,536 | 1.00× | – | – |" in text
    assert "| sft, all weights | 1 process, 2 threads | 2.50 s † | 3,072 | 2.00× | – | – |" in text
    assert "| sft, all weights | 2 processes, shard | 10.00 s | 768 | 0.50× | 1.00 s | 0.50 s |" in text
    assert "| sft, all weights | 2 processes, shard | 500 and 499 MB | 1,100 MB | +120.0% |" in text
    assert "sft, all weights, 2 processes, replicate: failed: out of memory" in text
    assert "up to 0.9 cores busy" in text
    assert "failed: out of memory" in command.show({"rows": rows})
    assert ", noisy" in command.show({"rows": rows})


def test_runs_take_turns_and_a_later_call_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, str]] = []

    def measured(case: Case, way: cases.Way, folder: Path, steps: int) -> dict[str, Any]:
        made.append((case.name, way.name))
        if len(made) == 3:
            return {"failed": "broken", "load": 0.0, "others": None}
        found = entry(way.name, 0, 1.0, 100)
        return {k: v for k, v in found.items() if k not in ("case", "way", "run", "steps")}

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(command, "planned", lambda *_: {way.name: 100 for way in WAYS})
    names = [way.name for way in WAYS]
    one = command.run([SFT.name], tmp_path, runs=1)
    assert made == [(SFT.name, way) for way in names]
    assert [row.get("failed") for row in one["rows"]] == [None, None, "broken", None]
    made.clear()
    two = command.run([SFT.name, "dpo, LoRA"], tmp_path, runs=2)
    # What failed is tried again, what was measured is not.
    first = [(SFT.name, names[2]), *(("dpo, LoRA", way) for way in names)]
    assert made == [*first, *itertools.product([SFT.name, "dpo, LoRA"], names)]
    assert all(row["runs"] == 2 for row in two["rows"])
    made.clear()
    assert command.run([SFT.name], tmp_path, runs=1)["rows"][2]["runs"] == 1
    assert made == []


def started(*scripts: str, work: Path) -> list[subprocess.Popen[bytes]]:
    processes = []
    for rank, script in enumerate(scripts):
        with (work / f"{rank}.log").open("wb") as said:
            processes.append(subprocess.Popen([sys.executable, "-c", script], stdout=said, stderr=said))
    return processes


def test_a_process_that_fails_ends_the_others_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "GRACE_S", 0.2)
    waits = "import time; time.sleep(60)"
    processes = started(waits, "print('no room'); raise SystemExit(3)", work=tmp_path)
    assert measure.ended(processes, tmp_path, 30) == "process 1 of 2 ended with code 3: no room"
    assert all(process.returncode is not None for process in processes)
    assert measure.ended(started(waits, work=tmp_path), tmp_path, 0.2) == "not done after 0 s"
    assert measure.ended(started("pass", "pass", work=tmp_path), tmp_path, 30) == ""


def test_messages_are_counted_once_and_only_of_their_thread() -> None:
    before = dist.all_reduce, dist.Work.wait
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        messages = Messages()
        with messages.timed():
            dist.all_reduce(torch.ones(2))  # waits within: one call, not two
            assert len(messages.seconds) == 1
            work = dist.all_reduce(torch.ones(2), async_op=True)
            work.wait()
            assert len(messages.seconds) == 3
            other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2)))
            other.start()
            other.join()
            assert len(messages.seconds) == 3
        assert all(0 < seconds < 30 for seconds in messages.seconds)
        dist.all_reduce(torch.ones(2))
        assert len(messages.seconds) == 3
    finally:
        dist.destroy_process_group()
    assert (dist.all_reduce, dist.Work.wait) == before


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that is called as the benchmark's, and is small."""
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, cases.MODEL, ("qwen2", QWEN2 | small))
        place = folder / "qwen2-82M"
        place.mkdir()
        write_model(place, cases.MODEL)
    return folder


def test_two_processes_are_measured(little: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.METHODS, "sft", {"train.batch_groups": "2"})
    found = measure.measure(SFT, WAYS[2], little, steps=2)
    assert "failed" not in found, found
    assert found["step_s"] > 0
    # The sum of gradients, and what processes tell each other of each step.
    assert found["messages"] > 3
    assert 0 < found["messages_s"] < found["step_s"]
    assert 0 <= found["waiting_s"] <= found["messages_s"]
    assert len(found["peak_mb"]) == 2
    assert not list(little.glob("scale-*"))
    assert json.dumps(found)


def test_every_call_that_sharded_weights_are_sent_by_is_timed() -> None:
    source = inspect.getsource(importlib.import_module(FSDP))
    sends = set(re.findall(r"\bdist\.((?:all|reduce|broadcast|barrier)\w*)\(", source))
    assert sends >= {"all_reduce"}
    assert sends <= set(CALLS)
