"""Which models a run of a method keeps in memory, read off its configuration as the method itself does."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.errors import InputError
from trimtab.methods.shared.setup import MethodConfig
from trimtab.models.load import ModelConfig
from trimtab.planning.job import BYTES, Adapter, Compute, Model, Role
from trimtab.planning.methods import Card
from trimtab.planning.models import find_model, find_reward_model, reward_model_of
from trimtab.planning.quick import PUBLISHED_BYTES
from trimtab.planning.roles import critic_of, reference_of, snapshot_of
from trimtab.planning.roles import reward_model_of as reward_role
from trimtab.rewards.base import RewardConfig
from trimtab.rewards.judge_config import JudgeConfig

LEARNED = ("reward_model", "process_reward_model")
"""Reward terms that are models."""
JUDGE = "of a judge"
"""Marks, among the args of such terms, those of a judge's model."""
BATCH_TOKENS = 8192
"""Of such a term, where its args do not say."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the roles are read against."""

    model: Model
    adapter: Adapter
    compute: Compute
    fresh: bool = True
    """The adapter is a new one: without it the base is what the run starts from."""


def method_roles(
    card: Card, config: MethodConfig, policy: Policy, kinds: Collection[str], warnings: list[str]
) -> list[Role]:
    """The method's own. ``kinds``: of feedback in the data, for a mixed run."""
    options: Any = getattr(config, card.section)
    roles: list[Role] = []
    named = getattr(options, "reference", "")
    if card.name in ("kto", "mixed"):
        roles += _of_labels(card, options, policy, kinds)
    elif named:
        roles.append(_named(named, policy, "before"))
    elif card.rollouts and card.reference == "kept" and wants_reference(card, options):
        refreshed = getattr(options, "refresh_reference_every", 0) > 0
        averaged = getattr(options, "reference_average", 1.0) < 1
        roles.append(
            reference_of(
                policy.model,
                policy.adapter,
                own=refreshed or not policy.fresh,
                averaged=policy.compute if averaged else None,
            )
        )
    if card.critic:
        roles += _critic(config, policy)
    reward = getattr(config, "reward", None)
    if reward is not None:
        asked_by_thread = bool(getattr(options, "overlap", False))
        roles += reward_roles(reward, config, policy, warnings, whole=asked_by_thread)
    if getattr(options, "overlap", False):
        roles.append(snapshot_of(policy.model, policy.adapter))
    return roles


def wants_reference(card: Card, options: Any, kinds: Collection[str] = ()) -> bool:
    """The method computes with a reference's log-probabilities."""
    if card.name == "mixed":
        return bool(anchored_kinds(options, kinds))
    if card.name in ("ppo", "online-dpo"):
        return True
    if card.reference == "none" or getattr(options, "reference_free", False):
        return False
    if hasattr(options, "log_kl"):
        return bool(options.beta or options.log_kl)
    return True


def anchored_kinds(options: Any, kinds: Collection[str]) -> list[str]:
    """Of a mixed run's feedback, what is compared with the reference."""
    found = ["labels"] if "labels" in kinds else []
    return found + (["pairs"] if "pairs" in kinds and not options.pairs.reference_free else [])


def needs_baseline(card: Card, options: Any, kinds: Collection[str]) -> bool:
    """KTO's baseline is estimated on every batch."""
    if card.name == "kto":
        return bool(options.kl == "batch")
    return card.name == "mixed" and "labels" in kinds and bool(options.labels.kl == "batch")


def _of_labels(card: Card, options: Any, policy: Policy, kinds: Collection[str]) -> list[Role]:
    if needs_baseline(card, options, kinds):
        if options.reference:
            return [_named(options.reference, policy, "always")]
        return [reference_of(policy.model, policy.adapter, own=not policy.fresh)]
    compared = card.name == "kto" or anchored_kinds(options, kinds)
    return [_named(options.reference, policy, "before")] if options.reference and compared else []


def _named(path: str, policy: Policy, when: Any) -> Role:
    try:
        found = reference_of(policy.model, policy.adapter, named=find_model(path), when=when)
    except InputError as error:
        raise InputError(f"reference: {error}") from None
    return replace(found, file_bytes=file_bytes(path, found.model))


def _critic(config: Any, policy: Policy) -> list[Role]:
    critic = config.critic
    if critic.share == "trunk":
        return []
    if not critic.path:
        # From the policy's own file.
        return [critic_of(reward_model_of(policy.model), policy.adapter)]
    try:
        model = find_reward_model(critic.path)
    except InputError as error:
        raise InputError(f"critic.path: {error}") from None
    apart = not shares_base(critic.path, config.model, policy)
    made = critic_of(model, policy.adapter, own_base=apart)
    return [replace(made, file_bytes=file_bytes(critic.path, model) if made.file else None)]


