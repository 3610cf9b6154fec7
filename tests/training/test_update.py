"""What goes on where a step fails: skipped steps, halved micro-batches, and a notice to end."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import assert_same_run, comparable

from trimtab import methods
from trimtab.batch import TreeBatch
from trimtab.cli import main
from trimtab.errors import InputError, Terminated
from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import probe_groups
from trimtab.rollouts.engine import TreeSampler
from trimtab.training.loop import asked_to_end
from trimtab.training.memory import out_of_memory
from trimtab.training.metrics import read_metrics
from trimtab.training.optimiser import Optimiser

Make = Callable[..., Any]


def weights(lm: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lm.model.parameters()]


def spoil(monkeypatch: pytest.MonkeyPatch, calls: set[int], factor: float = float("nan")) -> None:
    """Every loss whose number is among ``calls`` (from 1) is multiplied by ``factor``."""
    own, count = Optimiser.backward, [0]

    def backward(self: Optimiser, loss: torch.Tensor, **named: bool) -> float:
        count[0] += 1
        return own(self, loss * factor if count[0] in calls else loss, **named)

    monkeypatch.setattr(Optimiser, "backward", backward)


@pytest.mark.parametrize(("name", "which"), [("sft", {3}), ("dpo", {3}), ("reward", {3}), ("grpo", {3})])
def test_a_spoilt_step_is_skipped_counted_and_saved(
    name: str, which: set[int], configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, which)
    seen = []

    def on_eval(lm: Any, heldout: object, step: int) -> dict[str, float]:
        seen.append(weights(lm))
        return {}

    config = configured(name, train__eval_every=1, train__steps=4)
    result = methods.find(name).train(config, on_eval=on_eval)
    # Before step 1, then after each: the third changed nothing, the others did.
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)]
    assert same == [False, False, True, False]
    lines = read_metrics(result.out / "metrics.jsonl")
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 1]
    assert ["loss" in line for line in lines] == [True, True, False, True]
    saved = [json.loads(line) for line in (result.out / "skipped/step-00000003.jsonl").open()]
    assert len(saved) == config.train.batch_groups
    assert {line["fault"] for line in saved} == {"the loss is nan"}
    assert all(Group.from_dict(line["group"]).responses for line in saved)


def test_too_many_in_a_row_end_the_run(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 and 3 in a row are borne; 5, 6 and 7 are one too many.
    spoil(monkeypatch, {2, 3, 5, 6, 7})
    config = configured("sft", train__max_skipped=2, train__steps=9)
    with pytest.raises(InputError, match=r"^step 7: the loss is nan, 3 step\(s\) in a row.*skipped"):
        methods.find("sft").train(config)
    out = Path(config.run.out)
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len(list((out / "skipped").iterdir())) == 5


def test_ppo_skips_policy_and_critic_apart(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses come in turn, the critic's first: 3 is the critic's of step 2, 6 the policy's of step 3."""
    spoil(monkeypatch, {3, 6})
    config = configured("ppo", train__steps=4, train__batch_groups=4)
    result = methods.find("ppo").train(config)
    lines = read_metrics(result.out / "metrics.jsonl")
    assert [("value_loss" in line, "loss" in line) for line in lines] == [
        (True, True),
        (False, True),
        (True, False),
        (True, True),
    ]
    assert lines[-1]["skipped_steps"] == 2
    assert sorted(p.name for p in (result.out / "skipped").iterdir()) == [
        "step-00000002-critic.jsonl",
        "step-00000003.jsonl",
    ]


