"""Whether a run uses the compiled kernels: as asked for, as measured, and as it began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab import methods
from trimtab.kernels import build
from trimtab.kernels.build import library
from trimtab.training import precision, run
from trimtab.training.precision import choose_kernels

Make = Callable[..., Any]
CPU = "cpu"
needs_kernels = pytest.mark.skipif(library() is None, reason=f"no compiled kernels: {build.why_not()}")


@needs_kernels
def test_by_name() -> None:
    assert choose_kernels("on", CPU) == (True, "compiled kernels: on, as configured")
    assert library() is not None
    used, line = choose_kernels("off", CPU)
    assert not used
    assert line == "compiled kernels: none (turned off)"
    assert library() is None
    # What one run turned off the next one finds again.
    assert choose_kernels("on", CPU)[0]
    assert library() is not None


@needs_kernels
def test_for_a_gpu_nothing_is_measured_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else computes on the CPU, a reward model, keeps to the request."""
    monkeypatch.setattr(precision, "_elementwise_seconds", lambda: pytest.fail("measured"))
    try:
        for requested, used in (("auto", True), ("off", False), ("on", True)):
            assert choose_kernels(requested, "cuda:1") == (used, None)
            assert (library() is not None) == used
    finally:
        build.use(True)


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda:1", False, "cuda:1")],
)
def test_a_run_chooses_for_the_device_of_its_model(
    asked: str, there: bool, expected: str, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(run, "choose_kernels", lambda _, device: (devices.append(device), None))
    config = configured("sft", model__device=asked)
    run.Run("sft", config, config.run, config.train).close()
    assert devices == [expected]


@needs_kernels
@pytest.mark.parametrize("faster", [True, False])
def test_auto_measures(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        precision, "_elementwise_seconds", lambda: 1.0 if (library() is not None) == faster else 3.0
    )
    used, line = choose_kernels("auto", CPU)
    assert used == faster == (library() is not None)
    verb, ratio = ("on", "3.0") if faster else ("off", "0.3")
    assert line == f"compiled kernels: {verb}, {ratio}x the speed of PyTorch on a norm and a gate"


def test_none_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_built", lambda: (None, "no C compiler (cc)"))
    for requested in ("auto", "on"):
        assert choose_kernels(requested, CPU) == (False, "compiled kernels: none (no C compiler (cc))")


def stopped(configured: Make, name: str, **options: Any) -> Path:
    """A run that ended after its checkpoint of step 3."""
    config = configured(name, out="stopped", **options)
    with pytest.raises(KeyboardInterrupt):
        methods.find(name).train(config, on_eval=tiny.stop_at(5))
    return Path(config.run.out)


@needs_kernels
@pytest.mark.parametrize("began", ["on", "off"])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_resumed_run_goes_on_as_it_began(name: str, began: str, configured: Make) -> None:
    """Bit for bit, whatever is asked for now: the kernels round otherwise than PyTorch."""
    options = {"train__save_every": 3, "train__eval_every": 1, "model__dtype": "bfloat16"}
    straight = methods.find(name).train(configured(name, out="straight", train__kernels=began, **options))
    out = stopped(configured, name, train__kernels=began, **options)
    assert tiny.saved_state(out, 3)["environment"]["kernels"] is (began == "on")
    # As another process would find it, which has run nothing.
    build.use(True)
    other = {"on": "off", "off": "on"}[began]
    config = configured(name, out="stopped", run__resume=True, train__kernels=other, **options)
    methods.find(name).train(config)
    assert (library() is not None) == (began == "on")
    tiny.assert_same_run(straight.out, out)
    # It could have gone otherwise.
    another = methods.find(name).train(configured(name, out="other", train__kernels=other, **options))
    with pytest.raises(AssertionError):
        tiny.assert_same_run(straight.out, another.out)


@needs_kernels
def test_a_run_that_goes_on_where_nothing_can_be_compiled_says_so(
    configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train__save_every": 3, "train__eval_every": 1, "train__kernels": "on"}
    straight = methods.find("dpo").train(configured("dpo", out="straight", **options))
    stopped(configured, "dpo", **options)
    monkeypatch.setattr(build, "_built", lambda: (None, "no C compiler (cc)"))
    result = methods.find("dpo").train(configured("dpo", out="stopped", run__resume=True, **options))
    lines = json.loads((result.out / "lineage.json").read_text())["lines"]
    assert "compiled kernels: none (no C compiler (cc))" in lines
    assert sum("within rounding, not bit for bit" in line for line in lines) == 1
    for ours, theirs in zip(result.lm.model.parameters(), straight.lm.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
