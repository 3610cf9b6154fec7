"""Roles beside a policy whose weights are spread: references, snapshots, critics; and writing weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import spreading
import torch
from processes import Processes, ProcessFailed

from trimtab.methods.shared.online import copy_weights, refresh_reference, restore_reference
from trimtab.methods.shared.refreshed import Reference
from trimtab.models.language_model import LanguageModel
from trimtab.models.roles import bases, frozen_copy, reference_of, scalar_on, whole_copy
from trimtab.models.shards import is_part, reshard, whole
from trimtab.models.tree_model import TreeModel
from trimtab.parallel.world import world
from trimtab.spread.deal import numbers
from trimtab.training.state import State


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its head tied to its embedding."""
    return spreading.save(tmp_path_factory.mktemp("spread") / "model")


def logps(lm: LanguageModel) -> list[float]:
    """Of the groups' tokens, in every process."""
    rows = numbers(
        lm,
        spreading.groups(),
        24,
        lambda part: part.batch.ragged(lm.token_logprobs(part.batch)[0]),
    )
    return [number for row in rows for number in row]


def values(critic: Any) -> list[float]:
    """Of the same."""
    rows = numbers(critic, spreading.groups(), 24, lambda part: part.batch.ragged(critic.values(part.batch)))
    return [number for row in rows for number in row]


def parts_of(lm: TreeModel) -> dict[str, torch.Tensor]:
    reshard(lm.model)
    return dict(lm.model.named_parameters())


def _references(path: Path, adapter: str) -> dict[str, Any]:
    lm = spreading.load(path, adapter=adapter)
    anchor, copied = reference_of(lm), frozen_copy(lm)
    first = logps(lm)
    own = spreading.optimiser(lm)
    spreading.step(lm, own, spreading.groups())
    moved = logps(lm)
    found = {"first": first, "anchor": logps(anchor), "copied": logps(copied), "moved": moved}
    copy_weights(copied, lm)
    # Without a pass between: what was gathered for the last one is of before the copy.
    found["refreshed"] = logps(copied)
    if not world().alone:
        assert anchor.spread
        assert all(is_part(p) for p in (*parts_of(anchor).values(), *parts_of(copied).values()))
        assert not any(p.requires_grad for p in parts_of(anchor).values())
    held, line = bases({"policy": lm, "reference": anchor, "copy": copied})
    return found | {"bases": held, "line": line or ""}


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_references(processes: Processes, model: Path, adapter: str) -> None:
    (alone,) = processes.run(_references, size=1, path=model, adapter=adapter)
    first, second = processes.run(_references, path=model, adapter=adapter)
    assert first == second
    assert first["anchor"] == first["copied"] == first["first"]
    assert first["refreshed"] == first["moved"] != first["first"]
    for name in ("first", "moved"):
        assert first[name] == pytest.approx(alone[name], abs=1e-12)
    # Roles share the very parts of a frozen base.
    assert (first["bases"], first["line"]) == (alone["bases"], alone["line"])
    assert first["bases"] == (3 if adapter == "none" else 1)


