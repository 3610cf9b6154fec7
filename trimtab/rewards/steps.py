"""Rewards for the steps of a response: a process reward model, or a Python function.

A response's text is split at a separator. Each step gets a reward, which is kept on the response with the
place where the step ends among its own tokens, for methods that learn from steps; and the term's value, for
all others, is the outcome that the steps add up to:

    product   Π_k p_k: every step is right (Lightman et al., 2023)
    min       min_k p_k: the weakest step (Wang et al., 2024, Math-Shepherd)
    mean      Σ_k p_k / K
    last      p_K

A function is ``function(prompt, steps, **columns) -> list[float]``: the prompt as text, the steps without
the separator, and the row's other columns by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from trimtab.config import Section, load_config
from trimtab.data.chat import render_prompt
from trimtab.data.collate import collate, group_tokens, in_each_layout, microbatches
from trimtab.data.steps import bare, ends_in, split_steps, step_tokens
from trimtab.errors import InputError
from trimtab.groups import Group, Response, prompt_text
from trimtab.models.layout import choose_scalar_layout, probe_groups
from trimtab.models.load import ModelConfig, load_scalar_model
from trimtab.models.scalar_model import ScalarModel, read_about
from trimtab.models.tree_model import Holder, TreeModel
from trimtab.rewards.base import accepted_names, response_text
from trimtab.rewards.models import holder_in, on_cpu, shared_scalar, spread_frozen
from trimtab.rewards.step_rewards import Steps
from trimtab.spread.shard import local_passes

Outcome = Literal["product", "min", "mean", "last"]


class ProcessRewardModelArgs(Section):
    """``args`` of the reward term "process_reward_model"."""

    path: str = Field("", description="folder or hub name of a process reward model of one output")
    revision: str = Field("main", description="hub revision")
    tokenizer: str = Field("", description="folder or hub name of the tokenizer; empty takes the model's")
    separator: str = Field("", description="what ends a step; empty takes what the model was trained with")
    outcome: Outcome = Field("product", description="what the steps' probabilities become for the response")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="what the forward pass computes in")
    device: str = Field("auto", description="cpu, cuda, …; auto takes a GPU where there is one")
    batch_tokens: int = Field(8192, ge=1, description="tokens computed at once; changes memory, no score")
    trust_remote_code: bool = Field(False, description="run code that comes with the model: your own risk")

    @model_validator(mode="after")
    def _path(self) -> ProcessRewardModelArgs:
        if not self.path:
            raise ValueError("path is required: the process reward model's folder or hub name")
        return self


class StepFunctionArgs(Section):
    """``args`` of the reward term "steps"."""

    function: str = Field("", description="package.module:function or path/to/file.py:function")
    separator: str = Field("\n", description="what ends a step (a line feed)")
    outcome: Outcome = Field("mean", description="what the steps' rewards become for the response")

    @model_validator(mode="after")
    def _given(self) -> StepFunctionArgs:
        if not self.function:
            raise ValueError("function is required: package.module:function or path/to/file.py:function")
        if not self.separator:
            raise ValueError("separator is empty: give what ends a step")
        return self


def outcome_of(rewards: list[float], outcome: Outcome) -> float:
    """One number from the rewards of a response's steps, of which there is at least one."""
    if outcome == "product":
        return math.prod(rewards)
    if outcome == "min":
        return min(rewards)
    return rewards[-1] if outcome == "last" else math.fsum(rewards) / len(rewards)


class StepRewards:
    """What both scorers share: splitting, and what is kept of each response until the next call."""

    outputs: dict[str, float]
    """One output without a name: the outcome."""

    def __init__(self, separator: str, outcome: Outcome, policy_tokenizer: Any) -> None:
        self.outputs = {"": 1.0}
        self.notes: list[str] = []
        self.separator, self.outcome = separator, outcome
        self._policy_tokenizer = policy_tokenizer
        self._found: dict[int, Steps] = {}
        """By identity: two groups of a rollout may have one id."""

    def steps_of(self, response: Response) -> Steps | None:
        """The steps of a response of the last call."""
        return self._found.get(id(response))

    def facts(self) -> dict[str, float]:
        """Nothing to count."""
        return {}

    def _keep(self, response: Response, steps: list[str], rewards: list[float]) -> dict[str, float]:
        ends = None
        if response.tokens and self._policy_tokenizer is not None:
            ends = ends_in(self._policy_tokenizer, response.tokens, steps)
        self._found[id(response)] = Steps(rewards, ends)
        return {"": outcome_of(rewards, self.outcome)}


