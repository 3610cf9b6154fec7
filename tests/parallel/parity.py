"""Runs of any method inside the pool's processes, and what is compared of them.

What each process logs and holds is read in that process, never from the run directory, which the first one
alone writes: a process that sees other numbers than the others is found out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import tiny
import torch
from processes import Processes

from trimtab import methods
from trimtab.config import load_config
from trimtab.data.sources import Stream
from trimtab.evaluation.watching.during import heldout_evaluation
from trimtab.groups import Group
from trimtab.spread import deal
from trimtab.training.run import Run
from trimtab.training.state import State

RELATIVE = 1e-9
ABSOLUTE = 1e-10
"""Of what is left when larger numbers are subtracted: a reward against a reference, whitened advantages."""
TIED = 1e-12
"""Reward margins below it are 0 but for rounding, which then decides who is ahead."""

Found = dict[str, Any]
"""One process's: each step's ``metrics``, the ``order`` of groups, ``state`` and ``model`` in the end.
``passes`` are each step's with a gradient, ``idle`` how many beside them were.
"""
T = TypeVar("T")


def uneven(folder: Path) -> Path:
    """The files of ``tiny`` with 11 rows whose prompts have 1 to 19 words: no share is like another's."""
    kinds = {
        "pairs": tiny.pairs(11),
        "rankings": tiny.rankings(11),
        "labels": tiny.labels(11),
        "steps": tiny.steps(11),
        "demonstrations": tiny.demonstrations(11),
        "prompts": tiny.prompts(11),
    }
    for kind, rows in kinds.items():
        long = [
            row | {"prompt": " ".join([*tiny.WORDS[: (5 * i * i) % 19], row["prompt"].split()[-1]])}
            for i, row in enumerate(rows)
        ]
        tiny.write_rows(folder / f"{kind}.jsonl", long)
    # Smooth in the response's words, so that no two samples of a group are worth the same.
    body = (
        "return sum((ord(w[0]) % 7) / 7 for w in response.split()) / (1 + len(response.split())) "
        "+ 0.01 * len(response.split())"
    )
    tiny.write_reward(folder / "rewards.py", body)
    return folder


