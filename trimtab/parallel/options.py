"""How a run on many processes holds its weights, and how long its processes wait for each other.

``weights = "auto"`` is decided by ``rule.py``, in a plan as in a run.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trimtab.config import Section


class ParallelConfig(Section):
    """Many processes (torchrun); a run on one process takes no notice."""

    weights: Literal["auto", "replicate", "shard"] = Field(
        "auto",
        description="replicate: every process holds all weights; shard: each holds a part of every weight "
        "(FSDP2); auto decides by the devices and says why",
    )
    shard_over: int = Field(
        0,
        ge=0,
        description="processes that share one copy of the weights, a divisor of their number; 0: all",
    )
    gather: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="how sharded weights are sampled from: whole gathers them once a rollout, layers gathers "
        "each layer for each token; auto takes whole where it fits in memory",
    )
    wait_s: float = Field(300.0, gt=0, description="seconds that a process waits for the others to come")
    lost_after_s: float = Field(
        45.0, gt=0, description="seconds of silence after which a process counts as lost"
    )

    @model_validator(mode="after")
    def _in_use(self) -> ParallelConfig:
        if self.weights == "replicate":
            for name in ("shard_over", "gather"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f'{name} has no effect with weights = "replicate": every process holds all weights'
                    )
        if self.shard_over == 1:
            raise ValueError('shard_over = 1 is a whole copy in every process: use weights = "replicate"')
        return self
