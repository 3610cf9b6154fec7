"""The options of the group-relative family: its methods (GRPO, RLOO, DAPO, …) differ in defaults alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from trimtab.methods.shared.online import OnlineConfig, RolloutOptions
from trimtab.objectives.advantages import Baseline, Scale
from trimtab.objectives.kl import Estimator, Level
from trimtab.objectives.policy import Ratio, Surrogate
from trimtab.objectives.reduce import Reduction

FIFTH = -1
"""``overlong_buffer``: a fifth of what a response may hold, DAPO's 4,096 of 20,480 tokens."""


class RelativeOptions(RolloutOptions):
    """What every method of the family can be told; a method's own defaults are its paper's."""

    group_size: int = Field(8, ge=2, description="responses sampled for each prompt (G)")
    beta: float = Field(0.04, ge=0, description="weight of the KL; 0 leaves it out")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="KL as a term of the loss, or taken from each response's reward"
    )
    kl_estimator: Estimator = Field("k3", description="estimator of the KL term; decides the optimum")
    kl_level: Level = Field("token", description="KL of each token's distribution, or of the whole response")
    kl_unbiased: bool = Field(
        False,
        description="weigh the KL term by π/π_old, gradient included: then that of KL(π‖π_ref), unbiased",
    )
    surrogate: Surrogate = Field(
        "clip",
        description="PPO's clipped ratio; cispo: a clipped weight on log π; reinforce: the ratio as it is",
    )
    ratio: Ratio = Field(
        "token",
        description="π/π_old of each token; sequence: the tokens' geometric mean; sequence_token: its value "
        "with a gradient a token; response: the product, a response's exact weight",
    )
    dual_clip: float = Field(
        0.0, ge=0, description="ratio above which a negative advantage has no gradient (3 is usual); 0 none"
    )
    supervision: Literal["outcome", "process"] = Field(
        "outcome", description="one reward a response, or one for each of its steps"
    )
    advantage_from: Literal["reward", "winner", "gains", "dcg", "bradley_terry"] = Field(
        "reward",
        description="the reward itself; or what its order in the group gives: 1 for the winner, gains by "
        "place, DCG's discounts, the mean chance of beating the others",
    )
    gains: list[float] = Field([1.0, 0.6, 0.3, 0.0], description="by place; further ones have the last")
    label_temperature: float = Field(
        1.0, gt=0, description="divides the rewards' differences in advantage_from = bradley_terry"
    )
    baseline: Baseline = Field("group_mean", description="what a reward is compared with")
    scale: Scale = Field("std", description="what an advantage is divided by")
    reduction: Reduction = Field("response_mean", description="how token losses become one number")
    constant_length: int = Field(
        0, ge=0, description="divisor of reduction = constant; 0 takes sampling.max_new_tokens"
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="weight of the policy's entropy, which keeps it varied"
    )
    overlong_buffer: int = Field(
        0,
        ge=FIFTH,
        description="last tokens before sampling.max_new_tokens over which the reward falls by up to "
        "overlong_penalty; -1 takes a fifth of it, 0 none",
    )
    overlong_penalty: float = Field(1.0, gt=0, description="what the longest response loses")
    mask_cut_off: bool = Field(
        False, description="responses cut off before their end teach nothing; their rewards still count"
    )
    dynamic_sampling: bool = Field(
        False, description="replace groups whose rewards are all equal by those of further prompts"
    )
    max_refills: int = Field(10, ge=1, description="how often a rollout is filled up; then it stays short")
    refresh_reference_every: int = Field(
        0, ge=0, description="steps after which the policy becomes the reference; 0 never"
    )
    reference_average: float = Field(
        1.0, gt=0, le=1, description="share of the policy in a refreshed reference, the rest is the old one"
    )
    log_kl: bool = Field(True, description="keep a reference for the log even where beta is 0")

    @model_validator(mode="after")
    def _consistent(self) -> RelativeOptions:
        for problem in (*self._of_kl(), *self._of_the_ratio(), *self._of_advantages(), *self._of_the_rest()):
            raise ValueError(problem)
        return self

    def changed(self, name: str) -> bool:
        """The option is not at this method's default."""
        return bool(
            getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        )

    def _of_kl(self) -> Iterable[str]:
        if not self.beta:
            if self.changed("kl_estimator") or self.changed("kl_level"):
                yield "kl_estimator and kl_level have no effect with beta = 0"
            if self.changed("kl_in"):
                yield "kl_in has no effect with beta = 0"
            if self.kl_unbiased:
                yield "kl_unbiased has no effect with beta = 0"
            return
        if self.kl_unbiased and self.kl_in == "reward":
            yield 'kl_unbiased has no effect with kl_in = "reward", whose k1 is unbiased'
        if self.kl_unbiased and self.kl_estimator == "k2":
            yield 'kl_unbiased with kl_estimator = "k2" is no KL\'s: use "k1" or "k3"'
        if self.kl_in == "loss" and self.kl_estimator == "k1" and not self.kl_unbiased:
            yield (
                'kl_estimator = "k1" has no gradient in expectation, so it anchors nothing: use "k2" or '
                '"k3", or kl_unbiased = true'
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            yield (
                f'kl_in = "reward" with kl_estimator = "{self.kl_estimator}" has not the gradient of the KL '
                'and lets answers die out: use "k1"'
            )
        if self.kl_in == "reward" and self.changed("kl_level"):
            yield 'kl_level has no effect with kl_in = "reward": k1 adds up to the response\'s'
        if not self.log_kl:
            yield "log_kl = false has no effect with beta above 0"

    def _of_the_ratio(self) -> Iterable[str]:
        if self.dual_clip and self.surrogate != "clip":
            yield f'dual_clip has no effect with surrogate = "{self.surrogate}"'
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            yield f"dual_clip = {self.dual_clip:g} must be above 1 + clip_high, or it would undo that clip"
        if self.surrogate == "reinforce" and (self.changed("clip_low") or self.changed("clip_high")):
            yield 'clip_low and clip_high have no effect with surrogate = "reinforce"'
        if self.surrogate == "cispo" and self.ratio != "token":
            yield f'surrogate = "cispo" weighs each token: ratio = "{self.ratio}" does not go with it'
        if self.ratio == "sequence" and self.reduction not in ("response_mean", "response_sum"):
            yield (
                f'ratio = "sequence" is one term a response: reduction = "{self.reduction}" would weigh it '
                'by its tokens; use "response_mean" (GSPO), "response_sum", or ratio = "sequence_token"'
            )
        if self.constant_length and self.reduction != "constant":
            yield 'constant_length has no effect without reduction = "constant"'

    def _of_advantages(self) -> Iterable[str]:
        if self.supervision == "process":
            yield from self._of_processes()
        if self.advantage_from != "reward":
            source = f'advantage_from = "{self.advantage_from}"'
            if self.baseline != "group_mean":
                yield (
                    f'baseline = "{self.baseline}" has no use with {source}: its values have the same mean '
                    'in every group, which each depends on; use "group_mean"'
                )
            if self.kl_in == "reward" and self.beta:
                yield f'kl_in = "reward" would only reorder the responses with {source}: use kl_in = "loss"'
            if self.overlong_buffer:
                yield f"overlong_buffer would only reorder the responses with {source}"
        if self.advantage_from != "gains" and self.changed("gains"):
            yield 'gains has no effect without advantage_from = "gains"'
        if self.advantage_from != "bradley_terry" and self.changed("label_temperature"):
            yield 'label_temperature has no effect without advantage_from = "bradley_terry"'
        falling = all(high >= low for high, low in zip(self.gains, self.gains[1:], strict=False))
        if len(self.gains) < 2 or not falling or self.gains[0] == self.gains[-1]:
            yield f"gains = {self.gains} must be two or more that fall from the first place on"
        elif self.advantage_from == "gains" and len(set(self.gains[: self.group_size])) == 1:
            yield f"gains = {self.gains} are the same for all places of a group_size of {self.group_size}"
        if self.baseline == "batch_mean" and self.scale in ("std", "std_unbiased"):
            yield (
                f'scale = "{self.scale}" is of each group, baseline = "batch_mean" of all: groups of equal '
                'rewards would have advantages without bound; use scale = "batch_std" or "none"'
            )
        if self.baseline == "batch_mean" and self.dynamic_sampling:
            yield (
                'dynamic_sampling drops groups of equal rewards, from which baseline = "batch_mean" learns: '
                "leave one out"
            )

    def _of_processes(self) -> Iterable[str]:
        process = 'supervision = "process"'
        if self.baseline != "group_mean":
            yield f'baseline = "{self.baseline}" has no effect with {process}, which takes the group\'s steps'
        if self.scale not in ("none", "std", "std_unbiased"):
            yield f'scale = "{self.scale}" has no effect with {process}: use "std", "std_unbiased" or "none"'
        if self.advantage_from != "reward":
            yield f'advantage_from = "{self.advantage_from}" ranks responses, {process} rewards their steps'
        if self.ratio not in ("token", "sequence_token"):
            yield (
                f'ratio = "{self.ratio}" has one advantage a response, {process} one a token: use "token" or '
                '"sequence_token"'
            )
        if self.kl_in == "reward" and self.beta:
            yield f'kl_in = "reward" belongs to no step with {process}: use kl_in = "loss"'
        if self.overlong_buffer:
            yield f"overlong_buffer belongs to no step with {process}: use mask_cut_off"

    def _of_the_rest(self) -> Iterable[str]:
        if self.changed("overlong_penalty") and not self.overlong_buffer:
            yield "overlong_penalty has no effect without overlong_buffer"
        if self.changed("max_refills") and not self.dynamic_sampling:
            yield "max_refills has no effect without dynamic_sampling"
        if self.refresh_reference_every and not (self.beta or self.log_kl):
            yield "refresh_reference_every has no effect with beta = 0 and log_kl = false"
        if self.reference_average != 1 and not self.refresh_reference_every:
            yield "reference_average has no effect without refresh_reference_every"


class RelativeConfig(OnlineConfig):
    """What the configurations of the family share."""

    @model_validator(mode="after")
    def _relative(self) -> RelativeConfig:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0 gives a group of equal responses: nothing to compare")
        if self.options.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"{self.section}.overlong_buffer = {self.options.overlong_buffer} is more than "
                f"sampling.max_new_tokens = {self.sampling.max_new_tokens}"
            )
        return self

    @property
    def options(self) -> RelativeOptions:
        """The method's own section."""
        return getattr(self, self.section)

    @property
    def overlong_buffer(self) -> int:
        """In tokens."""
        given = self.options.overlong_buffer
        return max(1, self.sampling.max_new_tokens // 5) if given == FIFTH else given

    @property
    def constant_length(self) -> int:
        """The divisor of ``reduction = "constant"``."""
        return self.options.constant_length or self.sampling.max_new_tokens