class StepFunction(StepRewards):
    """A Python function that judges steps, as a :class:`trimtab.rewards.base.Scorer`."""

    def __init__(self, function: Callable[..., Any], args: StepFunctionArgs, tokenizer: Any = None) -> None:
        super().__init__(args.separator, args.outcome, tokenizer)
        self.function = function
        self._accepted = accepted_names(function)

    def score(self, groups: list[Group]) -> list[list[dict[str, float] | str]]:
        """Every response's outcome, or why there is none."""
        self._found = {}
        return [[self._one(group, response) for response in group.responses] for group in groups]

    def _one(self, group: Group, response: Response) -> dict[str, float] | str:
        reserved = [name for name in ("prompt", "steps") if name in group.columns]
        if reserved:
            return f"the row has a column {reserved[0]!r}, a name that is taken: rename it"
        columns = {k: v for k, v in group.columns.items() if self._accepted is None or k in self._accepted}
        steps = split_steps(response_text(response.text), self.separator)
        texts = [bare(step, self.separator) for step in steps]
        try:
            values = list(self.function(prompt=prompt_text(group.prompt), steps=texts, **columns))
            values = [value.item() if hasattr(value, "item") else value for value in values]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if len(values) != len(steps):
            return f"returned {len(values)} rewards for {len(steps)} steps: return one for each"
        if bad := [v for v in values if not isinstance(v, Real) or not math.isfinite(v)]:
            return f"returned {str(bad[0])[:60]!r} for a step: return finite numbers"
        return self._keep(response, steps, [float(value) for value in values])


