"""What a run may be computed on: cards of common GPUs, a generic CPU, and this machine where it was measured.

Sizes and peaks are the vendors' own figures, for dense matrices: data sheets state many of them "with
sparsity", which is twice as much. Sources and what was rounded: docs/plan-time.md. What of a peak a run
reaches is in :class:`Reached`; for the cards it is assumed, for a calibrated device measured.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import InputError
from trimtab.planning.job import Compute

FORMAT = 2
"""Of the calibration file: another one is not read. To be raised when ``time.py`` counts otherwise."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Which share of the peak speed (flops) or of the bandwidth (bytes) each kind of work gets.

    The defaults are for a GPU and assumed: docs/plan-time.md says what they rest on.
    """

    products: float = 0.6
    """Flops of linear layers on many rows, in the run's dtype."""
    narrow: float = 0.2
    """Flops of an adapter's factors: products with one side as short as its rank."""
    scores: float = 0.35
    """Flops of attention between the tokens of a pass."""
    decode: float = 0.4
    """Flops of a decode step: few rows."""
    passes: float = 0.75
    """Bytes of everything elementwise, and of what linear layers read and write."""
    logits: float = 0.5
    """Bytes of passes over logits in training."""
    draws: float = 0.25
    """Bytes of passes over logits when tokens are drawn."""
    weights: float = 0.7
    """Bytes that a decode step reads: weights, keys and values."""
    updates: float = 0.8
    """Bytes of the optimiser's step."""
    link: float = 0.7
    """Bytes between devices."""


@dataclass(frozen=True, slots=True)
class Device:
    """One processor that a run, or one rank of it, computes on."""

    name: str
    engine: Literal["cpu", "gpu"]
    memory_gib: float
    """What the driver shows as the whole, in GiB (2³⁰ bytes)."""
    float32: float
    """Dense flops a second at the peak, in 10¹²; without TF32, which PyTorch leaves off."""
    bfloat16: float | None
    """None for hardware without it: it is emulated at the speed of float32."""
    bandwidth: float
    """Of its memory, in GB/s (10⁹ bytes)."""
    tf32: float | None = None
    """Dense, on the tensor cores; a plan does not use it."""
    link: float = 16.0
    """To another device of the same machine, in one direction, GB/s."""
    node_link: float = 12.5
    """To a device of another machine, in one direction, GB/s."""
    node_devices: int = 8
    """Devices of one machine."""
    hop_s: float = 5e-6
    """Of one message to a neighbour, whatever its size."""
    reached: Reached = Reached()
    call_s: float = 1.5e-4
    """Of one layer's pass, whatever its size: kernel launches on a GPU, Python and calls on a CPU."""
    decode_call_s: float = 1.5e-4
    """Of one layer in a decode step."""
    row_s: float = 5e-6
    """Of one row in a decode step: bookkeeping of a token."""
    disk: float = 1.0
    """GB/s at which weights are read."""
    measured: bool = False
    """Calibrated here, not a card."""

    def flops(self, compute: Compute) -> float:
        """Peak flops a second in that dtype."""
        if compute == "float64":
            return self.float32 * 1e12 / 2
        slow = compute == "float32" or self.bfloat16 is None
        return (self.float32 if slow else self.bfloat16) * 1e12  # type: ignore[operator]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Device:
        """The inverse. Raises TypeError or KeyError for what :meth:`to_dict` did not write."""
        return cls(**{**values, "reached": Reached(**values["reached"])})


def _gpu(
    name: str, gib: float, fp32: float, tf32: float | None, bf16: float | None, *speeds: float
) -> Device:
    bandwidth, link, node_link = speeds
    return Device(name, "gpu", gib, fp32, bf16, bandwidth, tf32=tf32, link=link, node_link=node_link)


