"""Static prompts (``[watch]``): what a policy says to them while it trains, and how far it has gone.

The same prompts with the same noise at each evaluation, so that answers change only as the policy does. All
is a function of the policy, the configuration and its files: a resumed run measures what one that was not
stopped would have measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.data.chat import end_tokens
from trimtab.data.collate import in_each_layout
from trimtab.data.convert import as_prompts, convert
from trimtab.data.readers import check_there
from trimtab.data.render import TokenReport, tokenise
from trimtab.data.wording import tokenised
from trimtab.errors import InputError
from trimtab.evaluation.answering import answered
from trimtab.evaluation.drift.divergence import same_vocabulary
from trimtab.evaluation.judging.dealt import dealt
from trimtab.evaluation.policy import Evaluation
from trimtab.evaluation.watching.static_figures import (
    SAMPLES,
    answer_figures,
    drift_figures,
    judged_figures,
    reward_figures,
    rows_of,
    win_figures,
    write_rows,
)
from trimtab.groups import Group
from trimtab.models.adapters import put_weights
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.load import ModelConfig, load_model, resolve
from trimtab.models.roles import frozen_copy, reference_of
from trimtab.rewards.base import Mixture
from trimtab.rewards.functions import build_mixture
from trimtab.rewards.judges import Judge, build_judge
from trimtab.rollouts.engine import choose_sampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.rollouts.strategies import steady


class StaticPrompts:
    """Measures what ``config.watch`` asks for. What has to be loaded is loaded at the first evaluation."""

    def __init__(self, config: Any, notes: list[str]) -> None:
        """``notes`` gets the lines to say. Raises InputError for files that are not there."""
        self.config, self.watch, self.notes = config, config.watch, notes
        self.sampling = settle_sampling(config)
        self._prompts: list[Group] | None = None
        self._mixture: Mixture | None = None
        self._judge: Judge | None = None
        self._reference: LanguageModel | None = None
        self._theirs: Evaluation | None = None
        """What the reference answered."""
        for number, source in enumerate(self.watch.prompts):
            try:
                check_there(source.path)
            except InputError as error:
                raise InputError(f"watch.prompts.{number}: {error}") from None

    def measure(self, lm: LanguageModel, heldout: list[Group], step: int) -> dict[str, float]:
        """The metrics at this step; the answers go to samples.jsonl."""
        if self._prompts is None:
            self._prompts = self._read(lm, heldout)
            reward = self.watch.reward or getattr(self.config, "reward", None)
            self._mixture = None if reward is None else build_mixture(reward, lm)
            self._judge = None if self.watch.judge is None else dealt(build_judge(self.watch.judge))
            self._reference = reference_for(self.config, lm) if self.watch.kl else None
        ours = self._answered(lm)
        figures = answer_figures(ours.groups)
        budget = self.config.train.micro_batch_tokens
        figures |= drift_figures(lm, self._reference, ours.groups, self.sampling.temperature, budget)
        if self._mixture is not None:
            figures |= reward_figures(ours)
        figures |= self._won(lm, ours, step)
        # Last: what is done again for lack of memory must not have been written.
        write_rows(Path(self.config.run.out) / SAMPLES, rows_of(step, ours.groups))
        return figures

    def _won(self, lm: LanguageModel, ours: Evaluation, step: int) -> dict[str, float]:
        """Against what the reference answered with the same noise."""
        if self._mixture is None and self._judge is None:
            return {}
        if self._theirs is None and step == 0 and not self.watch.reference:
            self._theirs = ours  # the policy is the reference still
        if self._theirs is None:
            reference = self._reference or reference_for(self.config, lm)
            self._theirs = self._answered(reference)
        if self._judge is not None:
            return judged_figures(self._judge, ours, self._theirs, self.config.train.seed)
        return win_figures(ours, self._theirs, self.config.train.seed)

    def _answered(self, lm: LanguageModel) -> Evaluation:
        sampler, _ = choose_sampler(lm, self.sampling, probe_groups(lm.vocab_size))
        ends = end_tokens(lm.tokenizer, getattr(lm.model.generation_config, "eos_token_id", None))
        try:
            groups = answered(
                lm,
                sampler,
                self._prompts or [],
                self.watch.samples,
                self.sampling,
                seed=self.config.train.seed,
                end_tokens=ends,
                mixture=self._mixture,
            )
        except InputError as error:
            raise InputError(f"watch: {error}") from None
        return Evaluation(groups)

    def _read(self, lm: LanguageModel, heldout: list[Group]) -> list[Group]:
        """The static prompts, tokenised: those of the files, then those of the held-out rows."""
        data, room = self.config.data, lm.context - self.sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"watch.sampling.max_new_tokens: {self.sampling.max_new_tokens} new tokens leave no room for "
                f"a prompt in the model's {lm.context}; lower it"
            )

        def fit(groups: list[Group]) -> tuple[list[Group], TokenReport]:
            most = min(data.max_prompt_tokens or room, room)
            return tokenise(groups, lm.tokenizer, max_prompt_tokens=most, on_long=data.on_long)

        found: list[Group] = []
        for number, source in enumerate(self.watch.prompts):
            try:
                read, report = source.read()
                if report.skipped:
                    self.notes.append(f"watch.prompts.{number}: {source.path}: {report}")
                groups = convert(read, as_prompts, "a prompt")
                kept, _, left_out = tokenised(groups, data.formats[:1], data.system_prompts[:1], fit)
            except InputError as error:
                raise InputError(f"watch.prompts.{number}: {error}") from None
            if left_out:
                self.notes.append(f"watch.prompts.{number}: {source.path}: {left_out}")
            found += kept
        if self.watch.heldout:
            found += heldout
        once = {tuple(group.prompt_tokens or ()): group for group in reversed(found)}
        prompts = list(once.values())[::-1][: self.watch.limit]
        if not prompts:
            raise InputError("watch: there is not one static prompt to answer: give watch.prompts rows")
        ids = [group.id for group in prompts]
        if twice := next((one for one in ids if ids.count(one) > 1), None):
            raise InputError(f"watch.prompts: two prompts have the id {twice}: give each source a name")
        self.notes.append(
            f"watch: {len(prompts)} static prompts"
            + (f", the first of {len(once)}" if len(once) > len(prompts) else "")
        )
        return prompts


def settle_sampling(config: Any) -> SamplingConfig:
    """How static prompts are answered: as ``watch.sampling`` says, else as the run draws, else as it is."""
    if config.watch.sampling is not None:
        return config.watch.sampling
    return steady(config.sampling) if hasattr(config, "sampling") else SamplingConfig()


def reference_for(config: Any, lm: LanguageModel) -> LanguageModel:
    """The frozen model that drift and win rate are held against, in the policy's dtype.

    It is made from what is on the disk, not from the policy as it stands: a resumed run gets the same. Over
    an adapter that is the shared base, with a copy of the adapter where that goes on. Raises InputError for
    one of another vocabulary.
    """
    path = config.watch.reference
    if not path and lm.adapter is not None:
        if lm.adapter.fresh:
            return reference_of(lm)
        saved, _ = resolve(config.model)
        assert saved is not None
        twin = frozen_copy(lm)
        put_weights(twin.model, saved.tensors)
        return twin
    named = config.model
    if path:
        named = ModelConfig(**{**config.model.model_dump(), "path": path})
        _, base = resolve(config.model)
        named.tokenizer = base.tokenizer or base.path
    try:
        reference = load_model(named, dtype=lm.dtype, frozen=True, holder=lm.holder)
    except InputError as error:
        raise InputError(f"watch.reference: {error}") from None
    if not same_vocabulary(lm, reference) or lm.vocab_size != reference.vocab_size:
        raise InputError(f"watch.reference: {named.path} has another vocabulary than the policy")
    probes = probe_groups(reference.vocab_size)
    choose_layout(reference, in_each_layout(probes, reference.device), named.layout)
    reference.cast(lm.dtype)
    return reference
