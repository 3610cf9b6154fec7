"""The options of a plan without a file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trimtab.config import Section
from trimtab.errors import InputError
from trimtab.planning.methods import DEFAULTS, find_card

WITHOUT = ("dpo", "rank", "grpo", "dr-grpo", "rloo", "dapo", "gspo", "cispo")
"""Methods that have a form without their reference."""


OF_SAMPLING = ("cache_mb", "max_rows", "rollout_groups", "overlap", "epochs_per_rollout")
OF_REWARDS = ("overlap", "epochs_per_rollout", "reward_model", "reward_dtype")


class QuickConfig(Section):
    """What is planned. An option that the method takes no notice of is refused."""

    method: str = Field(description="as on the command line")
    model: str = Field("", description="built-in card, folder or hub name of the model")
    prompt: int = Field(512, ge=1, description="tokens of a prompt")
    response: int = Field(256, ge=1, description="tokens of a response")
    groups: int = Field(DEFAULTS["batch_groups"], ge=1, description="prompts or pairs of an optimiser step")
    responses: int = Field(0, ge=0, description="responses to each prompt; 0 takes the method's")
    micro_batch_tokens: int = Field(
        0, ge=0, description="tokens computed at once; 0 takes 4,096, or what one group needs"
    )
    steps: int = Field(0, ge=0, description="optimiser steps; 0 derives them from rows, or plans one")
    rows: int = Field(0, ge=0, description="groups in the data, for the steps and for what is computed once")
    epochs: float = Field(1.0, gt=0, description="passes over the rows")
    rollout_groups: int = Field(0, ge=0, description="prompts sampled at once; 0 takes groups")
    epochs_per_rollout: int = Field(0, ge=0, description="passes over each rollout; 0 takes the method's")
    overlap: bool = Field(False, description="sample the next rollout from a copy of the weights meanwhile")
    cache_mb: int = Field(DEFAULTS["cache_mb"], ge=1, description="budget of the sampling cache, in MiB")
    max_rows: int = Field(0, ge=0, description="responses sampled at once; 0 takes up to 256")
    reward_model: str = Field("", description="learned reward: a model as in model; empty is a function")
    reward_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what the reward model computes in"
    )
    critic: Literal["own", "trunk"] = Field("own", description="a model of its own, or a head on the policy")
    reference: str = Field("", description="another model as reference; empty takes the policy's start")
    without_reference: bool = Field(False, description="leave the reference out, where the method can")
    adapter: Literal["none", "lora", "rslora", "dora"] = Field("none", description="what learns")
    rank: int = Field(DEFAULTS["rank"], ge=1, description="of the adapter")
    targets: list[str] = Field([], description="linear layers that get one; empty: all but the head")
    quantise: Literal["none", "nf4", "int8"] = Field("none", description="the frozen base in 4 or 8 bits")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="what is computed in; auto: bfloat16 on a GPU, and where the processor has it"
    )
    layout: Literal["auto", "packed", "tree", "plain"] = Field("auto", description="as in model.layout")
    recompute: Literal["none", "all"] = Field("none", description="all: every layer is computed again")
    activation_mb: int = Field(
        0, ge=0, description="MiB of activations; layers beyond it are computed again; 0 keeps all"
    )
    engine: Literal["cpu", "gpu"] = Field("cpu", description="what it is computed on")
    devices: int = Field(1, ge=1, description="how many, a process on each")
    weights: Literal["auto", "replicate", "shard"] = Field(
        "auto",
        description="as parallel.weights: each device has all, or a part (FSDP2); auto as a run decides",
    )
    shard_over: int = Field(0, ge=0, description="devices that share one copy of the weights; 0: all")
    gather: Literal["auto", "whole", "layers"] = Field(
        "auto", description="sharded weights are sampled from whole, or gathered a layer at a time"
    )

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return find_card(value).name
        except InputError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _used(self) -> QuickConfig:
        if not self.model:
            raise ValueError("model is required: a built-in card, a folder or a hub name")
        for name in sorted(self.model_fields_set):
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                continue
            if reason := self._idle(name):
                raise ValueError(f"{name} has no effect {reason}")
        if self.recompute == "all" and self.activation_mb:
            raise ValueError('activation_mb has no effect with recompute = "all"; remove one')
        if self.steps and self.epochs != 1.0:
            raise ValueError("epochs has no effect with steps; remove one")
        if self.adapter == "dora" and self.quantise == "int8":
            raise ValueError('quantise = "int8" does not go with adapter = "dora": use "nf4"')
        if self.devices > self.groups:
            raise ValueError(
                f"devices must be {self.groups} or fewer, the groups of a step: each computes its own groups"
            )
        if self.shard_over == 1:
            raise ValueError('shard_over = 1 is a whole copy on each device: use weights = "replicate"')
        if self.rollout_groups % self.groups:
            raise ValueError(f"rollout_groups must be a multiple of groups ({self.groups})")
        if self.responses == 1 and find_card(self.method).responses > 1:
            raise ValueError(f"responses must be 2 or more: {self.method} compares them")
        return self

    def _idle(self, option: str) -> str:
        """Why an option does nothing here; empty where it does something."""
        if reason := idle_in(self.method, option):
            return reason
        reasons = {
            "rank": "without an adapter" if self.adapter == "none" else "",
            "targets": "without an adapter" if self.adapter == "none" else "",
            "quantise": "without an adapter" if self.adapter == "none" else "",
            "weights": "with one device" if self.devices == 1 else "",
            "shard_over": self._whole(),
            "gather": self._whole(),
            "reward_dtype": "without reward_model" if not self.reward_model else "",
            "epochs": "without rows" if not self.rows else "",
            "reference": "with without_reference = true" if self.without_reference else "",
        }
        return reasons.get(option, "")

    def _whole(self) -> str:
        """Why nothing is sharded, if nothing is."""
        if self.devices == 1:
            return "with one device"
        return 'with weights = "replicate"' if self.weights == "replicate" else ""


def idle_in(method: str, option: str) -> str:
    """Why a method takes no notice of an option of :class:`QuickConfig`, whatever the others are."""
    card = find_card(method)
    judged = "reward model" in card.roles
    if option in OF_SAMPLING and not card.rollouts:
        return f"with {method}, which does not sample"
    if option == "gather" and not card.rollouts:
        return f"with {method}, which does not sample"
    if option in OF_REWARDS and not judged:
        return f"with {method}, which reads no reward"
    if option == "critic" and not card.critic:
        return f"with {method}, which has none"
    if option == "responses" and not (card.responses_option or method in ("reward", "rank")):
        return f"with {method}, whose groups have {card.responses}"
    if option == "reference" and ("reference" not in card.roles or judged):
        return f"with {method}, which " + ("starts from its reference" if judged else "has none")
    if option == "without_reference" and method not in WITHOUT:
        return f"with {method}, which " + ("needs its own" if "reference" in card.roles else "has none")
    return ""
