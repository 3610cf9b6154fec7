"""Passes of one process's own through spread weights: gathered for a phase, or layer by layer in step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import spreading
import torch
from processes import Processes
from torch.distributed.fsdp import fully_shard

from trimtab.groups import Group
from trimtab.models.language_model import LanguageModel
from trimtab.models.roles import frozen_copy
from trimtab.models.shards import is_part
from trimtab.parallel.world import world
from trimtab.rollouts.engine import TreeSampler
from trimtab.rollouts.plain import PlainSampler
from trimtab.rollouts.sampling import SamplingConfig
from trimtab.spread import passes
from trimtab.spread.deal import deal, parts
from trimtab.spread.shard import local_passes

SAMPLERS: dict[str, type[TreeSampler] | type[PlainSampler]] = {"tree": TreeSampler, "plain": PlainSampler}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its head tied to its embedding."""
    return spreading.save(tmp_path_factory.mktemp("spread") / "model")


def sampled(lm: LanguageModel, engine: str, prompts: list[Group], seed: int = 0) -> list[Any]:
    """Tokens and log-probabilities, of responses of very different lengths."""
    config = SamplingConfig(max_new_tokens=9)
    limits = [1 + 4 * int(group.id) for group in prompts]
    if not prompts:
        return []
    groups = SAMPLERS[engine]().sample(lm, prompts, 2, config, seed=seed, end_tokens=[7, 8], limits=limits)
    return [[g.id, r.tokens, r.sampler_logps] for g in groups for r in g.responses]


def _sampled(path: Path, engine: str, gather: str, dtype: str, shares: int) -> list[Any]:
    """Each process samples its share; one of them has no prompts where ``shares`` is 1."""
    lm = spreading.load(path, dtype=dtype)
    prompts = spreading.groups()
    own = deal(prompts, shares)[world().rank] if world().rank < shares else []
    found = []
    for round_ in range(2):
        with local_passes(lm, gather=gather):
            found.append(sampled(lm, engine, own if not world().alone else prompts, round_))
        assert not lm.spread or all(is_part(p) for p in lm.model.parameters()), "gathered weights stayed"
        # The next rollout is sampled from weights that have moved.
        if round_ == 0:
            own_optimiser = spreading.optimiser(lm, dtype)
            spreading.step(lm, own_optimiser, spreading.groups())
    return found


@pytest.mark.parametrize(
    ("engine", "gather", "shares"),
    [("tree", "whole", 1), ("tree", "layers", 2), ("plain", "whole", 2), ("plain", "layers", 1)],
)
def test_samples_are_those_of_one_process(
    processes: Processes, model: Path, engine: str, gather: str, shares: int
) -> None:
    how: dict[str, Any] = {"path": model, "engine": engine, "gather": gather, "dtype": "float64"}
    (alone,) = processes.run(_sampled, size=1, shares=1, **how)
    found = processes.run(_sampled, shares=shares, **how)
    for round_ in range(2):
        ours = sorted((row for one in found for row in one[round_]), key=lambda row: (row[0], row[1]))
        theirs = sorted(alone[round_], key=lambda row: (row[0], row[1]))
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a[2] == pytest.approx(b[2], abs=1e-6)  # drawn in fp32


def _as_scored(path: Path, gather: str) -> list[float]:
    """In bf16, where the engine may read weights past the modules: what it says is what the policy says."""
    lm = spreading.load(path, dtype="bfloat16")
    prompts = spreading.groups()
    config = SamplingConfig(max_new_tokens=5, temperature=0)
    with local_passes(lm, gather=gather):
        groups = TreeSampler().sample(lm, prompts, 2, config, seed=0, end_tokens=[])
    worst = [0.0]
    for part in parts(lm, groups, 64):
        with torch.no_grad():
            logits = [row for chunk in lm.logits(part.batch, 1000) for row in chunk.float()]
        if part.idle:
            continue
        tokens = [t for g in part.groups for r in g.responses for t in r.tokens or ()]
        worst += [float(row.max() - row[t]) for row, t in zip(logits, tokens, strict=True)]
    return worst


