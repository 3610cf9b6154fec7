"""How the samples of a group are drawn where not all are drawn alike, and options that move over a run.

A mix gives every sample of a group a slot, and the slot a strategy: sample i is drawn by the same strategy in
every group and every step. A strategy changes the distribution that a sample is drawn from and nothing else:
a row's noise is what it would be without a mix, so it draws the very tokens of an unmixed run. Each response
keeps its temperature, and its probabilities are taken at that temperature by everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.rollouts.sampling import SamplingConfig

Shape = Literal["linear", "cosine"]
DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""What a strategy sets."""


class StrategyConfig(Section):
    """One way of drawing, in a mix."""

    share: float = Field(1.0, gt=0, description="part of a group's samples, relative to the other shares")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    top_k: int = Field(0, ge=0, description="keep the k most likely tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the smallest set of tokens with this probability")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="drop tokens below this share of the likeliest's probability"
    )

    @property
    def drawing(self) -> dict[str, Any]:
        """The options of sampling that it stands for."""
        return {name: getattr(self, name) for name in DRAWING}


class MixedSampling(SamplingConfig):
    """How responses are drawn, where the samples of a group may be drawn in several ways."""

    mix: list[StrategyConfig] = Field(
        [],
        description="ways of drawing, each with its share of a group's samples (share, temperature, top_k, "
        "top_p, min_p); empty draws all alike",
    )

    @model_validator(mode="after")
    def _mix(self) -> MixedSampling:
        if not self.mix:
            return self
        for name in DRAWING:
            if getattr(self, name) != SamplingConfig.model_fields[name].default:
                raise ValueError(f"{name} has no effect with mix: give it in the entries of mix")
        if len({tuple(way.drawing.items()) for way in self.mix}) < len(self.mix):
            raise ValueError("two entries of mix draw alike: leave one out and add its share to the other")
        return self

    @property
    def filtered(self) -> bool:
        """Top-k, top-p or min-p take tokens out, of some samples."""
        return super().filtered or any(way.top_k or way.top_p < 1 or way.min_p for way in self.mix)


class RunSampling(MixedSampling):
    """How a run draws what it learns from; options may move from its first step to its last."""

    temperature_end: float | None = Field(
        None, gt=0, description="temperature at the last step; unset stays where it is"
    )
    temperature_shape: Shape = Field("linear", description="how the temperature goes there")
    top_p_end: float | None = Field(
        None, gt=0, le=1, description="top_p at the last step; unset stays where it is"
    )
    top_p_shape: Shape = Field("linear", description="how top_p goes there")

    @model_validator(mode="before")
    @classmethod
    def _beams(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("strategy") == "beam" or "beams" in values):
            raise ValueError(
                "what a beam search finds has no probability of having been sampled, so no ratio can be "
                "formed: let trimtab label collect rankings on beam groups, and learn from those"
            )
        return values

    @model_validator(mode="after")
    def _moves(self) -> RunSampling:
        for name in ("temperature", "top_p"):
            if getattr(self, f"{name}_end") is None:
                if getattr(self, f"{name}_shape") != "linear":
                    raise ValueError(f"{name}_shape has no effect without {name}_end")
            elif self.mix:
                raise ValueError(f"{name}_end has no effect with mix")
            elif self.temperature == 0:
                raise ValueError(f"{name}_end has no effect at temperature 0")
        return self

    @property
    def filtered(self) -> bool:
        """Top-k, top-p or min-p take tokens out, of some samples at some time."""
        return super().filtered or (self.top_p_end is not None and self.top_p_end < 1)


class Ramp(Protocol):
    """The value of an option between its start and its end, at some point of the run."""

    def __call__(self, start: float, end: float | None, *, shape: Shape) -> float: ...


def at(config: SamplingConfig, ramp: Ramp) -> SamplingConfig:
    """What is drawn with at the point of the run that ``ramp`` stands for: nothing moves any more.

    A temperature that moves is given to every sample by a mix of one, so that each response keeps its own.
    """
    if not isinstance(config, RunSampling) or (config.temperature_end is None and config.top_p_end is None):
        return config
    still = MixedSampling(**{name: getattr(config, name) for name in MixedSampling.model_fields})
    still.top_p = ramp(config.top_p, config.top_p_end, shape=config.top_p_shape)
    if config.temperature_end is None:
        return still
    drawing = {name: getattr(still, name) for name in DRAWING}
    drawing["temperature"] = ramp(config.temperature, config.temperature_end, shape=config.temperature_shape)
    plain = {name: SamplingConfig.model_fields[name].default for name in DRAWING}
    return still.model_copy(update={**plain, "mix": [StrategyConfig(**drawing)]})


def steady(config: SamplingConfig) -> SamplingConfig:
    """What an evaluation in the course of a run draws with, the same at each of them.

    Options that move are at their end; of a mix it is the strategy with the largest share, the first of such.
    """
    config = at(config, lambda start, end, *, shape: start if end is None else end)
    if not isinstance(config, MixedSampling) or not config.mix:
        return config
    return _drawn_by(config, max(config.mix, key=lambda way: way.share))


@dataclass
class Mix:
    """A mix for groups of n samples."""

    ways: list[SamplingConfig]
    """How each strategy draws."""
    slots: np.ndarray
    """int64 ``[n]``: which of them sample i is drawn by."""

    @property
    def temperatures(self) -> list[float]:
        """What each sample of a group is drawn at."""
        return [self.ways[slot].temperature for slot in self.slots.tolist()]


def mix_of(config: SamplingConfig, n: int) -> Mix | None:
    """How each of n samples is drawn; None where all are drawn alike.

    Raises InputError where a strategy's share of n samples is none.
    """
    if not isinstance(config, MixedSampling) or not config.mix:
        return None
    given = slots([way.share for way in config.mix], n)
    idle = sorted(set(range(len(config.mix))) - set(given))
    if idle:
        raise InputError(
            f"sampling.mix: of {n} samples a prompt none falls to entry {idle[0] + 1} with its share of "
            f"{config.mix[idle[0]].share:g}: draw more samples, raise the share or leave the entry out"
        )
    return Mix([_drawn_by(config, way) for way in config.mix], np.array(given, dtype=np.int64))


def slots(shares: Sequence[float], n: int) -> list[int]:
    """Which strategy each of n samples is drawn by: the counts are as near to the shares as can be.

    By the divisor method of Webster and Sainte-Laguë: strategy s takes its k-th sample (from 0) at the time
    (k + ½)/share, the earlier strategy where two come at once. Sample i's strategy does not depend on n.

    >>> slots([0.5, 0.25, 0.25], 8)
    [0, 1, 2, 0, 0, 1, 2, 0]
    """
    taken = [0] * len(shares)
    exact = [Fraction(share) for share in shares]
    out = []
    for _ in range(n):
        s = min(range(len(shares)), key=lambda s: (Fraction(2 * taken[s] + 1) / exact[s], s))
        taken[s] += 1
        out.append(s)
    return out


def _drawn_by(config: MixedSampling, way: StrategyConfig) -> SamplingConfig:
    plain = {name: getattr(config, name) for name in SamplingConfig.model_fields}
    return SamplingConfig(**{**plain, **way.drawing})
