"""A calibration finds the speeds that explain its trials, and keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from trimtab.errors import InputError
from trimtab.planning.counts import Amount, Tokens
from trimtab.planning.devices import calibrated
from trimtab.planning.time import spent_on, together
from trimtab.studies import calibrate as calibration
from trimtab.studies.calibrate import SAMPLING, TRAINING, calibrate, fit, measure, not_below_zero
from trimtab.studies.trials import Shape, Trial, _drawn, _read, _ready, _trained, make_trials

PEAKS = {"bfloat16": 1e12, "float32": 1e11}


def trials(costs: dict[str, float], count: int = 24, seed: int = 0) -> list[Trial]:
    """Work of all kinds in every proportion, half of it with sampling, on a machine of these costs."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(count):
        kinds = TRAINING if i % 2 else (*TRAINING, *SAMPLING)
        counts = {kind: 10 ** draw.uniform(-2, 0) / costs[kind] for kind in kinds}
        seconds = sum(costs[kind] * counts[kind] for kind in kinds)
        made.append(Trial(str(i), Amount(**counts), lambda: None, [seconds, seconds, 9 * seconds]))
    return made


SECONDS = (2e-12, 3e-11, 8e-12, 2e-10, 6e-10, 1e-10, 4e-4, 1.5e-10, 3e-12, 1e-9, 1e-4, 2e-5)
COSTS = dict(zip((*TRAINING, *SAMPLING), SECONDS, strict=True))


def test_speeds_are_found_again() -> None:
    device = fit(trials(COSTS), "bfloat16", PEAKS, 2e10)
    reached = device.reached
    assert reached.products == pytest.approx(1 / 2e-12 / 1e12), "half of the peak"
    assert reached.narrow == pytest.approx(1 / 3e-11 / 1e12)
    assert reached.passes == pytest.approx(1 / 2e-10 / 2e10), "a quarter of the bandwidth"
    assert reached.weights == pytest.approx(1 / 1.5e-10 / 2e10)
    assert (device.call_s, device.decode_call_s, device.row_s) == pytest.approx((4e-4, 1e-4, 2e-5))
    for trial in trials(COSTS, seed=1):
        found = together(spent_on(trial.amount, device, "bfloat16"), device)
        assert found == pytest.approx(trial.median), "other work than was measured"


def test_one_trial_in_three_that_was_disturbed_changes_nothing() -> None:
    # Nine times the seconds in the third turn: of means the speeds would be 3.7 times as low.
    assert fit(trials(COSTS), "bfloat16", PEAKS, 2e10).reached.products == pytest.approx(0.5)


def test_without_bf16_the_shares_are_of_float32() -> None:
    device = fit(trials(COSTS), "float32", {"float32": 1e11}, 2e10)
    assert device.bfloat16 is None
    assert device.flops("bfloat16") == device.flops("float32") == 1e11
    assert device.reached.products == pytest.approx(5)


def test_float32_beside_bf16_goes_as_fast_as_it_was_seen_to() -> None:
    # 4e9 flops and 1e8 bytes in 60 ms: 20 ms are the bytes', so that products reach 1e11 flops a second. By
    # bf16's share of the peak, one half, they would be planned at 5e10, and a pass of 4e9 flops at 100 ms.
    seen = Trial("float32", Amount(products=4e9, passes=1e8), lambda: None, [0.06])
    device = fit(trials(COSTS), "bfloat16", PEAKS, 2e10, float32=seen)
    assert together(spent_on(seen.amount, device, "float32"), device) == pytest.approx(0.06)
    assert together(spent_on(Amount(products=4e9), device, "float32"), device) == pytest.approx(0.04)
    for trial in trials(COSTS, seed=1):
        found = together(spent_on(trial.amount, device, "bfloat16"), device)
        assert found == pytest.approx(trial.median), "bf16 and adapters' factors as before"