def test_a_run_resumed_behind_a_skipped_step_is_the_same_run(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train__save_every": 2, "train__eval_every": 1}
    runs = []
    for out in ("straight", "stopped"):
        with monkeypatch.context() as patched:
            spoil(patched, {2, 3})
            runs.append(configured("dpo", out=out, **options))
            if out == "straight":
                methods.find("dpo").train(runs[0])
                continue
            with pytest.raises(KeyboardInterrupt):
                methods.find("dpo").train(runs[1], on_eval=tiny.stop_at(3))
    with monkeypatch.context() as patched:
        spoil(patched, {1})  # the first loss behind the checkpoint is that of step 3
        methods.find("dpo").train(configured("dpo", out="stopped", run__resume=True, **options))
    assert_same_run(*(Path(config.run.out) for config in runs))


def test_groups_of_a_skipped_step_are_taken_up_when_they_come_again(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over a rollout of two micro-batches a step; the second loss of step 1 is spoilt."""
    spoil(monkeypatch, {2})
    options = {"train__batch_groups": 2, "grpo__rollout_groups": 2, "grpo__epochs_per_rollout": 2}
    config = configured("grpo", train__steps=4, train__micro_batch_tokens=40, **options)
    lines = read_metrics(methods.find("grpo").train(config).out / "metrics.jsonl")
    # Nothing was learned between the passes, so at the second every ratio is 1.
    assert "loss" not in lines[0]
    assert lines[1]["clip_fraction"] == 0
    assert lines[1]["sampler_gap"] < 1e-4
    assert lines[3]["loss"] != 0


# ---------------------------------------------------------------- memory


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """No pass over more than ``most`` tokens fits; what was tried."""
    own, tried = LanguageModel.token_logprobs, list[int]()
    probes = sum(len(r.tokens or ()) for group in probe_groups(64) for r in group.responses)

    def token_logprobs(self: LanguageModel, batch: TreeBatch, **named: Any) -> Any:
        if int(batch.mask_NT.sum()) == probes:  # the choice of a layout, not the run
            return own(self, batch, **named)
        tried.append(batch.input_ids_BL.numel())
        if tried[-1] > most:
            raise error
        return own(self, batch, **named)

    monkeypatch.setattr(LanguageModel, "token_logprobs", token_logprobs)
    return tried


CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


@pytest.mark.parametrize("error", [CPU, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_out_of_memory_halves_the_micro_batches(
    name: str, error: Exception, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is that of a configuration which named the smaller size, bit for bit."""
    most = 16 if name == "sft" else 32
    more = {"grpo__epochs_per_rollout": 2} if name == "grpo" else {}
    small = methods.find(name).train(configured(name, out="small", train__micro_batch_tokens=most, **more))
    tried = short_of_memory(monkeypatch, most, error)
    config = configured(name, out="halved", train__micro_batch_tokens=4 * most, train__save_every=3, **more)
    halved = methods.find(name).train(config)
    assert max(tried) > most
    assert sum(size > most for size in tried) <= 2, "halved once or twice, then kept"
    assert_same_run(small.out, halved.out)
    saved = tiny.saved_state(halved.out, 3)
    assert saved["environment"]["micro_batch_tokens"] == most
    lines = json.loads((halved.out / "lineage.json").read_text())["lines"]
    assert any("out of memory; going on with micro-batches of" in line for line in lines)
    # A resumed run starts with what was found, not with what was asked for.
    tried.clear()
    again = configured(
        name, out="halved", train__micro_batch_tokens=4 * most, run__resume=True, train__steps=7, **more
    )
    methods.find(name).train(again)
    assert max(tried) <= most or name == "dpo"  # its reference pass stands before the checkpoint is taken up


def test_a_group_that_does_not_fit_alone_is_one_line(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 4, CPU)
    with pytest.raises(InputError, match=r"^step 1: out of memory .*one group needs \d+ tokens"):
        methods.find("dpo").train(configured("dpo"))


def test_out_of_memory_while_sampling_is_one_line(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TreeSampler.sample

    def sample(self: TreeSampler, *arguments: Any, **named: Any) -> Any:
        if named.get("on_group") is None:  # the engine's trial
            return own(self, *arguments, **named)
        raise CPU

    monkeypatch.setattr(TreeSampler, "sample", sample)
    with pytest.raises(InputError, match=r"^step 1: out of memory while sampling .*sampling\.cache_mb"):
        methods.find("grpo").train(configured("grpo"))


def test_other_errors_are_not_taken_for_memory(configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert out_of_memory(RuntimeError("could not create a primitive"))
    short_of_memory(monkeypatch, 4, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        methods.find("sft").train(configured("sft"))


# ---------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_sigterm_saves_the_step_in_hand_and_ends(name: str, configured: Make) -> None:
    straight = methods.find(name).train(configured(name, out="straight"))

    def on_eval(lm: object, heldout: object, step: int) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="step 2 is saved"):
        methods.find(name).train(configured(name, out="ended", train__eval_every=1), on_eval=on_eval)
    assert signal.getsignal(signal.SIGTERM) is before
    out = straight.out.with_name("ended")
    assert not (out / "model").exists()
    methods.find(name).train(configured(name, out="ended", run__resume=True))
    assert comparable(read_metrics(out / "metrics.jsonl")) == comparable(
        read_metrics(straight.out / "metrics.jsonl")
    )
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (straight.out, out))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_second_sigterm_is_not_held_back() -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with asked_to_end() as asked:
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
            assert not came
            os.kill(os.getpid(), signal.SIGTERM)
            assert came
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_command_line_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dispatch(arguments: list[str]) -> int:
        raise Terminated("step 7 is saved in runs/x/checkpoints")

    monkeypatch.setattr(main, "_dispatch", dispatch)
    assert main.run(["dpo"]) == 143
    assert capsys.readouterr().err == (
        "terminated: step 7 is saved in runs/x/checkpoints; go on with --resume auto\n"
    )
