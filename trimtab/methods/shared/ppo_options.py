"""The options of PPO: the rollout, the KL, the reward on its way to an advantage, the clips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from trimtab.methods.shared.critic import CriticConfig
from trimtab.methods.shared.online import OnlineConfig, RolloutOptions
from trimtab.objectives.kl import Estimator, Level
from trimtab.objectives.reduce import Reduction
from trimtab.training.kl_control import Kind
from trimtab.training.schedule import Shape

UNUSED: dict[Kind, tuple[str, ...]] = {
    "fixed": ("kl_target", "kl_horizon", "kl_slope"),
    "adaptive": ("kl_slope",),
    "linear": ("kl_horizon",),
}
"""What a kind of KL control takes no notice of."""


class PPOConfig(RolloutOptions):
    """Proximal Policy Optimization."""

    samples: int = Field(1, ge=1, description="responses sampled for each prompt")
    epochs_per_rollout: int = Field(4, ge=1, description="passes over each rollout")
    beta: float = Field(0.05, ge=0, description="weight of the KL; where it starts")
    beta_end: float | None = Field(None, ge=0, description="beta at the last step; unset stays where it is")
    beta_shape: Shape = Field("linear", description="how beta goes there")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="KL taken from the token rewards, or a term of the policy's loss"
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        "auto",
        description="estimator of the KL, which decides the optimum; auto: k1 in the reward, k2 in the loss",
    )
    kl_level: Level = Field("token", description="KL in the loss: of each token, or of the whole response")
    kl_control: Kind = Field("fixed", description="how beta follows the measured KL after each rollout")
    kl_target: float = Field(0.1, gt=0, description="KL that the controller aims at, in nats per token")
    kl_horizon: int = Field(
        10_000, ge=1, description="responses over which adaptive control moves beta by about a fifth at most"
    )
    kl_slope: float = Field(1.0, gt=0, description="linear control: rise of beta per excess over the target")
    clip_end: float | None = Field(
        None, ge=0, description="both clips of the ratio at the last step, as a share of what they start at"
    )
    clip_shape: Shape = Field("linear", description="how the clips go there")
    dual_clip: float = Field(
        0.0, ge=0, description="ratio above which a negative advantage has no gradient (3 is usual); 0 none"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later token rewards")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's λ: 1 has no bias, lower has less variance")
    value_clip: float = Field(0.2, ge=0, description="how far a value may move in one rollout; 0 no clip")
    reward_normalise: Literal["none", "rollout", "running"] = Field(
        "none", description="rewards to mean 0 and deviation 1: within a rollout, or by all rewards so far"
    )
    reward_clip: float = Field(0.0, ge=0, description="rewards are held within ± this; 0 does not clip")
    missing_end_penalty: float = Field(
        1.0, ge=0, description="taken from the reward of a response cut off before its end token"
    )
    whiten_rewards: bool = Field(
        False, description="token rewards to variance 1 over the rollout's tokens, their mean kept"
    )
    whiten: Literal["full", "scale", "none"] = Field(
        "full",
        description="advantages to mean 0 and variance 1 over the rollout's tokens; scale keeps the mean",
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="weight of the policy's entropy, which keeps it varied"
    )
    reduction: Reduction = Field("token_mean", description="how token losses become one number")

    @model_validator(mode="after")
    def _consistent(self) -> PPOConfig:
        for problem in (*self._of_control(), *self._of_kl(), *self._of_clips()):
            raise ValueError(problem)
        return self

    @property
    def estimator(self) -> Estimator:
        """The one that is meant by "auto"; both have the gradient of KL(π‖π_ref)."""
        if self.kl_estimator == "auto":
            return "k1" if self.kl_in == "reward" else "k2"
        return self.kl_estimator

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _of_control(self) -> Iterable[str]:
        control = f'kl_control = "{self.kl_control}"'
        for name in UNUSED[self.kl_control]:
            if self._changed(name):
                yield f"{name} has no effect with {control}"
        if self.kl_control != "fixed" and not self.beta:
            yield f"{control} needs beta above 0, where it starts"
        if self.kl_control != "fixed" and self.beta_end is not None:
            yield f"beta_end has no effect with {control}: the control sets beta by the measured KL"
        if self.beta_end is None and self._changed("beta_shape"):
            yield "beta_shape has no effect without beta_end"

    def _of_kl(self) -> Iterable[str]:
        if not self.beta and not self.beta_end:
            for name in ("kl_in", "kl_estimator", "kl_level"):
                if self._changed(name):
                    yield f"{name} has no effect with beta = 0"
        elif self.kl_in == "reward" and self._changed("kl_level"):
            yield (
                'kl_level has no effect with kl_in = "reward": with gamma = lam = 1 the KL of its tokens '
                "adds up to that of the response"
            )
        elif self.kl_in == "loss" and self.estimator == "k1":
            yield 'kl_estimator = "k1" has no gradient in the loss in expectation: use "k2" or "k3"'

    def _of_clips(self) -> Iterable[str]:
        if self.clip_end is None and self._changed("clip_shape"):
            yield "clip_shape has no effect without clip_end"
        widest = self.clip_high * max(1.0, 1.0 if self.clip_end is None else self.clip_end)
        if self.dual_clip and self.dual_clip <= 1 + widest:
            yield f"dual_clip = {self.dual_clip:g} must be above 1 + clip_high, or it would undo that clip"


class Config(OnlineConfig):
    """Options of ``trimtab ppo``."""

    section: ClassVar[str] = "ppo"
    critic: CriticConfig = Field(default_factory=CriticConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)

    @model_validator(mode="after")
    def _temperature(self) -> Config:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature = 0 explores nothing: the policy gradient would be 0")
        if self.critic.share == "trunk" and self.critic.lr and not self.train.lr:
            raise ValueError('critic.lr with critic.share = "trunk" follows train.lr, which is 0')
        return self