def options(name: str, model: Path, data: Path, out: Path, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted options of a run in fp64: five groups a step, in micro-batches of one to three of them."""
    return {
        **tiny.options(name, model, data, out),
        "model.dtype": "float64",
        "train.kernels": "off",
        "train.batch_groups": 5,
        "train.micro_batch_tokens": 40,
        **changed,
    }


def trained(
    method: str,
    given: dict[str, Any],
    spoilt: str = "",
    trail: Path | None = None,
    replayed: bool = False,
    evaluated: bool = False,
) -> Found:
    """Run the method in this process, with the others; ``evaluated`` as the command line does.

    ``spoilt``: the loss of this group is NaN. ``trail``: where the sampler's groups are written, or, if
    ``replayed``, read from in place of sampling.
    """
    found: Found = {"metrics": [], "order": [], "idle": 0, "passes": [0]}
    with ExitStack() as patched:
        patched.enter_context(_watched(found))
        if spoilt:
            patched.enter_context(_spoilt(spoilt))
        if trail is not None:
            patched.enter_context(_sampling(trail, replayed))
        module = methods.find(method)
        config = load_config(module.Config, None, given)
        result = module.train(config, on_eval=heldout_evaluation(config) if evaluated else None)
    found |= {"model_step": result.model_step, "stopped": result.stopped}
    return found | {"state": held(result.state), "model": digest(result.lm.model.state_dict())}


def held(state: State) -> Found:
    """What decides how a run goes on, and the weights: their norms, and a digest of their bits."""
    tensors = dict(whole(state.optimiser.tensors()))
    for role, optimiser in state.others.items():
        tensors |= {f"{role}/{name}": tensor for name, tensor in whole(optimiser.tensors()).items()}
    tensors |= whole(state.extra)
    return {
        "step": state.step,
        "position": state.position,
        "tokens": state.tokens,
        "controllers": state.controllers,
        "pending": [group.to_dict() for group in state.pending],
        "ahead": [group.to_dict() for group in state.ahead],
        "norms": {name: float(tensor.double().norm()) for name, tensor in sorted(tensors.items())},
        "digest": digest(tensors),
    }


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as one process would hold them."""
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in sorted(tensors.items())
    }


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and bits."""
    found = hashlib.sha256()
    for name, tensor in whole(tensors).items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _watched(found: Found) -> Iterator[None]:
    log, batch, backward = Run.log, Stream.batch, deal.Sums.backward

    def watch_log(self: Run, state: State, metrics: dict[str, Any]) -> None:
        found["metrics"] += tiny.comparable([{"step": state.step, **metrics}])
        found["passes"].append(0)
        log(self, state, metrics)

    def watch_batch(self: Stream, position: int, n: int) -> list[Group]:
        groups = batch(self, position, n)
        found["order"] += [[position + i, group.id] for i, group in enumerate(groups)]
        return groups

    def watch_backward(self: deal.Sums, optimiser: Any, loss: Any, part: deal.Part, *more: Any) -> None:
        found["idle"] += part.idle
        found["passes"][-1] += not part.idle
        backward(self, optimiser, loss, part, *more)

    with (
        patch.object(Run, "log", watch_log),
        patch.object(Stream, "batch", watch_batch),
        patch.object(deal.Sums, "backward", watch_backward),
    ):
        yield
    found["passes"].pop()


@contextmanager
def _spoilt(group: str) -> Iterator[None]:
    backward = deal.Sums.backward

    def spoil(self: deal.Sums, optimiser: Any, loss: torch.Tensor, part: deal.Part, *more: Any) -> None:
        hit = not part.idle and any(group in (g.id, g.id.split("#")[0]) for g in part.groups)
        backward(self, optimiser, loss * float("nan") if hit else loss, part, *more)

    with patch.object(deal.Sums, "backward", spoil):
        yield


class Recorder:
    """A sampler that leaves what it drew, or hands out what one left."""

    def __init__(self, sampler: Any, trail: Path, replayed: bool) -> None:
        self.sampler, self.trail, self.known = sampler, trail, dict[tuple[int, str], Group]()
        if replayed:
            for line in trail.read_text().splitlines():
                step, group = json.loads(line)
                self.known[step, group["id"]] = Group.from_dict(group)

    def sample(self, lm: Any, groups: list[Group], n: int, config: Any, **more: Any) -> list[Group]:
        """See :class:`trimtab.rollouts.sampling.Sampler`."""
        step, on_group = more.get("step", 0), more.get("on_group")
        if not self.known:
            drawn = self.sampler.sample(lm, groups, n, config, **more)
            with self.trail.open("a") as trail:
                trail.writelines(json.dumps([step, group.to_dict()]) + "\n" for group in drawn)
            return drawn
        drawn = [Group.from_dict(self.known[step, group.id].to_dict()) for group in groups]
        for i, group in enumerate(drawn):
            if on_group is not None:
                on_group(i, group)
        return drawn


@contextmanager
def _sampling(trail: Path, replayed: bool) -> Iterator[None]:
    from trimtab.methods import ppo
    from trimtab.methods.shared import relative

    with ExitStack() as patched:
        for module in (ppo, relative):
            choose = module.choose_sampler

            def chosen(*given: Any, choose: Any = choose) -> tuple[Any, str | None]:
                sampler, line = choose(*given)
                return Recorder(sampler, trail, replayed), line

            patched.enter_context(patch.object(module, "choose_sampler", chosen))
        yield


# ---------------------------------------------------------------- in the test


class Runs:
    """Runs of methods on the tiny model and uneven data, on however many processes."""

    def __init__(self, processes: Processes, model: Path, data: Path, folder: Path) -> None:
        self.processes, self.model, self.data, self.folder = processes, model, data, folder
        self._alone: dict[str, Found] = {}
        self._count = itertools.count()

    def __call__(
        self,
        method: str,
        size: int = 2,
        *,
        changed: Mapping[str, Any] | None = None,
        out: Path | None = None,
        **more: Any,
    ) -> list[Found]:
        """What each of ``size`` processes found; ``changed`` options, ``more`` as :func:`trained`."""
        out = out or self.folder / f"{method}-{size}-{next(self._count)}"
        given = options(method, self.model, self.data, out, changed or {})
        return self.processes.run(trained, size=size, method=method, given=given, **more)

    def alone(self, method: str, *, changed: Mapping[str, Any] | None = None, **more: Any) -> Found:
        """The same run on one process, computed once however often it is asked for."""
        key = json.dumps([method, changed, more], sort_keys=True, default=str)
        if key not in self._alone:
            [self._alone[key]] = self(method, 1, changed=changed, **more)
        return self._alone[key]


def assert_same_run(alone: Found, together: list[Found]) -> None:
    """Every process of ``together`` found what the one found alone, within rounding in fp64."""
    first = together[0]
    for rank, other in enumerate(together[1:], 1):
        for part in ("metrics", "order", "state", "model"):
            assert other[part] == first[part], f"process {rank} has another {part} than process 0"
    assert first["order"] == alone["order"]
    assert [m["step"] for m in first["metrics"]] == [m["step"] for m in alone["metrics"]]
    for ours, theirs in zip(first["metrics"], alone["metrics"], strict=True):
        close(ours, theirs, f"step {theirs['step']}")
    ours, theirs = ({k: v for k, v in f["state"].items() if k != "digest"} for f in (first, alone))
    close(ours, theirs, "state")


def close(ours: Any, theirs: Any, where: str) -> None:
    """Equal, numbers within RELATIVE; says where they are not."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), f"{where}: {sorted(ours.keys() ^ theirs.keys())}"
        tied = abs(theirs.get("reward_margin", 1.0)) < TIED
        for key, value in theirs.items():
            if not (tied and key == "accuracy"):
                close(ours[key], value, f"{where}, {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), f"{where}: {len(ours)} instead of {len(theirs)}"
        for i, value in enumerate(theirs):
            close(ours[i], value, f"{where} {i}")
    elif isinstance(theirs, float) or isinstance(ours, float):
        same = math.isclose(ours, theirs, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        assert same or (math.isnan(ours) and math.isnan(theirs)), f"{where}: {ours!r} instead of {theirs!r}"
    else:
        assert ours == theirs, f"{where}: {ours!r} instead of {theirs!r}"