def test_what_no_trial_notices_costs_nothing() -> None:
    costs = {**COSTS, "rows": 1e-30}
    device = fit(trials(costs), "bfloat16", PEAKS, 2e10)
    assert device.row_s < 1e-20
    assert device.reached.products == pytest.approx(0.5)


def test_least_squares_as_scipy_solves_them() -> None:
    draw = np.random.default_rng(3)
    for _ in range(30):
        a, b = draw.normal(size=(9, 5)), draw.normal(size=9)
        assert not_below_zero(a, b) == pytest.approx(nnls(a, b)[0], abs=1e-9)


def test_a_trials_model_is_the_one_that_is_planned() -> None:
    on = _ready(Shape(128, 2), "float32")
    assert sum(p.numel() for p in on.lm.model.parameters()) == on.shape.model.parameters
    assert on.lm.layout == "packed"
    adapted = _ready(Shape(128, 2), "float32", adapter=True)
    learned = sum(p.numel() for p in adapted.lm.model.parameters() if p.requires_grad)
    job = adapted.job(Tokens(8, 4, 36, 1))
    assert job.adapter.rank * job.adapter.ends == learned
    assert job.adapter.layers == 14


def test_trials_cover_every_kind_of_work() -> None:
    for kinds, drawn in ((TRAINING, False), (SAMPLING, True)):
        found = [t.amount for t in made_once() if bool(t.amount.rows) == drawn]
        counts = np.array([[getattr(amount, kind) for kind in kinds] for amount in found], dtype=float)
        assert len(found) >= len(kinds)
        assert np.linalg.matrix_rank(counts / counts.max(axis=0)) == len(kinds), "one solution"


def made_once(kept: list[Trial] = []) -> list[Trial]:  # noqa: B006 - kept on purpose
    """The trials, whose models take a moment to make."""
    if not kept:
        kept += make_trials("float32")
    return kept


def small(compute: str) -> list[Trial]:
    """Trials of a moment."""
    on = _ready(Shape(128, 1), "float32")
    return [
        _trained("a", on, groups=2, prompt=8, response=8),
        _trained("b", on, groups=1, prompt=8, response=8, update=True),
        _read("c", on, groups=2, prompt=8, response=8),
        _drawn("d", on, prompts=1, samples=2, response=4),
        _drawn("e", on, prompts=2, samples=4, response=2),
    ]


def test_a_measured_machine_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "make_trials", small)
    monkeypatch.setattr(calibration, "products_speed", lambda compute: 1e11)
    monkeypatch.setattr(calibration, "read_speed", lambda: 1e10)
    torch.set_num_threads(1)
    device = calibrate(1.0)
    assert calibrated(1) == device
    assert device.measured
    assert device.engine == "cpu"
    assert device.reached.products > 0
    for trial in small("float32"):
        measure([trial], 0.01)
        assert together(spent_on(trial.amount, device, "float32"), device) > 0
    before = (tmp_path / "trimtab" / "calibration.json").read_text()
    calibrate(1.0, save=False)
    assert (tmp_path / "trimtab" / "calibration.json").read_text() == before


def test_turns() -> None:
    order: list[str] = []
    pair = [Trial(name, Amount(), lambda name=name: order.append(name)) for name in "ab"]  # type: ignore[misc]
    measure(pair, 0.0)
    assert order == list("ab" * 4), "in turns, the first of them to warm up"
    assert [len(trial.seconds) for trial in pair] == [3, 3]


@pytest.mark.parametrize("seconds", [0.5, -1.0, float("nan")])
def test_too_short(seconds: float) -> None:
    with pytest.raises(InputError, match="measures nothing"):
        calibrate(seconds)


def test_a_share_is_never_infinite() -> None:
    device = fit(trials({**COSTS, "narrow": 1e-40}), "bfloat16", PEAKS, 2e10)
    assert all(value <= calibration.LARGEST for value in dataclasses.astuple(device.reached))
