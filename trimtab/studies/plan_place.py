"""Where a run that is planned would be: a device by its card, or this machine and what it has free."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import InputError
from trimtab.planning.devices import CARDS, Device, calibrated, find_device
from trimtab.planning.look import GIB, MIB, read_size

if TYPE_CHECKING:
    from trimtab.methods.shared.setup import MethodConfig

IMPORTS = 400 * MIB
"""Resident memory of a run once PyTorch and transformers are imported (387 MiB here): a plan counts from
there, and it is gone from what this machine has."""
SHARED = (
    "each process is taken to be on a machine like this one; several on one machine share its memory: "
    "--memory says what each has"
)
DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver says which GPUs are in this machine."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Options of ``trimtab plan`` itself."""

    device: str | None = None
    devices: int | None = None
    memory: str | None = None
    price: float | None = None
    calibrate: bool = False
    json: str | None = None
    svg: str | None = None
    write: str | None = None
    advise: bool = True

    def __post_init__(self) -> None:
        if self.devices is not None and self.devices < 1:
            raise InputError(f"trimtab plan: --devices must be 1 or more (got {self.devices})")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise InputError(f"trimtab plan: --price must be a number, 0 or more (got {self.price})")
        if self.calibrate and self.device is not None:
            raise InputError("trimtab plan: --calibrate measures this machine: leave --device out")
        if self.svg is not None and Path(self.svg).suffix.lower() != ".svg":
            raise InputError(f"trimtab plan: --svg {self.svg}: only SVG is drawn: name the file *.svg")
        if self.write is not None and not self.advise:
            raise InputError("trimtab plan: --write writes what is advised: leave --no-advice out")
        files = [file for file in (self.json, self.svg, self.write) if file is not None]
        if len(set(files)) < len(files):
            raise InputError(f"trimtab plan: two outputs go to {files[-1]}: give each a file of its own")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the run would be."""

    device: Device
    available: float | None
    """Bytes, of one device."""
    price: float | None
    devices: int | None
    """None where nobody asked for a number: one."""
    warnings: tuple[str, ...] = ()


def place_of(settings: PlanSettings) -> Place:
    """The device that was named, or this machine; what it has, or what was said instead."""
    if settings.calibrate:
        measure_here()
    if settings.device is not None:
        device = find_device(settings.device)
        return _placed(settings, device, device.memory_gib * GIB)
    if gpu := _gpu_here():
        return _placed(settings, gpu, gpu.memory_gib * GIB)
    from trimtab.training.memory import available_bytes

    free = available_bytes()
    return _placed(settings, calibrated(), None if free is None else max(0.0, float(free - IMPORTS)))


def place_of_run(settings: PlanSettings, config: MethodConfig) -> Place:
    """Where the run of a configuration would be: on the device that was named, or on this machine's."""
    from trimtab.models.load import device_of
    from trimtab.studies.launch import free_bytes, this_device

    if settings.device is not None:
        return place_of(settings)
    if settings.calibrate:
        measure_here()
    name = device_of(config.model)
    try:
        free, device = free_bytes(name), this_device(name, config.train.threads)
    except (RuntimeError, AssertionError) as error:  # a GPU that is not here, or PyTorch without CUDA
        raise InputError(
            f"model.device is {name!r}, which this machine does not have: say which it is, --device A100"
        ) from error
    if device is None and name.startswith("cuda"):
        raise InputError("no device card is called as this machine's GPU is: give the nearest with --device")
    return _placed(settings, device, free)


def _placed(settings: PlanSettings, device: Device | None, available: float | None) -> Place:
    """With ``device`` None a common CPU's speeds are taken."""
    warnings: tuple[str, ...] = ()
    if device is None:
        warnings = ("this machine was not measured: times are a common CPU's; --calibrate measures it",)
        device = dataclasses.replace(CARDS["CPU"], name="a common CPU")
    if settings.memory is not None:
        available = read_size(settings.memory, "--memory")
    elif (settings.devices or 1) > 1 and settings.device is None and device.engine == "cpu":
        warnings = (*warnings, SHARED)
    return Place(device, available, settings.price, settings.devices, warnings)


def _gpu_here() -> Device | None:
    """This machine's, where its driver says what it is called and there is a card of it."""
    try:
        files = sorted(DRIVER.glob("*/information"))
        lines = files[0].read_text(encoding="utf-8").splitlines() if files else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")), "")
        return find_device(model) if model else None
    except (OSError, InputError):
        return None


def measure_here() -> Device:
    from trimtab.studies.calibrate import calibrate

    print("measuring this machine …", file=sys.stderr)
    return calibrate()
