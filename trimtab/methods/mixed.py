"""Several kinds of feedback in one run, each group learned by the objective that its feedback is for.

    pairs            any loss on pairs (objectives/preference.py)      rankings and ratings give pairs
    labels           KTO (Ethayarajh et al., 2024)                     thumbs, allow/deny
    demonstrations   −log π(y|x), mean over tokens                     responses without any feedback

    L = Σ_k weight_k · (mean of objective k over its own items of the batch)

An objective without an item in a batch adds nothing to it. ``weight`` of a source says how many of a batch
are of which kind; ``…_weight`` says what they count together, so that neither changes the other.

Feedback: sources of at least two of the kinds. KTO's baseline is estimated on the labelled responses of the
batch. The reference is one for all; it stays in memory where that baseline needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator

from trimtab.batch import TreeBatch
from trimtab.config import Section
from trimtab.data.convert import by_feedback
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.anchor import keep_reference
from trimtab.methods.shared.labels import LabelOptions, baseline, learn_labels, mismatched, weigh
from trimtab.methods.shared.offline import accumulate_items, learn_from
from trimtab.methods.shared.pairs import PairOptions, compare
from trimtab.methods.shared.setup import (
    MethodConfig,
    OnEval,
    Result,
    how_to_load,
    prepare_data,
    settle_adapter,
    settle_layout,
    total_steps,
)
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import load_model
from trimtab.models.roles import bases, reference_of
from trimtab.objectives.reduce import response_sums
from trimtab.objectives.supervised import sft_loss
from trimtab.training.optimiser import Optimiser
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run

KINDS = ("pairs", "labels", "demonstrations")


class MixedConfig(Section):
    """Several objectives in one run."""

    pairs_weight: float = Field(1.0, gt=0, description="weight of the loss on pairs")
    labels_weight: float = Field(1.0, gt=0, description="weight of KTO's loss on labelled responses")
    demonstrations_weight: float = Field(1.0, gt=0, description="weight of the likelihood of demonstrations")
    reference: str = Field("", description="folder or hub name of the reference; empty takes model.path")
    pairs: PairOptions = Field(default_factory=PairOptions)
    labels: LabelOptions = Field(default_factory=LabelOptions)

    @model_validator(mode="after")
    def _one_reference(self) -> MixedConfig:
        if self.pairs.reference:
            raise ValueError("the reference is one for all objectives: name it in reference, not in pairs")
        return self


class Config(MethodConfig):
    """Options of ``trimtab mixed``."""

    mixed: MixedConfig = Field(default_factory=MixedConfig)

    @model_validator(mode="after")
    def _batches(self) -> Config:
        if self.train.batch_groups < 2:
            raise ValueError("train.batch_groups of 1 holds one kind of feedback at a time: raise it")
        return self


def train(config: Config, *, on_eval: OnEval | None = None) -> Result:
    """Run several objectives together. Raises InputError for anything that the user can mend."""
    options, sizes = config.mixed, config.train
    with Run("mixed", config, config.run, sizes) as run:
        lm = load_model(config.model, **how_to_load(config, run), seed=sizes.seed)
        settle_adapter(config, run, lm)
        run.say(settle_layout(lm, config.model.layout))
        data = prepare_data(config.data, lm, by_feedback, "a pair, a label or a demonstration", sizes.seed)
        found = sort(data.groups)
        check(options, found)
        marked = found["labels"]
        weighed = weigh(options.labels, marked, data.stream.shares()) if marked else None
        for line in (*data.lines, describe(options, found), str(weighed) if weighed else None):
            run.say(line)
        state = run.new_state(lm)
        reference: LanguageModel | None = None
        if anchored := needs_reference(options, found):
            kept, apart = sort(data.groups), sort(data.heldout)
            reference = keep_reference(
                *(config, "mixed.reference", options.reference, lm),
                dataclasses.replace(data, groups=[group for kind in anchored for group in kept[kind]]),
                *(run, state),
                heldout=[apart[kind] for kind in anchored],
            )
        if not (weighed and options.labels.kl == "batch"):
            reference = None
        elif not options.reference:
            reference = reference_of(lm)
            reference.cast(lm.dtype)
        held, line = bases({"policy": lm} | ({"reference": reference} if reference else {}))
        run.say(line)
        state = run.resume(state)
        total = total_steps(sizes, len(data.groups))
        longest = min(config.data.max_tokens or lm.context, lm.context)
        times = forward_times(lm, sizes)

        def gradient(groups: list[Group], tokens: int) -> tuple[float, dict[str, float]]:
            at = (sizes, state.step, total, state.tokens)
            parts = sort(groups)
            done: dict[str, tuple[float, dict[str, float]]] = {}
            if pairs := parts["pairs"]:
                beta, weight = options.pairs.beta_at(*at), options.pairs_weight
                done["pairs"] = compare(
                    lm, state.optimiser, pairs, options.pairs, tokens, beta=beta, weight=weight
                )
            if labels := parts["labels"]:
                assert weighed is not None
                z_ref = torch.zeros((), dtype=torch.float64)
                if reference is not None:
                    spare = [group for group in groups if group is not labels[0]]
                    moved = mismatched(labels, longest, spare=spare)
                    z_ref = baseline(lm, reference, moved, times * tokens)
                beta, weight = options.labels.beta_at(*at), options.labels_weight
                loss, seen = learn_labels(
                    lm, state.optimiser, labels, weighed, tokens, beta=beta, z_ref=z_ref, weight=weight
                )
                done["labels"] = loss, seen | ({} if options.labels.beta_end is None else {"beta": beta})
            if shown := parts["demonstrations"]:
                weight = options.demonstrations_weight
                done["demonstrations"] = imitate(lm, state.optimiser, shown, tokens, weight=weight)
            return together(options, done, parts)

        learn_from(data, lm, run, state, total, gradient, on_eval)
        facts = {
            "model": config.model.path,
            "reference": options.reference or config.model.path if anchored else "none",
            "models_in_memory": max(held, 2 if options.reference else 1),
            "feedback_items": len(data.groups),
        }
        run.finish(lm, state, {**facts, "data": data.fingerprints})
        return Result(run.out, lm, state)


def sort(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups by the objective that they go to, in their order."""
    parts: dict[str, list[Group]] = {kind: [] for kind in KINDS}
    for group in groups:
        single = "demonstrations" if group.responses[0].label is None else "labels"
        parts["pairs" if len(group.responses) == 2 else single].append(group)
    return parts


