"""What every method does before its loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.collate import group_tokens, in_each_layout
from trimtab.data.convert import convert
from trimtab.data.render import TokenReport, tokenise
from trimtab.data.sources import SourceConfig, Stream, split_by_prompt
from trimtab.data.wording import check_formats, check_system_prompts, tokenised
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.held import held_by
from trimtab.methods.shared.watch import WatchConfig
from trimtab.models.adapters import AdapterConfig
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, choose_scalar_layout, probe_groups
from trimtab.models.load import ModelConfig, architecture, device_of
from trimtab.models.scalar_model import ScalarModel
from trimtab.models.tree_model import TreeModel
from trimtab.parallel.options import ParallelConfig
from trimtab.parallel.same import same_data
from trimtab.parallel.world import world
from trimtab.registry.digests import fingerprint
from trimtab.spread.deal import parts, put_together
from trimtab.spread.weights import choose_weights
from trimtab.training.config import RunConfig, TrainConfig
from trimtab.training.processes import PROCESSES
from trimtab.training.run import UNBOUNDED, Run
from trimtab.training.state import State

OnEval = Callable[[Any, list[Group], int], dict[str, float]]
"""Called with the policy (by ``reward``: the reward model), the held-out groups and the number of steps done.

Its result is logged.
"""


class DataConfig(Section):
    """What is learned from."""

    sources: list[SourceConfig] = Field([], description="where rows come from; each has its own weight")
    heldout: list[SourceConfig] = Field([], description="rows that are only evaluated on")
    heldout_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts of sources that is kept for evaluation"
    )
    max_prompt_tokens: int = Field(0, ge=0, description="longest prompt; 0 takes the model's context")
    max_tokens: int = Field(0, ge=0, description="longest prompt and response; 0 takes the model's context")
    on_long: Literal["error", "skip", "truncate"] = Field(
        "error", description="rows over these lengths: stop, count and skip, or cut"
    )
    formats: list[str] = Field(
        [],
        description="texts around {prompt}, of which each training prompt is put in another in every pass; "
        "what is evaluated on is put in the first",
    )
    system_prompts: list[str] = Field(
        [], description='the same for system prompts of conversations; "" is none'
    )

    @model_validator(mode="after")
    def _wordings(self) -> DataConfig:
        check_formats(self.formats)
        check_system_prompts(self.system_prompts)
        return self


class MethodConfig(Section):
    """Sections that every method has."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    @model_validator(mode="after")
    def _watched(self) -> MethodConfig:
        watch = self.watch
        if watch.patience and not self.train.eval_every:
            raise ValueError(
                "watch.patience counts evaluations, and there are none on the way: set train.eval_every"
            )
        decided = watch.reward is not None or watch.judge is not None or hasattr(self, "reward")
        if watch.reference and not watch.kl and not decided:
            raise ValueError(
                "watch.reference has no effect with watch.kl = false and neither watch.reward nor "
                "watch.judge: remove it, or give what decides a win"
            )
        held_out = bool(self.data.heldout or self.data.heldout_fraction)
        if watch.heldout and not held_out:
            raise ValueError("watch.heldout has no effect without data.heldout or data.heldout_fraction")
        if watch.measures and {"reward_model", "process_reward"} & type(self).model_fields.keys():
            what = "prompts" if watch.prompts else "heldout" if watch.heldout else "safety"
            raise ValueError(
                f"watch.{what} has no effect on a reward model, which answers nothing; remove it"
            )
        if watch.prompts and held_out and not watch.heldout and hasattr(self, "reward"):
            raise ValueError(
                "what is held out is only measured by answering it, and watch.prompts takes its place: set "
                "watch.heldout = true to answer both, or remove one of them"
            )
        return self


@dataclass
class Data:
    """Tokenised groups: the endless training order, and what is only evaluated on."""

    stream: Stream
    groups: list[Group]
    """Every training group once; the stream hands out copies of these."""
    heldout: list[Group] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    fingerprints: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Result:
    """What a finished run hands back."""

    out: Path
    lm: TreeModel
    state: State

    @property
    def stopped(self) -> str:
        """Why the run ended before its last step (``watch``); empty for one that did not."""
        return self.state.ended

    @property
    def model_step(self) -> int:
        """The step whose weights ``lm`` and ``model/`` have: the last, or the best that was restored."""
        return self.state.step if self.state.weights_of is None else self.state.weights_of


def how_to_load(config: MethodConfig, run: Run) -> dict[str, Any]:
    """Keywords for loading the model that learns: adapter, what a frozen base computes in, what spreads it.

    Collective. Raises InputError for options of ``parallel`` that cannot be met.
    """
    adapted = config.adapter.kind != "none"
    if not adapted and world().alone:
        return {}
    try:
        device = torch.device(device_of(config.model))
    except RuntimeError as error:
        raise InputError(f"model.device: {config.model.device!r} is no device: {error}") from None
    dtype = run.compute_dtype(config.model.dtype, architecture(config.model), device)
    found: dict[str, Any] = {"adapter": config.adapter, "dtype": dtype} if adapted else {}
    if not world().alone:
        began = run.environment if run.environment.get(PROCESSES) == world().size else {}
        found["holder"], line = choose_weights(
            config.parallel,
            held_by(config, dtype),
            dtype=dtype,
            device=device,
            quantised=config.adapter.quantise != "none",
            before=str(began.get("weights", "")),
        )
        run.say(line)
        holder = found["holder"]
        run.chosen["weights"] = "replicate" if holder is None else "shard"
        if holder is not None:
            holder.chosen = run.chosen["gather"] = dict(began.get("gather", {}))
    return found


