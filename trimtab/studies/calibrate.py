"""What this machine computes in seconds: small models learn and are sampled from, speeds are fitted to that.

Each trial is real work of a run (forward and backward, an optimiser's step, a rollout) on a model of a few
layers, and ``planning/work.py`` says what it consists of. All trials take turns until the time is spent; of
each the median counts. Speeds are what explains the medians best (least squares of the relative errors, none
below 0), so that the plan of a run is off by what the formulas miss, not by what a data sheet promises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from trimtab.errors import InputError
from trimtab.planning.counts import Amount
from trimtab.planning.devices import Device, Reached, keep
from trimtab.planning.job import Compute
from trimtab.registry.surroundings import hardware
from trimtab.studies.trials import Trial, float32_trial, make_trials
from trimtab.training.precision import choose_dtype

TRAINING = ("products", "narrow", "scores", "passes", "logits", "updates", "calls")
SAMPLING = ("decode_bytes", "decode_flops", "draws", "decode_calls", "rows")
"""Kinds of work whose speeds are fitted, to trials without and with sampling."""
LARGEST = 100.0
"""Of a share: what the trials do not notice is given this."""


def calibrate(seconds: float = 20.0, *, save: bool = True) -> Device:
    """Measure this machine with as many threads as PyTorch uses now; kept for ``devices.calibrated``.

    ``seconds``: of the trials, beside a few to prepare them. Raises InputError for fewer than 1.
    """
    if not seconds >= 1:
        raise InputError(f"a calibration of {seconds} s measures nothing: give it 1 or more")
    dtype, _ = choose_dtype("auto", None, torch.device("cpu"), 2048)
    compute: Compute = "bfloat16" if dtype == torch.bfloat16 else "float32"
    peaks: dict[str, float] = {name: products_speed(name) for name in {"float32", compute}}
    bandwidth = read_speed()
    trials, wide = make_trials(compute), [float32_trial()] if compute == "bfloat16" else []
    measure([*trials, *wide], seconds)
    device = fit(trials, compute, peaks, bandwidth, float32=wide[0] if wide else None)
    if save:
        keep(device, torch.get_num_threads())
    return device


def measure(trials: Sequence[Trial], seconds: float) -> None:
    """Run the trials in turns, once to warm up and then at least three times, until the time is spent."""
    for trial in trials:
        trial.run()
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        turns += 1
        for trial in trials:
            trial.time()


def fit(
    trials: Sequence[Trial],
    compute: Compute,
    peaks: dict[str, float],
    bandwidth: float,
    *,
    float32: Trial | None = None,
) -> Device:
    """The device whose speeds explain the trials. Peaks in flops a second, bandwidth in bytes.

    ``float32``: a trial in that dtype, where the others are not. A device has one share of its peak that
    products reach; they reach less of bf16's, so the peak in fp32 is set to what gives this trial's time.
    """
    training = [trial for trial in trials if not trial.amount.rows]
    sampling = [trial for trial in trials if trial.amount.rows]
    costs = _explained(training, TRAINING)
    known = [sum(_count(trial.amount, kind) * costs[kind] for kind in TRAINING) for trial in sampling]
    costs |= _explained(sampling, SAMPLING, known)
    peak, about = peaks[compute], hardware()
    if float32 is not None:
        others = sum(_count(float32.amount, kind) * costs[kind] for kind in TRAINING if kind != "products")
        products_s = max(float32.median - others, 0.1 * float32.median)
        reaches = _share(costs["products"], peak)
        peaks = peaks | {"float32": _count(float32.amount, "products") / products_s / reaches}
    reached = Reached(
        **{kind: _share(costs[kind], peak) for kind in ("products", "narrow", "scores")},
        **{kind: _share(costs[kind], bandwidth) for kind in ("passes", "logits", "draws", "updates")},
        decode=_share(costs["decode_flops"], peak),
        weights=_share(costs["decode_bytes"], bandwidth),
    )
    return Device(
        name=f"{about['cpu']}, {torch.get_num_threads()} thread(s)",
        engine="cpu",
        memory_gib=round((about["memory_mb"] or 0) / 1024, 1),
        float32=peaks["float32"] / 1e12,
        bfloat16=peaks["bfloat16"] / 1e12 if "bfloat16" in peaks else None,
        bandwidth=bandwidth / 1e9,
        link=10.0,
        node_link=1.25,
        node_devices=1,
        reached=reached,
        call_s=costs["calls"],
        decode_call_s=costs["decode_calls"],
        row_s=costs["rows"],
        measured=True,
    )


def _explained(
    trials: Sequence[Trial], kinds: Sequence[str], known: Sequence[float] = ()
) -> dict[str, float]:
    """Seconds a unit of each kind: least squares of the relative errors, none below 0."""
    took = np.array([trial.median for trial in trials])
    counts = np.array([[_count(trial.amount, kind) for kind in kinds] for trial in trials], dtype=float)
    rest = np.maximum(took - np.array(known or np.zeros(len(took))), 0.1 * took)
    scale = np.where(counts.any(axis=0), counts.max(axis=0), 1.0)
    solved = not_below_zero(counts / scale / took[:, None], rest / took)
    return dict(zip(kinds, (solved / scale).tolist(), strict=True))


def _count(amount: Amount, kind: str) -> float:
    return float(amount.products + amount.slow if kind == "products" else getattr(amount, kind))


def not_below_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x ≥ 0 with the smallest ‖a·x − b‖: Lawson and Hanson (1974), chapter 23."""
    x, used = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        slope = a.T @ (b - a @ x)
        slope[used] = -np.inf
        best = int(slope.argmax())
        if slope[best] <= 1e-12:
            break
        used[best] = True
        while True:
            tried = np.zeros_like(x)
            tried[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
            if (tried[used] > 0).all():
                x = tried
                break
            low = used & (tried <= 0)
            step = (x[low] / (x[low] - tried[low])).min()
            x = x + step * (tried - x)
            used &= x > 1e-15
            x[~used] = 0.0
    return x


def _share(cost: float, peak: float) -> float:
    return min(LARGEST, 1 / (cost * peak)) if cost else LARGEST


def products_speed(compute: str, *, rounds: int = 12) -> float:
    """Flops a second of a large matrix product, the fastest of some rounds."""
    size = 1536
    a, b = torch.ones((2, size, size), dtype=getattr(torch, compute))
    return 2 * size**3 / _fastest(lambda: a @ b, rounds)


def read_speed(*, rounds: int = 12) -> float:
    """Bytes a second at which memory is read: a sum over more than a cache holds."""
    numbers = torch.ones(2**26)
    return numbers.numel() * 4 / _fastest(numbers.sum, rounds)


def _fastest(run: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)