def check(options: MixedConfig, found: dict[str, list[Group]]) -> None:
    """Raises InputError where options and data do not go together."""
    alone = {"pairs": "dpo", "labels": "kto", "demonstrations": "sft"}
    there = [kind for kind in KINDS if found[kind]]
    if len(there) == 1:
        raise InputError(f"data.sources: all rows give {there[0]}; for these alone use {alone[there[0]]}")
    plain = MixedConfig()
    for kind in set(KINDS) - set(there):
        for name in (f"{kind}_weight", kind):
            if getattr(options, name, None) != getattr(plain, name, None):
                raise InputError(f"mixed.{name} has no effect: no source gives {kind}")


def describe(options: MixedConfig, found: dict[str, list[Group]]) -> str:
    """How many items each objective has, and its weight."""
    weights = {kind: getattr(options, f"{kind}_weight") for kind in KINDS}
    parts = [f"{len(found[kind]):,} {kind} (weight {weights[kind]:g})" for kind in KINDS if found[kind]]
    return f"objectives: {', '.join(parts)}"


def needs_reference(options: MixedConfig, found: dict[str, list[Group]]) -> list[str]:
    """The kinds whose loss compares with the reference. Raises InputError where one is named for nothing."""
    kinds = ["labels"] if found["labels"] else []
    if found["pairs"] and not options.pairs.reference_free:
        kinds.append("pairs")
    if options.reference and not kinds:
        raise InputError("mixed.reference has no effect: no objective of this run has a reference")
    return kinds


def imitate(
    lm: LanguageModel, optimiser: Optimiser, groups: list[Group], max_tokens: int, *, weight: float
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of the demonstrations' likelihood, a mean over all their tokens."""
    counts = [len(r.tokens or ()) if r.mask is None else sum(r.mask) for g in groups for r in g.responses]
    mean_tokens = sum(counts) / len(counts)

    def losses(
        part: list[Group], batch: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        policy_logps_NT, _ = lm.token_logprobs(batch)
        # Divided by the batch's mean length, so that the mean over items is the mean over tokens.
        loss_P = response_sums(sft_loss(policy_logps_NT), batch.mask_NT) / mean_tokens
        return weight * loss_P, batch.weights_N, {"response_tokens": batch.mask_NT.sum(-1).float()}

    return accumulate_items(lm, optimiser, groups, losses, max_tokens)


def together(
    options: MixedConfig, done: dict[str, tuple[float, dict[str, float]]], parts: dict[str, list[Group]]
) -> tuple[float, dict[str, float]]:
    """The whole loss, and each objective's own loss and metrics under its name."""
    shown: dict[str, float] = {}
    for kind, (loss, seen) in done.items():
        own = loss / getattr(options, f"{kind}_weight")
        shown |= {f"{kind}/loss": own, **{f"{kind}/{key}": value for key, value in seen.items()}}
    count = sum(len(parts[kind]) for kind in done)
    lengths = sum(len(parts[kind]) * seen["response_tokens"] for kind, (_, seen) in done.items())
    return sum(loss for loss, _ in done.values()), shown | {"response_tokens": lengths / count}