def settle_adapter(config: MethodConfig, run: Run, lm: TreeModel) -> None:
    """Say what loading had to say. The run's options are from here on those of an adapter that goes on."""
    for line in lm.notes:
        run.say(line)
    if lm.adapter is not None:
        config.adapter = lm.adapter.config


def prepare_data(
    config: DataConfig,
    lm: TreeModel,
    to: Callable[[Iterable[Group]], list[Group]],
    what: str,
    seed: int,
    *,
    completion_only: bool = True,
    response_room: int = 0,
    after_split: Callable[[Iterable[Group]], list[Group]] = list,
    fingerprints: bool = True,
) -> Data:
    """Read, convert, split and tokenise every source. ``response_room``: tokens to leave for sampling.

    ``after_split`` makes groups of several rows, which must not come from both sides of the split. Without
    ``fingerprints`` no file is read as a whole for its digest.
    """
    if not config.sources:
        raise InputError('data.sources is empty; add [[data.sources]] with path = "…"')
    lines: list[str] = []
    longest = min(config.max_tokens or lm.context, lm.context)
    prompt_room = min(config.max_prompt_tokens or lm.context, longest - max(response_room, 1))
    if prompt_room < 1:
        raise InputError(
            f"{response_room} new tokens leave no room for a prompt in {longest} tokens; "
            "lower sampling.max_new_tokens or raise data.max_tokens"
        )

    def load(source: SourceConfig) -> list[Group]:
        groups, report = source.read()
        if report.skipped:
            lines.append(f"{source.path}: {report}")
        return convert(groups, to, what)

    def fit(groups: list[Group]) -> tuple[list[Group], TokenReport]:
        return tokenise(
            groups,
            lm.tokenizer,
            max_prompt_tokens=prompt_room,
            max_tokens=longest,
            on_long=config.on_long,
            completion_only=completion_only,
        )

    def ready(groups: list[Group], path: str, shown: int | None = 1) -> list[Group]:
        """Tokenised in the first ``shown`` formats and system prompts; None: in all of them."""
        words = (config.formats[:shown], config.system_prompts[:shown])
        kept, all_words, report = tokenised(groups, *words, fit)
        wordings.update(all_words)
        if report:
            lines.append(f"{path}: {report}")
        if not kept:
            raise InputError(f"{path}: no row is left after data.on_long = {config.on_long!r}")
        return kept

    train, heldout = [], []
    wordings: dict[str, list[Group]] = {}
    for source in config.sources:
        groups = load(source)
        if config.heldout_fraction:
            groups, kept_out = split_by_prompt(groups, config.heldout_fraction, seed)
            kept_out = after_split(kept_out)
            heldout += ready(kept_out, source.path) if kept_out else []
        train.append(ready(convert(groups, after_split, what), source.path, shown=None))
    for source in config.heldout:
        heldout += ready(convert(load(source), after_split, what), source.path)
    data = Data(
        stream=Stream(train, [source.weight for source in config.sources], seed, wordings),
        groups=[group for source in train for group in source],
        heldout=heldout,
        lines=lines,
        fingerprints={
            s.path: fingerprint(s.path) for s in [*config.sources, *config.heldout] if fingerprints
        },
    )
    if fingerprints:
        same_data(data.fingerprints, [*data.groups, *data.heldout])
    return data


def settle_layout(lm: LanguageModel, requested: str) -> str | None:
    """Choose the layout by the check on the loaded model; returns a line to show, or None.

    Raises InputError when a layout was asked for by name and fails.
    """
    return choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size), lm.device), requested)


def settle_scalar_layout(lm: ScalarModel, requested: str) -> str | None:
    """As :func:`settle_layout`, for a critic or a reward model."""
    return choose_scalar_layout(lm, in_each_layout(probe_groups(lm.vocab_size), lm.device), requested)


@torch.no_grad()
def attach(
    lm: TreeModel,
    groups: list[Group],
    field: str,
    values: Callable[[TreeBatch], torch.Tensor],
    *,
    max_tokens: int,
    divisible: bool,
) -> None:
    """Store what ``values`` gives for each response's tokens, ``[N, T]``, in that field of the responses."""
    done = []
    for part in parts(lm, groups, max_tokens, divisible=divisible):
        rows = iter(part.batch.ragged(values(part.batch)))
        for response in (r for group in part.groups for r in group.responses):
            setattr(response, field, next(rows))
        done.append(part)
    put_together(done, groups, field)


def tokens_of(groups: Iterable[Group]) -> int:
    """Tokens that a pass over these groups computes in the tree layout: a prompt counts once."""
    return sum(group_tokens(group) for group in groups)


def total_steps(train: TrainConfig, rows: int, *, groups_per_step: int | None = None) -> int:
    """Optimiser steps of the whole run."""
    if train.steps:
        return train.steps
    if train.token_budget:
        return UNBOUNDED
    return max(1, math.ceil(train.epochs * rows / (groups_per_step or train.batch_groups)))


@dataclass
class HeldOut:
    """What the loop calls to evaluate."""

    on_eval: OnEval
    lm: TreeModel
    data: Data
    state: State

    def __call__(self) -> dict[str, float]:
        """The metrics of the model as it stands."""
        return self.on_eval(self.lm, self.data.heldout, self.state.step)

    def notes(self) -> list[str]:
        """Lines that the evaluation has to say, each once."""
        lines: list[str] = getattr(self.on_eval, "notes", [])
        said, lines[:] = list(lines), []
        return said


def held_out(on_eval: OnEval | None, lm: TreeModel, data: Data, state: State) -> HeldOut | None:
    """What the loop calls to evaluate; None where nobody asked."""
    return None if on_eval is None else HeldOut(on_eval, lm, data, state)
