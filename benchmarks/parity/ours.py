"""Our side of a case: the method's own ``train``, and a record of what it trained on.

Nothing of the method is replaced but where its rollouts come from: the sampler gives the fixed responses of
``rollouts.json``, and the reward looks their scores up. What the stream hands out is written down as it goes,
so that the peer gets the same rows in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.parity import world
from benchmarks.parity.case import Case
from trimtab import methods
from trimtab.data.sources import Stream
from trimtab.groups import Group, Response
from trimtab.models.language_model import LanguageModel
from trimtab.rollouts import engine
from trimtab.rollouts.sampling import SamplingConfig

CURVES = ("loss", "grad_norm", "value_loss", "critic_grad_norm")
Rollouts = dict[str, list[dict[str, Any]]]
"""Prompt → its fixed responses."""


@dataclasses.dataclass
class Outcome:
    """What our side did in a case."""

    curves: dict[str, list[float]]
    batches: list[list[dict[str, Any]]]
    """Per step (sampling methods: per rollout) the groups, as :func:`as_row` writes them."""
    metrics: list[dict[str, Any]]
    """Every line of the run's log."""


def run(case: Case, files: Path, out: Path) -> Outcome:
    """Train as the case says; ``out`` is the run's folder.

    Raises InputError where the method does not exist or refuses the configuration.
    """
    method = methods.find(case.method)
    config = method.Config.model_validate(sections(case, files, out))
    seen: dict[int, list[dict[str, Any]]] = {}
    drawn: list[list[dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(recording(seen))
        if case.rollouts:
            fixed = json.loads((files / "rollouts.json").read_text())[case.rollouts]
            stack.enter_context(replaying(Replay(fixed, drawn)))
        method.train(config)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    curves = {name: [line[name] for line in steps] for name in CURVES if name in steps[0]}
    batches = drawn if case.rollouts else [seen[position] for position in sorted(seen)]
    return Outcome(curves, batches, lines)


def sections(case: Case, files: Path, out: Path) -> dict[str, Any]:
    """The configuration of a case: what all have in common, then the case's own."""
    made: dict[str, Any] = {
        "model": {"path": str(files / case.model), "dtype": "float32"},
        "data": {"sources": [{"path": str(files / f"{case.rows}.jsonl")}]},
        "train": {
            "steps": world.STEPS,
            "batch_groups": world.PROMPTS if case.rollouts else world.BATCH,
            "lr": case.lr,
            "schedule": "constant",
            "kernels": "off",
            "seed": world.SEED,
        },
        "run": {"out": str(out)},
    }
    if case.rollouts:
        tokens = {"mixed": world.NEW_TOKENS, "even": world.EVEN_TOKENS}[case.rollouts]
        made["sampling"] = {"max_new_tokens": tokens}
        made["reward"] = {
            "terms": [{"name": "benchmarks.parity.ours:looked_up", "args": {"files": str(files)}}]
        }
    for name, options in case.ours.items():
        made[name] = made.get(name, {}) | {
            key: value.format(files=files) if isinstance(value, str) else value
            for key, value in options.items()
        }
    return made


def looked_up(prompt: str, response: str, files: str, **columns: Any) -> float:
    """The reward of a fixed response, as a configuration names it. Raises KeyError for another response."""
    return _rewards(files)[prompt, response]


@functools.cache
def _rewards(files: str) -> dict[tuple[str, str], float]:
    kinds = json.loads((Path(files) / "rollouts.json").read_text())
    return {
        (prompt, response["text"]): response["reward"]
        for rollouts in kinds.values()
        for prompt, responses in rollouts.items()
        for response in responses
    }


class Replay:
    """A sampler that gives every prompt its fixed responses, and writes down what it gave."""

    def __init__(self, rollouts: Rollouts, drawn: list[list[dict[str, Any]]]) -> None:
        self.rollouts = rollouts
        self.drawn = drawn

    def sample(
        self,
        lm: LanguageModel,
        groups: list[Group],
        n: int,
        config: SamplingConfig,
        *,
        seed: int,
        step: int = 0,
        end_tokens: list[int],
        on_group: Callable[[int, Group], None] | None = None,
        limits: list[int] | None = None,
    ) -> list[Group]:
        """See :class:`trimtab.rollouts.sampling.Sampler`. ``sampler_logps`` are 0: parity cases use none.

        Raises ValueError where a prompt has fewer than ``n`` fixed responses.
        """
        done = []
        for k, group in enumerate(groups):
            fixed = self.rollouts[str(group.prompt)]
            if len(fixed) < n:
                raise ValueError(f"{group.id}: {n} responses are asked for, {len(fixed)} are there")
            responses = [
                Response(
                    text=one["text"],
                    tokens=list(one["tokens"]),
                    finish=one["finish"],
                    sampler_logps=[0.0] * len(one["tokens"]),
                )
                for one in fixed[:n]
            ]
            done.append(dataclasses.replace(group, responses=responses))
            if on_group is not None:
                on_group(k, done[-1])
        self.drawn.append(
            [
                as_row(group) | {"rewards": [one["reward"] for one in self.rollouts[str(group.prompt)][:n]]}
                for group in done
            ]
        )
        return done


@contextlib.contextmanager
def replaying(sampler: Replay) -> Iterator[None]:
    """Within it every method that chooses a sampler gets this one."""
    original = engine.choose_sampler
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("trimtab.") and getattr(module, "choose_sampler", None) is original:
                stack.enter_context(mock.patch.object(module, "choose_sampler", return_value=(sampler, None)))
        yield


@contextlib.contextmanager
def recording(seen: dict[int, list[dict[str, Any]]]) -> Iterator[None]:
    """Within it ``seen`` gets, by position, the groups that any stream hands out."""
    original = Stream.batch

    def batch(stream: Stream, position: int, n: int) -> list[Group]:
        groups = original(stream, position, n)
        seen[position] = [as_row(group) for group in groups]
        return groups

    with mock.patch.object(Stream, "batch", batch):
        yield


def as_row(group: Group) -> dict[str, Any]:
    """A group for the peer: texts, the ids that it has to arrive at, and the feedback."""
    return {
        "prompt": group.prompt,
        "prompt_ids": group.prompt_tokens,
        "columns": group.columns,
        "responses": [
            {"text": r.text, "ids": r.tokens, "preferred": r.preferred, "label": r.label, "rank": r.rank}
            for r in group.responses
        ],
    }