# Name, GiB as the driver shows them, then 10¹² dense flops/s in float32, TF32 and bfloat16, GB/s of the
# memory, GB/s to a neighbour (one direction: half of what data sheets print for NVLink) and to another node.
CARDS: dict[str, Device] = {
    card.name: card
    for card in (
        _gpu("T4", 15.0, 8.1, None, None, 320, 16, 12.5),
        _gpu("V100-16GB", 16.0, 15.7, None, None, 900, 150, 12.5),
        _gpu("V100-32GB", 32.0, 15.7, None, None, 900, 150, 12.5),
        _gpu("A10", 22.49, 31.2, 62.5, 125, 600, 32, 12.5),
        _gpu("A10G", 22.49, 35, 35, 70, 600, 32, 12.5),
        _gpu("L4", 22.49, 30.3, 60, 121, 300, 32, 12.5),
        _gpu("L40", 44.99, 90.5, 90.5, 181, 864, 32, 12.5),
        _gpu("L40S", 44.99, 91.6, 183, 362, 864, 32, 12.5),
        _gpu("RTX-3090", 24.0, 35.6, 35.6, 71, 936, 32, 12.5),
        _gpu("RTX-4090", 23.99, 82.6, 82.6, 165.2, 1008, 32, 12.5),
        _gpu("RTX-5090", 31.84, 104.8, 104.8, 209.5, 1792, 64, 12.5),
        _gpu("A100-40GB", 40.0, 19.5, 156, 312, 1555, 300, 25),
        _gpu("A100-80GB", 80.0, 19.5, 156, 312, 2039, 300, 25),
        _gpu("A100-PCIe-80GB", 80.0, 19.5, 156, 312, 1935, 32, 25),
        _gpu("H100-PCIe", 79.65, 51, 378, 756, 2000, 64, 50),
        _gpu("H100-SXM", 79.65, 67, 494, 989, 3350, 450, 50),
        _gpu("H200", 140.4, 67, 494, 989, 4800, 450, 50),
        _gpu("B200", 179.06, 80, 1100, 2250, 8000, 900, 50),
        # One of the two dies of a card: PyTorch sees each as a device.
        _gpu("MI250X", 64.0, 47.9, None, 191.5, 1638, 100, 25),
        _gpu("MI300X", 192.0, 163.4, 653.7, 1307.4, 5300, 448, 50),
    )
}
_ON_CPU: dict[str, Any] = {
    "link": 10.0,
    "node_link": 1.25,
    "node_devices": 1,
    "call_s": 2e-4,
    "decode_call_s": 2e-5,
    "row_s": 1e-5,
}
CPU_REACHED = Reached(
    products=0.6,
    narrow=0.2,
    scores=0.3,
    decode=0.3,
    passes=0.5,
    logits=0.25,
    draws=0.2,
    weights=0.8,
    updates=0.6,
)
CARDS |= {
    # Eight cores of 2.5 GHz with two 256-bit multiply-adds a cycle; two channels of DDR5.
    "CPU": Device("CPU", "cpu", 32.0, 0.64, None, 60, reached=CPU_REACHED, **_ON_CPU),
    # Eight cores with AMX at 2.1 GHz: 1,024 bf16 operations (512 multiply-adds) a cycle and core.
    "CPU-AMX": Device("CPU-AMX", "cpu", 64.0, 1.07, 17.2, 100, reached=CPU_REACHED, **_ON_CPU),
}
ALIASES = {
    "A100": "A100-80GB",
    "H100": "H100-SXM",
    "V100": "V100-32GB",
    "3090": "RTX-3090",
    "4090": "RTX-4090",
    "5090": "RTX-5090",
    # As torch.cuda.get_device_name says it.
    "A100-SXM4-40GB": "A100-40GB",
    "A100-SXM4-80GB": "A100-80GB",
    "A100-80GB-PCIe": "A100-PCIe-80GB",
    "H100-80GB-HBM3": "H100-SXM",
    "V100-SXM2-16GB": "V100-16GB",
    "V100-SXM2-32GB": "V100-32GB",
}


def find_device(name: str) -> Device:
    """The card of that name, in any writing: "h100 sxm", "NVIDIA A10G", "rtx4090".

    Raises InputError for a name that no card has, with the nearest.
    """
    known = {_plain(key): CARDS[card] for key, card in ({k: k for k in CARDS} | ALIASES).items()}
    asked = _plain(name)
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
    names = list(dict.fromkeys(known[key].name for key in near)) or sorted(CARDS)
    said = "did you mean" if near else "known are"
    raise InputError(
        f"no device card is called {name!r}: {said} {', '.join(names)}; this machine is measured with "
        "trimtab plan --calibrate"
    )


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").split("-")
    return "".join(w for w in words if w not in ("nvidia", "geforce", "tesla", "amd", "instinct", "gpu"))


def host() -> dict[str, Any]:
    """What a calibration of this machine depends on, beside the number of threads."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    return {
        "format": FORMAT,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "torch": torch,
        "kernels": os.environ.get("TRIMTAB_KERNELS", "on"),
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
    }


def usual_threads() -> int:
    """How many threads PyTorch takes when nobody asks: OMP_NUM_THREADS, else the cores we may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def calibration_file() -> Path:
    """Where measurements of this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "calibration.json"


def calibrated(threads: int = 0) -> Device | None:
    """This machine as ``studies/calibrate.py`` measured it with so many threads (0: as many as usual).

    None where it was not measured, or with another processor, number of cores or PyTorch than it has now.
    """
    kept = _kept()
    found = (
        kept.get("devices", {}).get(str(threads or usual_threads())) if kept.get("host") == host() else None
    )
    try:
        return None if found is None else Device.from_dict(found)
    except (TypeError, KeyError):
        return None


def keep(device: Device, threads: int) -> Path:
    """Write a measurement of this machine beside those with other numbers of threads. Raises InputError."""
    file, about = calibration_file(), host()
    kept = _kept()
    devices = kept.get("devices", {}) if kept.get("host") == about else {}
    devices[str(threads)] = device.to_dict()
    text = json.dumps({"host": about, "devices": devices}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise InputError(f"{file}: the calibration cannot be kept: {error.strerror}") from None
    return file


def _kept() -> dict[str, Any]:
    try:
        values = json.loads(calibration_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("devices"), dict) else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