def _snapshot(path: Path, adapter: str) -> list[Any]:
    lm = spreading.load(path, adapter=adapter)
    twin = whole_copy(lm)
    same = logps(twin) == logps(lm)
    own = spreading.optimiser(lm)
    spreading.step(lm, own, spreading.groups())
    apart = logps(twin) != logps(lm)
    copy_weights(twin, lm)
    plain = not twin.spread and not any(is_part(p) for p in twin.model.parameters())
    # No message: each process makes another number of passes.
    for _ in range(1 + world().rank):
        with torch.no_grad():
            twin.trunk(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    gap = max(abs(a - b) for a, b in zip(logps(twin), logps(lm), strict=True))
    return [same, apart, plain, gap < 1e-12]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_snapshot_is_whole(processes: Processes, model: Path, adapter: str) -> None:
    """Sampled from in a thread while the others' passes are gathered from parts."""
    for found in processes.run(_snapshot, path=model, adapter=adapter):
        assert found == [True] * 4


def _critic(path: Path) -> dict[str, Any]:
    lm = spreading.load(path, adapter="lora")
    critic = scalar_on(lm, seed=3)
    drawn = {
        name: whole(p.detach()).double().tolist()
        for name, p in sorted(parts_of(critic).items())
        if "lora_" in name
    }
    with torch.no_grad():
        for name, p in parts_of(critic).items():
            if name.startswith("score."):
                (p.to_local() if is_part(p) else p).fill_(0.3)  # type: ignore[attr-defined]
    reshard(critic.model)
    if not world().alone:
        theirs = parts_of(lm)
        name = "model.layers.0.self_attn.q_proj.base_layer.weight"
        assert parts_of(critic)[name] is theirs[name]
    return {"drawn": drawn, "values": values(critic)}


def test_a_critic_on_the_policys_base(processes: Processes, model: Path) -> None:
    """Its adapter is drawn as in one process, and the base is the policy's own parts."""
    (alone,) = processes.run(_critic, size=1, path=model)
    first, second = processes.run(_critic, path=model)
    assert first == second
    assert first["drawn"] == alone["drawn"]
    assert first["values"] == pytest.approx(alone["values"], abs=1e-12)
    assert any(first["values"])


def _refreshed(path: Path, average: float, adapter: str) -> dict[str, Any]:
    lm = spreading.load(path, adapter=adapter)
    reference = Reference(lm, refreshed=True)
    own = spreading.optimiser(lm)
    state = State(own)
    reference.begin(lm, state, average=average)
    found = {"0": logps(reference.lm)}
    for step in range(1, 3):
        spreading.step(lm, own, spreading.groups())
        reference.refresh(lm, state)
        found[str(step)] = logps(reference.lm)
    # As a checkpoint gives it back: whole, on the CPU, whatever the number of processes was.
    kept = {name: whole(value.detach()).cpu().clone() for name, value in state.extra.items()}
    for value in state.extra.values():
        (value.to_local() if is_part(value) else value).zero_()  # type: ignore[attr-defined]
    state.extra = dict(kept)
    reference.restore(state)
    return found | {"restored": logps(reference.lm), "kept": sorted(kept)}


@pytest.mark.parametrize(("average", "adapter"), [(1.0, "none"), (0.3, "none"), (0.3, "lora")])
def test_a_refreshed_reference(processes: Processes, model: Path, average: float, adapter: str) -> None:
    (alone,) = processes.run(_refreshed, size=1, path=model, average=average, adapter=adapter)
    first, second = processes.run(_refreshed, path=model, average=average, adapter=adapter)
    assert first == second
    assert first["kept"] == alone["kept"]
    assert first["restored"] == first["2"] != first["1"] != first["0"]
    for name in ("0", "1", "2"):
        assert first[name] == pytest.approx(alone[name], abs=1e-12)


def _plainly(path: Path) -> list[Any]:
    """The reference that is refreshed whole, by the functions that other methods use."""
    lm = spreading.load(path)
    twin, own = frozen_copy(lm), spreading.optimiser(lm)
    state = State(own)
    spreading.step(lm, own, spreading.groups())
    refresh_reference(twin, lm, state)
    first = logps(twin)
    kept = {name: whole(value).clone() for name, value in state.extra.items()}
    spreading.step(lm, own, spreading.groups())
    refresh_reference(twin, lm, state)
    assert logps(twin) != first
    state.extra = kept
    restore_reference(twin, state)
    return [logps(twin) == first, len(state.extra)]


def test_a_reference_is_put_back(processes: Processes, model: Path) -> None:
    for same, count in processes.run(_plainly, path=model):
        assert same
        assert count == 20


def _written(path: Path) -> list[Any]:
    """Weights from a checkpoint, whole, into a model of which a pass has left the embedding gathered."""
    lm = spreading.load(path)
    own = spreading.optimiser(lm)
    spreading.step(lm, own, spreading.groups())
    kept = {name: whole(t).clone() for name, t in own.tensors().items()}
    then = logps(lm)
    after = spreading.step(lm, own, spreading.groups()), spreading.weights(own)
    assert logps(lm) != then
    own.load_tensors(kept)
    return [
        logps(lm) == then,
        (spreading.step(lm, own, spreading.groups()), spreading.weights(own)) == after,
    ]


def test_written_weights_are_those_of_the_next_pass(processes: Processes, model: Path) -> None:
    """Moments too: the step that is taken again is the same to the bit."""
    for found in processes.run(_written, path=model):
        assert found == [True, True]


def _turns(path: Path, record: Path) -> list[str]:
    """Each process notes when it begins and ends to read; who reads holds a whole copy."""
    holder = spreading.holder()
    assert holder is not None
    with holder.turn(), record.open("a") as file:
        file.write(f"{world().rank}")
        file.flush()
        lm = spreading.load_plain(path)
        holder.spread(lm)
        os.write(file.fileno(), f"{world().rank}".encode())
    holder.begin(lm)
    return []


def test_processes_of_a_machine_read_in_turns(processes: Processes, model: Path, tmp_path: Path) -> None:
    processes.run(_turns, size=3, path=model, record=tmp_path / "turns", limit=120)
    assert (tmp_path / "turns").read_text() == "001122"


def _one_fails(path: Path) -> list[str]:
    spreading.load(path / "nowhere" if world().rank == 1 else path)
    return []


def test_what_cannot_be_read_ends_all(processes: Processes, model: Path) -> None:
    with pytest.raises(ProcessFailed) as failed:
        processes.run(_one_fails, path=model)
    assert all(error is not None and "no such folder" in error for error in failed.value.errors)


def _does_not_divide(path: Path) -> list[str]:
    spreading.load(path, shard_over=3)
    return []


def test_a_part_of_the_processes_divides_them(processes: Processes, model: Path) -> None:
    with pytest.raises(ProcessFailed, match="shard_over = 3 does not divide the 2 processes"):
        processes.run(_does_not_divide, path=model)