class ProcessRewardModel(StepRewards):
    """A trained process reward model, as a :class:`trimtab.rewards.base.Scorer`."""

    models = 1
    """Models that it holds in memory; none where it shares another's base."""

    def __init__(
        self, args: ProcessRewardModelArgs, base: TreeModel | None = None, holder: Holder | None = None
    ) -> None:
        """``holder`` spreads the weights of a model with a base of its own; then this is collective."""
        about = read_about(args.path)
        if about.get("kind", "steps") != "steps":
            raise InputError(f'{args.path} is no process reward model: use the term "reward_model"')
        separator = args.separator or about.get("separator")
        if not isinstance(separator, str) or not separator:
            raise InputError(f"{args.path} does not say what ends a step: give args.separator")
        super().__init__(separator, args.outcome, None if base is None else base.tokenizer)
        # A model that learned steps as they stand is given them so.
        self.written = "" if about.get("separator") == "" else separator
        self.args = args
        config = ModelConfig(
            path=args.path,
            revision=args.revision,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
        asked = args.dtype if "dtype" in args.model_fields_set else None
        shared = shared_scalar(config, base, asked, self.notes)
        if shared is None:
            self.scalar = self._load(config, holder)
        else:
            self.scalar, self.models = shared[0], 0
            self.scalar.tokenizer = shared[1]
        if self.scalar.outputs != 1:
            raise InputError(
                f"{args.path} gives {self.scalar.outputs} scores a step; a process reward model has one"
            )
        line = choose_scalar_layout(
            self.scalar, in_each_layout(probe_groups(self.scalar.vocab_size), self.scalar.device)
        )
        self.notes += [line] if line else []
        self._counts = {"process_reward_truncated": 0.0}

    def _load(self, config: ModelConfig, holder: Holder | None) -> ScalarModel:
        dtype = getattr(torch, self.args.dtype)
        if holder is None:
            return load_scalar_model(config, dtype=dtype, frozen=True)
        own = holder_in(holder, dtype)
        with holder.turn():
            scalar = load_scalar_model(on_cpu(config), dtype=dtype, frozen=True)
            spread_frozen(scalar, own)
        own.begin(scalar)
        return scalar

    def facts(self) -> dict[str, float]:
        """Running counts: responses whose prompt had to be cut to the model's context."""
        return dict(self._counts)

    @property
    def spread(self) -> bool:
        """Each process holds a part of the weights."""
        return self.scalar.spread

    @torch.no_grad()
    def score(self, groups: list[Group]) -> list[list[dict[str, float] | str]]:
        """Every response's outcome, or why there is none."""
        self._found = {}
        with local_passes(self.scalar):
            return self._score(groups)

    def _score(self, groups: list[Group]) -> list[list[dict[str, float] | str]]:
        failed: dict[int, str] = {}
        trees: list[Group] = []
        steps: dict[int, list[str]] = {}
        theirs: dict[int, Response] = {}
        for group in groups:
            try:
                prompt = render_prompt(self.scalar.tokenizer, group.prompt)
            except InputError as error:
                raise InputError(f"process reward model {self.args.path}: {group.id}: {error}") from None
            tree = Group(id=group.id, prompt_tokens=prompt)
            for response in group.responses:
                steps[id(response)] = split_steps(response_text(response.text), self.separator)
                # Of an empty response there is nothing to read but the separator.
                written = [step or self.separator for step in steps[id(response)]]
                try:
                    tokens, ends = step_tokens(self.scalar.tokenizer, written, self.written)
                except InputError as error:
                    failed[id(response)] = str(error)
                    continue
                if len(tokens) + 2 > self.scalar.context:
                    failed[id(response)] = f"{len(tokens)} tokens do not fit into {self.scalar.context}"
                    continue
                tree.responses.append(Response(tokens=tokens, step_ends=ends))
                theirs[id(tree.responses[-1])] = response
            trees += self._fit(tree)
        values: dict[int, dict[str, float]] = {}
        for own, rewards in self._chances(trees):
            response = theirs[id(own)]
            values[id(response)] = self._keep(response, steps[id(response)], rewards)
        return [[values.get(id(r)) or failed[id(r)] for r in group.responses] for group in groups]

    def _chances(self, trees: list[Group]) -> list[tuple[Response, list[float]]]:
        """Each response with the probabilities of its steps."""
        layout = self.scalar.layout
        budget = max([self.args.batch_tokens, *(group_tokens(tree, layout) for tree in trees)])
        out = []
        for part in microbatches(trees, budget, layout=layout):
            responses = [response for tree in part for response in tree.responses]
            batch = collate(part, layout=layout, device=self.scalar.device)
            logits_NS, mask_NS = self.scalar.step_logits(batch, responses)
            rows = zip(responses, logits_NS.double().sigmoid().cpu(), mask_NS.cpu(), strict=True)
            out += [(response, row[keep].tolist()) for response, row, keep in rows]
        return out

    def _fit(self, group: Group) -> list[Group]:
        """The group; over the model's context one tree a response, of the prompt's end behind its BOS.

        So that no response's steps depend on its siblings.
        """
        context, prompt = self.scalar.context, group.prompt_tokens or []
        if all(len(prompt) + len(r.tokens or ()) <= context for r in group.responses):
            return [group] if group.responses else []
        head = prompt[:1] if prompt[0] == self.scalar.tokenizer.bos_token_id else []
        trees = []
        for response in group.responses:
            kept, room = prompt, context - len(response.tokens or ())
            if len(prompt) > room:
                self._counts["process_reward_truncated"] += 1
                kept = [*head, *prompt[len(prompt) - (room - len(head)) :]]
            trees.append(Group(id=group.id, prompt_tokens=kept, responses=[response]))
        return trees


def build_process_reward_model(
    args: dict[str, Any], base: TreeModel | None = None, *, spread: bool = False
) -> ProcessRewardModel:
    """The scorer that ``args`` describe. Raises InputError for what cannot be loaded or makes no sense.

    ``spread``: over processes, where ``base`` is.
    """
    try:
        options = load_config(ProcessRewardModelArgs, None, args)
        return ProcessRewardModel(options, base, base.holder if spread and base is not None else None)
    except InputError as error:
        message = re.sub(r"^model\.", "args.", str(error))
        raise InputError(f"reward 'process_reward_model': {message}") from None
