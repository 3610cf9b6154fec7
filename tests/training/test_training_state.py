"""Checkpoints: whole or not there at all, and what resuming makes of damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.training import state as state_module
from trimtab.training.config import TrainConfig
from trimtab.training.metrics import MetricsLog, read_metrics
from trimtab.training.optimiser import Optimiser
from trimtab.training.state import State, checkpoints, saved_environment


def new(seed: int = 0, dtype: torch.dtype = torch.bfloat16, width: int = 3) -> tuple[nn.Module, State]:
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    return model, State(Optimiser(model, TrainConfig(grad_clip=0.0), dtype))


def advance(model: nn.Module, state: State) -> None:
    inputs = torch.randn(4, 3, dtype=next(model.parameters()).dtype)
    state.optimiser.backward(model(inputs).float().square().mean(), state.step)
    state.optimiser.step(0.01, state.step)
    state.step += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model, state = new(dtype=dtype)
    advance(model, state)
    state.position, state.seconds, state.controllers = 7, 1.5, {"cursor": 2}
    state.extra = {"reference.weight": torch.arange(3, dtype=torch.bfloat16)}
    response = Response(
        text="b", tokens=[3, 2], old_logps=[-0.1, -1 / 3], reward=1.0, reward_terms={"x": 1.0}
    )
    state.pending = [Group(id="f:0", prompt="a", prompt_tokens=[5], responses=[response], columns={"n": [1]})]
    state.environment = {"threads": 3, "dtype": "bfloat16"}
    saved = state.save(tmp_path, keep=2)
    assert saved.name == "step-00000001"
    noise = torch.rand(3)
    advance(model, state)

    other, again = new(seed=9, dtype=dtype)
    again.restore(saved)
    assert torch.equal(torch.rand(3), noise), "the generator did not come back"
    assert (again.step, again.position, again.seconds) == (1, 7, 1.5)
    assert again.controllers == {"cursor": 2}
    assert again.pending == [
        Group(id="f:0", prompt="a", prompt_tokens=[5], responses=[response], columns={"n": [1]})
    ]
    assert again.extra["reference.weight"].dtype == torch.bfloat16
    assert saved_environment(tmp_path) == {"threads": 3, "dtype": "bfloat16"}
    # Moments too: the next update from here is the update that the first run made.
    again.restore(saved)
    torch.rand(3)
    advance(other, again)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in state.optimiser.tensors().items():
        assert torch.equal(tensor, again.optimiser.tensors()[name]), name


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    model, state = new()
    for _ in range(5):
        advance(model, state)
        state.save(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_kill_between_writing_and_renaming_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = new()
    advance(model, state)
    state.save(tmp_path, keep=1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    advance(model, state)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> Path:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            state.save(tmp_path, keep=1)
    assert (tmp_path / ".step-00000002.partial" / "state.json").is_file()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000001"]
    other, again = new(seed=9)
    again.restore(checkpoints(tmp_path)[-1])
    assert again.step == 1
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, weights[name])

    # The next attempt clears what was left over.
    (tmp_path / ".step-00000002.partial" / "stale").write_text("x")
    state.save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    assert not (tmp_path / "step-00000002" / "stale").exists()


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sync a power cut may leave the new name with empty files behind it."""
    order: list[str] = []
    sync, rename = state_module._sync, Path.rename

    def traced_sync(path: Path) -> None:
        order.append(f"sync {path.name}")
        sync(path)

    def traced_rename(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr(state_module, "_sync", traced_sync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    new()[1].save(tmp_path / "checkpoints", keep=1)
    assert sorted(order[:2]) == ["sync state.json", "sync tensors.safetensors"]
    assert order[2:] == ["rename", "sync checkpoints"]


def damage_text(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1, "step": 1')


def damage_keys(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1}')


def damage_list(folder: Path) -> None:
    (folder / "state.json").write_text("[]")


def damage_tensors(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def lose_tensors(folder: Path) -> None:
    (folder / "tensors.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_text, damage_keys, damage_list, damage_tensors, lose_tensors])
def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path: Path, damage: Any) -> None:
    model, state = new()
    advance(model, state)
    saved = state.save(tmp_path, keep=1)
    damage(saved)
    with pytest.raises(InputError, match=r"step-00000001: damaged checkpoint \(.*remove it"):
        new()[1].restore(saved)
    if damage not in (damage_tensors, lose_tensors):
        with pytest.raises(InputError, match="damaged checkpoint"):
            saved_environment(tmp_path)


def test_a_checkpoint_of_another_model_or_format_is_refused(tmp_path: Path) -> None:
    model, state = new()
    advance(model, state)
    saved = state.save(tmp_path, keep=1)
    with pytest.raises(InputError, match="does not fit the model: weight 'weight'"):
        new(width=5)[1].restore(saved)
    plain = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(plain | {"format": 99}))
    with pytest.raises(InputError, match="format 99 is not the 1"):
        new()[1].restore(saved)


def test_a_folder_without_its_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    assert checkpoints(tmp_path) == []
    assert saved_environment(tmp_path) == {}
    shutil.rmtree(tmp_path / "step-00000003")
    assert checkpoints(tmp_path / "nowhere") == []


# ---------------------------------------------------------------- metrics.jsonl


def test_metrics_after_the_checkpoint_are_dropped_and_half_a_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 5, "sft")
    for step in range(5):
        log.write(step, {"loss": 1.0 / (step + 1)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [m["step"] for m in read_metrics(path)] == [0, 1, 2, 3, 4]

    log = MetricsLog(path, 5, "sft", from_step=3)
    log.write(4, {"loss": 9.0})
    log.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [
        (0, 1.0),
        (1, 0.5),
        (2, 1 / 3),
        (3, 0.25),
        (4, 9.0),
    ]


def test_a_run_that_starts_over_logs_its_first_evaluation_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log = MetricsLog(path, 5, "sft", from_step=0)
        log.write(0, {"eval_loss": 1.0})
        log.write(1, {"loss": 1.0})
        log.close()
    assert [m["step"] for m in read_metrics(path)] == [0, 1]