def reward_roles(
    reward: RewardConfig, config: MethodConfig, policy: Policy, warnings: list[str], *, whole: bool = True
) -> list[Role]:
    """The models among the terms of a reward, a judge's too.

    Not ``whole``: a run cuts those with a base of their own as it does the policy, if they are decoders that
    read conversations, but for a judge's.
    """
    roles = []
    for args in learned_terms(reward):
        path, asked = str(args.get("path", "")), args.get("dtype")
        shared = shares_base(path, config.model, policy) and asked in (None, policy.compute)
        bytes_ = BYTES["bfloat16" if asked == "bfloat16" else "float32"]
        known = len(warnings)
        model = _scores_at(path, policy.model, warnings)
        # What the planner does not know is taken to be an encoder.
        kept = whole or JUDGE in args or args.get("input") in ("pair", "response") or len(warnings) > known
        made = reward_role(model, bytes=bytes_, shared=shared, whole=kept)
        roles.append(replace(made, file_bytes=file_bytes(path, made.model) if made.file else None))
    return roles


def learned_terms(reward: RewardConfig) -> list[dict[str, Any]]:
    """The args of each term that is a model."""
    found = []
    for term in reward.terms:
        if term.name in LEARNED:
            found.append(term.args)
        elif term.name == "judge" and term.args.get("kind") == "reward_model":
            # A judge is not given the policy's base, so that its model is never an adapter on it.
            found.append({"dtype": "float32", **dict(term.args.get("args", {})), JUDGE: True})
    return found


def reward_tokens(reward: RewardConfig | None) -> int:
    """Tokens that the learned rewards read at once, the most of them."""
    terms = [] if reward is None else learned_terms(reward)
    return max((int(args.get("batch_tokens", BATCH_TOKENS)) for args in terms), default=BATCH_TOKENS)


def _scores_at(path: str, like: Model, warnings: list[str]) -> Model:
    """The reward model; one that the planner does not know is taken by the size of its files."""
    try:
        return find_reward_model(path)
    except InputError as error:
        size = weight_bytes(Path(path))
        if not size:
            raise InputError(f"reward: {error}") from None
        warnings.append(f"reward: {error}; it is planned by the size of its files, 4 bytes a weight")
        count = size // 4
        return replace(like, name=path, parameters=count, active=count)


def watch_roles(config: MethodConfig, policy: Policy, warnings: list[str]) -> list[Role]:
    """What is loaded to measure a run on the way, at its first evaluation (``evaluation/watching``).

    A reward is loaded again, whatever the run's own has in memory.
    """
    return [replace(role, watched=True) for role in _to_watch(config, policy, warnings)]


def _to_watch(config: MethodConfig, policy: Policy, warnings: list[str]) -> list[Role]:
    watch = config.watch
    own: RewardConfig | None = getattr(config, "reward", None)
    roles: list[Role] = []
    reward = watch.reward or own
    if watch.answers:
        roles += _watched_reference(config, policy)
        if reward is not None:
            roles += reward_roles(reward, config, policy, warnings)
        if isinstance(watch.judge, JudgeConfig) and watch.judge.kind == "reward_model":
            args = {"dtype": "float32", **watch.judge.args}
            try:
                judged = RewardConfig.model_validate({"terms": [{"name": "reward_model", "args": args}]})
            except ValidationError:
                return roles
            roles += reward_roles(judged, config, policy, warnings)
    elif own is not None and (config.data.heldout or config.data.heldout_fraction):
        roles += reward_roles(own, config, policy, warnings)
    return roles


def _watched_reference(config: MethodConfig, policy: Policy) -> list[Role]:
    watch = config.watch
    decided = watch.reward is not None or watch.judge is not None or hasattr(config, "reward")
    if watch.reference:
        if not (watch.kl or decided):
            return []
        return [_named(watch.reference, policy, "always" if watch.kl else "before")]
    return [reference_of(policy.model, policy.adapter, own=not policy.fresh)] if watch.kl else []


def shares_base(path: str, policy: ModelConfig, of: Policy) -> bool:
    """What is at ``path`` is an adapter on the very base that the policy's adapter stands on."""
    base = adapter_base(path)
    if of.adapter.kind == "none" or base is None:
        return False
    ours = adapter_base(policy.path) or policy.path
    if Path(base).is_dir() or Path(ours).is_dir():
        return Path(base).resolve() == Path(ours).resolve()
    return base == ours


def adapter_base(path: str) -> str | None:
    """The base of an adapter's folder; None for anything else."""
    try:
        text = (Path(path) / "adapter_config.json").read_text(encoding="utf-8")
        base = json.loads(text).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def weight_bytes(folder: Path) -> int:
    """Of a saved model's weights; 0 where there is no folder."""
    return sum(file.stat().st_size for file in files) if (files := _weights(folder)) else 0


def file_bytes(path: str, model: Model) -> float:
    """Of a weight in a model's file; of a hub's as nearly all are published."""
    size = weight_bytes(Path(adapter_base(path) or path))
    return round(2 * size / model.parameters) / 2 if size else PUBLISHED_BYTES


def _weights(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    except OSError:
        return []


def names(roles: Iterable[Role]) -> list[str]:
    """For what is shown."""
    return [role.name + (" (on the policy's base)" if role.shares_base else "") for role in roles]