@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_bf16_samples_are_the_policys(processes: Processes, tmp_path: Path, gather: str) -> None:
    """Wide enough for the stack of one compiled call, where this machine has it."""
    path = spreading.save(tmp_path / "model", hidden_size=64, intermediate_size=64, head_dim=32)
    for worst in processes.run(_as_scored, path=path, gather=gather):
        assert max(worst) < 0.25


def _uneven(path: Path, gather: str, models: int) -> list[Any]:
    """Processes make different numbers of passes, of two models in different orders."""
    lm = spreading.load(path)
    both = [lm, frozen_copy(lm)][:models]
    one = torch.tensor([[9, 10, 11]])
    seen: list[float] = []
    with local_passes(*both, gather=gather):
        order = both if world().rank == 0 else both[::-1]
        for k in range(1 + 3 * world().rank):
            hidden = order[k % models].trunk(input_ids=one, use_cache=False).last_hidden_state
            seen.append(float(hidden.sum()))
    return [len(seen), len({round(x, 9) for x in seen}), world().gather(0)]


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_processes_make_different_numbers_of_passes(
    processes: Processes, model: Path, gather: str, models: int
) -> None:
    first, second = processes.run(_uneven, path=model, gather=gather, models=models)
    assert (first[0], second[0]) == (1, 4)
    assert first[1] == second[1] == 1


def _decided(path: Path) -> list[Any]:
    """Whole weights find room at first, and never again."""
    lm = spreading.load(path)
    assert lm.holder is not None
    found: list[Any] = []
    free: list[int | None] = [None, 0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "free_bytes", lambda device: free.pop(0))
        for _ in range(2):
            with local_passes(lm):
                found.append(lm.passes.gathered)
        with local_passes(frozen_copy(lm)):
            pass
    return [found, sorted(lm.holder.chosen.values()), len(free)]


def test_how_weights_are_sampled_from_is_decided_once(processes: Processes, model: Path) -> None:
    """By each model: the second, a frozen one, is asked for what is free by then, which is nothing."""
    assert processes.run(_decided, path=model) == [[[True, True], ["layers", "whole"], 0]] * 2


def _raised(path: Path) -> list[Any]:
    """A pass that fails in every process, amid a layer, leaves the model as it was."""
    lm = spreading.load(path)

    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    layers: Any = lm.trunk.layers
    handle = layers[1].mlp.register_forward_pre_hook(fail)
    one = torch.tensor([[9, 10, 11]])
    with contextlib.suppress(ValueError):
        lm.trunk(input_ids=one, use_cache=False)
    handle.remove()
    whole = [name for name, p in lm.model.named_parameters() if not is_part(p)]
    return [whole, spreading.trained(lm, steps=2)["steps"]]


def _trained(path: Path) -> list[Any]:
    return [[], spreading.trained(spreading.load(path), steps=2)["steps"]]


def test_a_pass_that_fails_is_forgotten(processes: Processes, model: Path) -> None:
    assert processes.run(_raised, path=model) == processes.run(_trained, path=model)


def _past_the_root(path: Path) -> list[Any]:
    """What the guard is for, without it: the trunk of a sharded model called past its root."""
    lm = spreading.load_plain(path)
    layers: Any = lm.trunk.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(lm.model)
    one = torch.tensor([[9, 10, 11]])
    found: list[str] = []
    for _ in range(2):
        try:
            lm.trunk(input_ids=one, use_cache=False)
            lm.model(input_ids=one, use_cache=False)
        except RuntimeError as error:
            found.append(type(error).__name__)
    return found


def test_a_trunk_past_its_root_is_the_trap_that_it_was(processes: Processes, model: Path) -> None:
    """Should this pass one day, the detour through the root is no longer needed."""
    assert processes.run(_past_the_root, path=model) == [["RuntimeError"] * 2] * 2
