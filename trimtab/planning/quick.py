"""A plan from options alone: ``trimtab plan METHOD --model M``, without a file, without PyTorch.

The options are :class:`QuickConfig`; :func:`quick_job` makes the job, :func:`quick_facts` says what was taken
to be so.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from trimtab.errors import InputError
from trimtab.planning.activations import check_budget
from trimtab.planning.batch import batch_of, check_fits, smallest_budget
from trimtab.planning.job import Compute, Job, Layout, Model, Role, Sampling
from trimtab.planning.methods import DEFAULTS, MOST_ROWS, Card, find_card
from trimtab.planning.processes import Processes, spread, told
from trimtab.planning.quick_config import QuickConfig, idle_in
from trimtab.planning.roles import (
    adapter_of,
    count_models,
    critic_of,
    reference_of,
    reward_model_of,
    snapshot_of,
)
from trimtab.planning.rollout import engine_of

__all__ = ["QuickConfig", "compute_of", "idle_in", "native_bf16", "quick_facts", "quick_job", "scores_of"]

PUBLISHED_BYTES = 2
"""Of a weight in the file that a model is read from: nearly all are published in 16 bits."""
BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Of processors on which bf16 is the faster, as a run finds by measuring."""


def quick_job(config: QuickConfig, *, available: float | None = None) -> Job:
    """The job of these options. Raises InputError for an unknown model and for lengths that cannot be.

    ``available``: bytes that one device has free, by which several of them hold the weights.
    """
    card = find_card(config.method)
    model = _find(config.model, "model", scores=card.scalar)
    if config.prompt + config.response > model.context > 0:
        raise InputError(
            f"prompt {config.prompt} and response {config.response} are {config.prompt + config.response} "
            f"tokens, over the context of {model.name}, {model.context}: shorten one"
        )
    layout: Layout = ("packed" if model.packed else "tree") if config.layout == "auto" else config.layout
    if layout == "packed" and not model.packed:
        raise InputError(f'layout = "packed": {model.name} cannot be packed; use "auto"')
    compute = compute_of(config.dtype, config.engine)
    adapter = adapter_of(model, config.adapter, config.rank, targets=config.targets, quantise=config.quantise)
    trained, budget = _sizes(config, card, layout)
    check_fits(
        *(config.prompt, config.response),
        **trained | {"micro_batch_tokens": budget, "layout": layout},
    )
    rollout = config.rollout_groups or config.groups
    if card.name == "spin" and not config.rollout_groups:
        rollout = config.rows or config.groups
    passes = config.epochs_per_rollout or card.epochs_per_rollout
    steps = config.steps or max(1, math.ceil(config.epochs * config.rows * passes / config.groups))
    anchored = card.reference != "none" and not config.without_reference
    once = anchored and not card.rollouts
    old_pass = _old_pass(card, anchored, rollout > config.groups)
    read_at_once = rollout if card.rollouts else max(config.groups, config.rows)
    recompute: Literal["none", "some", "all"] = "some" if config.activation_mb else config.recompute
    job = Job(
        method=card.name,
        model=model,
        batch=batch_of(
            *(config.prompt, config.response),
            groups=config.groups,
            micro_batch_tokens=budget,
            layout=layout,
            layers=model.layers,
            recompute=recompute,
            forward_groups=read_at_once if anchored or old_pass else None,
            **trained,
        ),
        steps=steps,
        sampling=_sampling(config, card, rollout, model) if card.rollouts else None,
        steps_per_rollout=max(1, math.ceil(rollout * passes / config.groups)) if card.rollouts else 1,
        roles=_roles(config, card, model, adapter),
        adapter=adapter,
        compute=compute,
        layout=layout,
        engine=config.engine,
        scalar=card.scalar,
        entropy=card.entropy,
        reference_pass=anchored,
        reference_once=once,
        reference_each=once and card.reference == "kept",
        old_pass=old_pass,
        old_pass_whole=card.critic or card.name == "rloo",
        value_head=config.critic == "trunk",
        recompute=recompute,
        micro_batch_tokens=budget,
        file_bytes=PUBLISHED_BYTES,
        steps_of_rollout=max(1, rollout / config.groups),
        activation_mb=config.activation_mb,
        data_passes=steps * config.groups / (config.rows * passes) if config.rows else 1,
    )
    check_budget(job)
    many = Processes(config.devices, config.weights, config.shard_over, config.gather)
    return spread(job, many, available=available)[0]


