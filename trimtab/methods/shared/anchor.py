"""The reference of methods on given feedback: its log-probabilities are computed once, before the first step.

The feedback is fixed, and so are they. Afterwards no reference is needed, and one model is in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from trimtab.batch import TreeBatch
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.methods.shared.setup import Data, MethodConfig, attach, settle_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.load import ModelConfig, load_model, resolve
from trimtab.training.recompute import forward_times
from trimtab.training.run import Run
from trimtab.training.state import State
from trimtab.training.update import within_memory


def keep_reference(
    config: MethodConfig,
    option: str,
    path: str,
    lm: LanguageModel,
    data: Data,
    run: Run,
    state: State,
    *,
    heldout: Sequence[list[Group]] | None = None,
) -> LanguageModel:
    """Fill ``ref_logps`` of the training groups and the held-out ones; the model that they came from.

    ``option`` is named in messages; its ``path`` is empty for the model that the run starts from. Call it
    before a checkpoint is taken up: until then the policy still is that model, and no second copy is needed.
    ``heldout``: in the parts that are evaluated apart; left out, all together.
    """
    reference = load_reference(config, lm, path, option) if path else lm
    # Held-out groups apart and cut as the evaluation cuts them: other neighbours in a row move the last bits,
    # and an untrained policy's held-out rewards would be noise and not 0. And cut as in the first sitting,
    # whatever memory has run out since.
    halved = state.micro_batch_tokens
    if run.environment.get("micro_batch_option") == run.train.micro_batch_tokens:
        state.micro_batch_tokens = run.environment.get("reference_tokens", halved)
    parts = [data.heldout] if heldout is None else heldout
    every = data.stream.worded(data.groups)
    for groups, times in ((every, forward_times(lm, run.train)), *((part, 1) for part in parts)):
        work = functools.partial(attach_reference, reference, groups)
        within_memory(run, state, work, times=times)
    state.environment["reference_tokens"] = state.micro_batch_tokens
    state.micro_batch_tokens = min(halved, state.micro_batch_tokens)
    return reference


def load_reference(config: MethodConfig, lm: LanguageModel, path: str, option: str) -> LanguageModel:
    """The reference that the configuration names, computing in the policy's dtype with its tokenizer."""
    named = ModelConfig(**{**config.model.model_dump(), "path": path})
    _, base = resolve(config.model)
    named.tokenizer = base.tokenizer or base.path
    reference = load_model(named, dtype=lm.dtype, frozen=True, holder=lm.holder)
    if reference.vocab_size != lm.vocab_size:
        raise InputError(
            f"{option}: {path} has {reference.vocab_size} tokens, the policy {lm.vocab_size}; the two must "
            "share a vocabulary"
        )
    settle_layout(reference, config.model.layout)
    return reference


def attach_reference(reference: LanguageModel, groups: list[Group], max_tokens: int) -> None:
    """Fill ``ref_logps`` of every response, in one fixed order, so that a resumed run repeats it exactly."""

    def logps(batch: TreeBatch) -> torch.Tensor:
        return reference.token_logprobs(batch)[0]

    attach(reference, groups, "ref_logps", logps, max_tokens=max_tokens, divisible=False)
