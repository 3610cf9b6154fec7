"""What a checkpoint brings back, and the log that goes with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from training_states import advance, group, new

from trimtab.errors import InputError
from trimtab.training.checkpoint import write
from trimtab.training.metrics import MetricsLog, read_metrics
from trimtab.training.state import saved_environment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model, state = new(dtype=dtype)
    advance(model, state)
    state.position, state.tokens, state.seconds, state.controllers = 7, 11, 1.5, {"cursor": 2}
    state.extra = {"reference.weight": torch.arange(3, dtype=torch.bfloat16)}
    state.pending, state.ahead = [group()], [group("c")]
    state.environment = {"threads": 3, "dtype": "bfloat16"}
    saved = write(tmp_path, state.snapshot({}))
    assert saved.name == "step-00000001"
    noise = torch.rand(3)
    advance(model, state)

    other, again = new(seed=9, dtype=dtype)
    again.restore(saved)
    assert torch.equal(torch.rand(3), noise), "the generator did not come back"
    assert (again.step, again.position, again.tokens, again.seconds) == (1, 7, 11, 1.5)
    assert again.controllers == {"cursor": 2}
    assert (again.pending, again.ahead) == ([group()], [group("c")])
    assert again.extra["reference.weight"].dtype == torch.bfloat16
    assert saved_environment(saved) == {"threads": 3, "dtype": "bfloat16"}
    # Moments too: the next update from here is the update that the first run made.
    again.restore(saved)
    torch.rand(3)
    advance(other, again)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in state.optimiser.tensors().items():
        assert torch.equal(tensor, again.optimiser.tensors()[name]), name


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    model, state = new()
    advance(model, state)
    saved = write(tmp_path, state.snapshot({}))
    with pytest.raises(InputError, match="does not fit the model: weight 'weight'"):
        new(width=5)[1].restore(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"pending": 3}'])
def test_a_checkpoint_that_vanishes_or_makes_no_sense_is_one_line(tmp_path: Path, text: str) -> None:
    """Checked as it is before, this takes a program's fault or a race: still no traceback."""
    model, state = new()
    advance(model, state)
    saved = write(tmp_path, state.snapshot({}))
    (saved / "state.json").write_text(text)
    for read in (new()[1].restore, saved_environment):
        with pytest.raises(InputError, match=r"step-00000001: damaged checkpoint \(.*remove it"):
            read(saved)
    (saved / "state.json").unlink()
    (saved / "tensors.safetensors").unlink()
    with pytest.raises(InputError, match="damaged checkpoint"):
        new()[1].restore(saved)


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


def test_damaged_lines_are_dropped_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 1.0}', b'{"step": 2, "loss": 0.5}']
    path.write_bytes(
        b"\n".join([good[0], b"\xff\xfe\x00", b"[" * 100_000, b"7", b'{"step": "x"}', good[1], b'{"st'])
    )
    MetricsLog(path, 5, "sft", from_step=2).close()
    assert path.read_bytes().splitlines() == good
    assert "4 damaged lines are dropped" in capsys.readouterr().err
    MetricsLog(path, 5, "sft", from_step=2).close()
    assert "damaged" not in capsys.readouterr().err


def test_a_kill_while_the_log_is_cut_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, interrupt)
            with pytest.raises(KeyboardInterrupt):
                MetricsLog(path, 5, "sft", from_step=1)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n', call


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
