"""A run's configuration and the head of its data → the job that is planned.

What only the loaded model would show is taken from what is known before: the layout from its architecture,
"auto" as dtype from what the processor says of itself, responses that are still to be sampled as long as
they may be. The facts and the warnings say so.
"""

from __future__ import annotations

from typing import Any, Literal

from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig
from trimtab.models.adapters import AdapterConfig, continued
from trimtab.models.load import device_of, resolve
from trimtab.planning.activations import check_budget
from trimtab.planning.job import Job, Layout, Model
from trimtab.planning.methods import Card, find_card
from trimtab.planning.models import find_model, find_reward_model
from trimtab.planning.quick import compute_of
from trimtab.planning.roles import adapter_of, count_models
from trimtab.studies.job_batch import (
    batch_for,
    kinds_of,
    rollout_of,
    sampling_for,
    steps_of,
    tree_tokens,
    unbounded,
    until_spent,
)
from trimtab.studies.job_data import Sample, sample_data
from trimtab.studies.job_evaluation import answers_beside
from trimtab.studies.job_roles import (
    Policy,
    adapter_base,
    file_bytes,
    method_roles,
    names,
    needs_baseline,
    reward_tokens,
    wants_reference,
    watch_roles,
)

SAMPLE_ROWS = 256


def job_of(
    method: str, config: MethodConfig, *, sample_rows: int = SAMPLE_ROWS
) -> tuple[Job, dict[str, Any], list[str]]:
    """The job, what the plan takes to be so, and lines of warning.

    Reads the first ``sample_rows`` rows of each source and no weight. Raises InputError for what the run
    would refuse: an unknown model, a group over the budget, data that cannot be read.
    """
    card = find_card(method)
    settings: Any = config
    options: Any = getattr(config, card.section)
    model = _model(card, config)
    chosen, fresh = _adapter(config)
    adapter = adapter_of(model, chosen.kind, chosen.rank, targets=chosen.targets, quantise=chosen.quantise)
    engine: Literal["cpu", "gpu"] = "gpu" if device_of(config.model).startswith("cuda") else "cpu"
    compute, layout = compute_of(config.model.dtype, engine), _layout(config, model)
    sample, warnings = sample_data(card, config, int(model.context), sample_rows)
    warnings += [] if sample is None else sample.warnings
    kinds = kinds_of(card, sample)
    policy = Policy(model, adapter, compute, fresh)
    own = method_roles(card, config, policy, kinds, warnings)
    watched = watch_roles(config, policy, warnings)
    steps = steps_of(card, config, sample)
    anchored, baseline = wants_reference(card, options, kinds), needs_baseline(card, options, kinds)
    again = baseline or _old_pass(card, config, options)
    batch = batch_for(card, config, model, layout, sample, steps, passes=anchored or again)
    if unbounded(steps):
        steps = until_spent(config, tree_tokens(card, config, model, layout, sample))
    rollout = rollout_of(card, config, sample) if card.rollouts else config.train.batch_groups
    passes = max(1, steps // options.iterations) if card.name == "spin" else 1
    job = Job(
        method=card.name,
        model=model,
        batch=batch,
        steps=steps,
        sampling=sampling_for(card, config, model, layout, sample) if card.rollouts else None,
        steps_per_rollout=getattr(config, "steps_per_rollout", passes),
        roles=(*own, *watched),
        adapter=adapter,
        compute=compute,
        layout=layout,
        engine=engine,
        scalar=card.scalar,
        entropy=card.entropy,
        reference_pass=anchored,
        reference_once=anchored and not card.rollouts,
        reference_each=baseline,
        old_pass=again,
        old_pass_whole=card.critic or _kl_in_reward(options),
        value_head=card.critic and settings.critic.share == "trunk",
        recompute="some" if config.train.activation_mb else "none",
        micro_batch_tokens=config.train.micro_batch_tokens,
        file_bytes=file_bytes(config.model.path, model),
        reward_tokens=reward_tokens(getattr(config, "reward", None)),
        steps_of_rollout=rollout / config.train.batch_groups,
        activation_mb=config.train.activation_mb,
        data_passes=1 if sample is None else steps * config.train.batch_groups / sample.rows,
    )
    check_budget(job, "train.activation_mb", "train.micro_batch_tokens")
    warnings += _guesses(card, config, options)
    warnings += answers_beside(card, config, job, sample)
    facts = _facts(job, config, sample)
    facts |= {"models_in_memory": count_models(own), "models": ["policy", *names(own)]}
    if watched:
        facts["models_to_watch"] = names(watched)
    return job, facts, warnings


def _model(card: Card, config: MethodConfig) -> Model:
    find = find_reward_model if card.scalar else find_model
    try:
        return find(config.model.path, revision=config.model.revision)
    except InputError as error:
        raise InputError(f"model.path: {error}") from None


def _adapter(config: MethodConfig) -> tuple[AdapterConfig, bool]:
    """The options in effect, and whether the adapter is a new one."""
    if config.adapter.kind == "none" or adapter_base(config.model.path) is None:
        return config.adapter, True
    saved, _ = resolve(config.model)
    if saved is None:
        return config.adapter, True
    return continued(config.adapter, saved.peft, saved.path), False


def _layout(config: MethodConfig, model: Model) -> Layout:
    asked = config.model.layout
    if asked == "auto":
        # The eager kernel of transformers takes a mask alone.
        return "packed" if model.packed and config.model.attention != "eager" else "tree"
    if asked == "packed" and not model.packed:
        raise InputError(f'model.layout = "packed": {model.name} cannot be packed; use "auto"')
    return asked


def _old_pass(card: Card, config: Any, options: Any) -> bool:
    """The policy's log-probabilities are computed when a rollout is taken up (PPO: of all of it)."""
    if card.critic:
        return True
    if not card.divisible:
        return False
    return bool(config.rollout > config.train.batch_groups or _kl_in_reward(options))


def _kl_in_reward(options: Any) -> bool:
    """RLOO's advantages need every group's."""
    return getattr(options, "kl_in", "") == "reward" and bool(options.beta)


def _guesses(card: Card, config: Any, options: Any) -> list[str]:
    """What the plan cannot know of what is sampled."""
    if not card.rollouts:
        return []
    longest = config.sampling.max_new_tokens
    lines = [
        f"responses are taken to be {longest} tokens long, sampling.max_new_tokens: shorter ones need less"
    ]
    if getattr(options, "dynamic_sampling", False):
        lines.append(
            "dynamic sampling: no group is taken to be replaced; each that is costs its sampling again"
        )
    if getattr(options, "challengers", 0):
        lines.append("the reference's own answers are sampled at the policy's speed")
    return lines


def _facts(job: Job, config: MethodConfig, sample: Sample | None) -> dict[str, Any]:
    batch = job.batch
    why = "as configured" if config.model.dtype != "auto" else "by the device: a run measures it"
    facts: dict[str, Any] = {
        "model": job.model.name,
        "parameters": job.model.parameters,
        "learns": job.adapter.kind if job.adapter.kind != "none" else "all weights",
        "layout": job.layout,
        "compute": f"{job.compute} ({why})",
        "groups": batch.groups,
        "responses_per_group": batch.responses / batch.groups,
        "prompt_tokens": None,
        "response_tokens": batch.targets / batch.responses,
        "longest_sequence": batch.longest,
        "micro_batch_tokens": config.train.micro_batch_tokens,
        "steps": job.steps,
        "lengths": "the limits of the configuration" if sample is None else "the data",
    }
    if sample is not None:
        prompts = [len(group.prompt_tokens or ()) for group in sample.groups]
        facts |= {
            "prompt_tokens": sum(prompts) / len(prompts),
            "rows": sample.rows,
            "rows_read": len(sample.groups),
            **({"left_out": sample.data.lines} if sample.data.lines else {}),
        }
        facts["lengths"] = "all rows" if sample.whole else f"the first {len(sample.groups)} groups"
    elif job.sampling is not None:
        facts["prompt_tokens"] = job.sampling.prompt
    return facts