def quick_facts(config: QuickConfig, job: Job) -> dict[str, Any]:
    """What the plan took to be so."""
    return {
        "model": job.model.name,
        "parameters": job.model.parameters,
        "learns": job.adapter.kind if job.adapter.kind != "none" else "all weights",
        "prompt_tokens": config.prompt,
        "response_tokens": config.response,
        "groups": config.groups,
        "responses_per_group": job.batch.responses / config.groups,
        "micro_batch_tokens": config.micro_batch_tokens
        or _sizes(config, find_card(config.method), job.layout)[1],
        "layout": job.layout,
        "compute": job.compute,
        "models_in_memory": count_models(job.roles),
        "steps": job.steps,
        **told(job),
    }


def compute_of(dtype: str, engine: str) -> Compute:
    """What "auto" comes to, from what the processor says of itself; a run on a CPU measures it."""
    if dtype != "auto":
        return cast(Compute, dtype)
    return "bfloat16" if engine == "gpu" or native_bf16() else "float32"


@cache
def native_bf16() -> bool:
    """This machine's processor computes in bf16."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return any(flag in flags for flag in BF16_FLAGS)


def _find(name: str, option: str, *, scores: bool = False) -> Model:
    from trimtab.planning.models import find_model, find_reward_model

    try:
        return find_reward_model(name) if scores else find_model(name)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def _sizes(config: QuickConfig, card: Card, layout: Layout) -> tuple[dict[str, Any], int]:
    """What a group of a step is, and the tokens computed at once."""
    responses = config.responses or card.responses
    # Of the samples of a prompt the best and the worst are learned from.
    trained: dict[str, Any] = {
        "responses": 2 if card.name == "online-dpo" else responses,
        "divisible": card.divisible,
    }
    # By default as many as one whole group needs: fewer would be refused, or spread it over several trees.
    least = smallest_budget(config.prompt, config.response, layout=layout, **trained)
    return trained, config.micro_batch_tokens or max(DEFAULTS["micro_batch_tokens"], least)


def _sampling(config: QuickConfig, card: Card, rollout: int, model: Model) -> Sampling:
    return Sampling(
        prompts=rollout,
        samples=1 if card.name == "spin" else config.responses or card.responses,
        prompt=config.prompt,
        response=config.response,
        longest_response=config.response,
        longest_prompt=config.prompt,
        cache_mb=config.cache_mb,
        max_rows=config.max_rows or MOST_ROWS,
        engine=engine_of(model),
    )


def _old_pass(card: Card, anchored: bool, several: bool) -> bool:
    """KTO's baseline reads the policy once more; PPO a whole rollout, its kin what is learned from later."""
    if card.name == "rloo" and anchored:
        return True  # its KL is in the reward
    relative = card.divisible and not card.critic
    return card.critic or card.name in ("kto", "mixed") or (relative and several)


def scores_of(model: Model) -> Model:
    """The trunk with a score in the place of its vocabulary."""
    from trimtab.planning.models import reward_model_of as with_scores

    return with_scores(model)


def _roles(config: QuickConfig, card: Card, model: Model, adapter: Any) -> tuple[Role, ...]:
    named = _find(config.reference, "reference") if config.reference else None
    roles = []
    if named is not None and named.vocabulary != model.vocabulary:
        raise InputError(
            f"reference: {named.name} has {named.vocabulary} tokens, {model.name} {model.vocabulary}; the "
            "two must share a vocabulary"
        )
    if card.reference == "kept" and not config.without_reference:
        roles.append(reference_of(model, adapter, named=named))
    elif named is not None:
        roles.append(reference_of(model, adapter, named=named, when="before"))
    if card.critic and config.critic == "own":
        roles.append(critic_of(scores_of(model), adapter))
    if config.reward_model:
        weight = 4 if config.reward_dtype == "float32" else 2
        rewarding = _find(config.reward_model, "reward_model", scores=True)
        roles.append(reward_model_of(rewarding, bytes=weight, whole=config.overlap))
    if config.overlap:
        roles.append(snapshot_of(model, adapter))
    return tuple(roles)
