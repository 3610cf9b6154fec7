"""What a run's memory came to, beside what was planned for it."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.training.memory import peak_rss_mb, reset_peak, resident_mb


class MeasuredMemory:
    """The most that this process holds from here on, above what it held before; on a GPU its allocator's.

    Made before the run loads anything, so what lies above is the run's. Before is now, or before planning,
    where the plan says so: what planning read (a tokenizer, libraries) serves the run.
    """

    def __init__(self, device: str, plan: dict[str, Any] | None) -> None:
        self._plan = plan
        reset_peak()
        self.baseline_mb = (plan or {}).get("held_before_mb") or resident_mb()
        self._gpu = _gpu(device)
        self._gpu_baseline = 0.0
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
            self._gpu_baseline = torch.cuda.memory_allocated(self._gpu) / 2**20

    def figures(self) -> dict[str, float]:
        """For the lineage, in MiB: the baseline, and of a GPU what its allocator gave out and reserved."""
        found = {"baseline_rss_mb": self.baseline_mb}
        if self._gpu is not None:
            found |= {
                "baseline_gpu_mb": self._gpu_baseline,
                "peak_gpu_mb": torch.cuda.max_memory_allocated(self._gpu) / 2**20,
                "peak_gpu_reserved_mb": torch.cuda.max_memory_reserved(self._gpu) / 2**20,
            }
        return found

    def beside_plan(self) -> dict[str, Any]:
        """The plan with the peak as measured (MiB) and the plan's error as a share of that; or nothing.

        On a GPU without the plan's framework part: what CUDA itself takes is not the allocator's.
        """
        if self._plan is None or not self.baseline_mb:  # nobody tells what this process holds
            return {}
        if self._gpu is None:
            measured, planned = max(0.0, peak_rss_mb() - self.baseline_mb), self._plan["peak_mb"]
        else:
            measured = torch.cuda.max_memory_allocated(self._gpu) / 2**20 - self._gpu_baseline
            planned = self._plan["peak_mb"] - self._plan["framework_mb"]
        error = planned / measured - 1 if measured > 0 else None
        return {"plan": {**self._plan, "measured_peak_mb": measured, "error": error}}


def _gpu(device: str) -> torch.device | None:
    """The GPU, if it is one and there; what is wrong with its name is said where the model is loaded."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    try:
        found = torch.device(device)
    except RuntimeError:
        return None
    return found if (found.index or 0) < torch.cuda.device_count() else None
