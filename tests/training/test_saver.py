"""When checkpoints are written, and what a run makes of those that it finds."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import assert_same_run, stop_at
from training_states import advance, everything, group, new

from trimtab import methods
from trimtab.cli.main import run as command
from trimtab.config import dump_toml, load_config
from trimtab.errors import InputError
from trimtab.models.load import load_model
from trimtab.training import saver as saver_module
from trimtab.training.checkpoint import checkpoints, verify
from trimtab.training.config import RunConfig, TrainConfig
from trimtab.training.memory import available_bytes
from trimtab.training.metrics import read_metrics
from trimtab.training.run import Run
from trimtab.training.saver import Saver

Make = Callable[..., Any]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until this is set."""
    event, own = threading.Event(), saver_module.write

    def write(*arguments: Any) -> Path:
        assert event.wait(20)
        return own(*arguments)

    monkeypatch.setattr(saver_module, "write", write)
    return event


def full(*_: object) -> Path:
    raise OSError(errno.ENOSPC, "No space left on device")


def saver(folder: Path, said: list[str] | None = None, **options: Any) -> Saver:
    return Saver(folder, TrainConfig(save_every=1, **options), [].append if said is None else said.append)


# ---------------------------------------------------------------- in the background


def test_training_goes_on_while_the_moment_is_saved(tmp_path: Path, gate: threading.Event) -> None:
    """Byte for byte what is written when training waits, whatever changes in place meanwhile."""
    model, state = new()
    advance(model, state)
    state.pending, state.ahead, state.controllers = [group()], [group("c")], {"beta": 0.1}
    state.extra = {"reference.weight": torch.ones(3)}
    truth = everything(state)
    at_once, behind = saver(tmp_path / "at once"), saver(tmp_path / "behind")
    gate.set()
    at_once.note(1, {"loss": 2.0})
    at_once.save(state, wait=True)
    gate.clear()
    logged: dict[str, Any] = {"loss": 2.0}
    behind.note(1, logged)
    behind.save(state, wait=False)
    logged["loss"] = 7.0
    advance(model, state)
    state.pending[0].responses[0].text = "changed"
    state.ahead.clear()
    state.controllers["beta"] = 9.0
    state.extra["reference.weight"].zero_()
    assert checkpoints(tmp_path / "behind") == []
    gate.set()
    behind.close()
    first, second = (tmp_path / name / "step-00000001" for name in ("at once", "behind"))
    for file in ("tensors.safetensors", "state.json", "checksums.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    _, again = new(seed=9)
    again.restore(second)
    assert everything(again) == truth


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, running, most = saver_module.write, [0], [0]
    release = threading.Event()

    def write(*arguments: Any) -> Path:
        running[0] += 1
        most[0] = max(most[0], running[0])
        release.wait(0.05)
        try:
            return own(*arguments)
        finally:
            running[0] -= 1

    monkeypatch.setattr(saver_module, "write", write)
    model, state = new()
    made = saver(tmp_path)
    for wait in (False, False, True, False):
        advance(model, state)
        made.save(state, wait=wait)
        made.save(state, wait=wait)  # the same step: nothing to do
    assert [p.name for p in checkpoints(tmp_path)][-1] != "step-00000001"
    made.close()
    made.close()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert most == [1]
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


@pytest.mark.parametrize("free", [None, 100])
def test_without_memory_for_a_copy_training_waits(
    free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "available_bytes", lambda: free)
    model, state = new()
    said: list[str] = []
    made = saver(tmp_path, said)
    for step in (1, 2):
        advance(model, state)
        made.save(state, wait=False)
        assert [p.name for p in checkpoints(tmp_path)][-1] == f"step-{step:08d}"
    assert made._thread is None
    assert len(said) == 1
    assert "training waits while checkpoints are written" in said[0]
    assert said[0].endswith("memory, and what is free is not known" if free is None else "0 MiB is free")


def test_without_leave_or_under_a_limit_of_the_process_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = new()
    said: list[str] = []
    made = saver(tmp_path / "off", said, save_in_background=False)
    made.save(state, wait=False)
    assert (made._thread, said) == (None, [])

    def copied(self: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("trimtab.training.checkpoint.Snapshot.copied", copied)
    made = saver(tmp_path / "limit", said)
    made.save(state, wait=False)
    assert made._thread is None
    assert len(said) == 1
    for name in ("off", "limit"):
        verify(tmp_path / name / "step-00000000")


def test_free_memory_is_that_of_the_container_too(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_bytes(tmp_path) is None
    put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    put("proc/self/cgroup", "5:cpu:/box\n4:memory:/box\n0::/box\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    put("sys/fs/cgroup/memory.max", "max\n")
    put("sys/fs/cgroup/memory.current", "77\n")
    put("sys/fs/cgroup/memory.stat", "inactive_file 5\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    for name, text in (("max", "5000"), ("current", "3000"), ("stat", "anon 1\ninactive_file 400\n")):
        put(f"sys/fs/cgroup/box/memory.{name}", text)
    assert available_bytes(tmp_path) == 2400
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "200"), ("stat", "rss 1\n")):
        put(f"sys/fs/cgroup/memory/box/memory.{name}", text)
    assert available_bytes(tmp_path) == 700


# ---------------------------------------------------------------- a save that fails


def begun(config: Any) -> Run:
    run = Run("sft", config, config.run, config.train)
    run.new_state(load_model(config.model))
    run.start(6, 0)
    return run


@pytest.mark.parametrize("where", ["log", "checkpoint", "finish", "exit"])
def test_what_fails_in_the_background_ends_the_run_at_its_next_call(
    where: str, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("sft", train__save_every=1)
    model, state = new()

    def train() -> None:
        with begun(config) as run:
            advance(model, state)
            run.checkpoint(state, wait=True)
            monkeypatch.setattr(saver_module, "write", full)
            advance(model, state)
            run.checkpoint(state)
            if where == "log":
                for _ in range(2000):  # as soon as it is known
                    run.log(state, {"loss": 1.0})
                    time.sleep(0.005)
            elif where == "checkpoint":
                advance(model, state)
                run.checkpoint(state)
            elif where == "finish":
                run.finish(None, state, {})  # type: ignore[arg-type]

    with pytest.raises(InputError, match=r"cannot save step 2: No space left on device .* are kept"):
        train()
    assert [p.name for p in checkpoints(Path(config.run.out) / "checkpoints")] == ["step-00000001"]


def test_a_failed_save_does_not_hide_what_ended_the_run(
    configured: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saver_module, "write", full)
    with pytest.raises(ZeroDivisionError):
        save_and_raise(configured("sft", train__save_every=1), ZeroDivisionError)
    assert "cannot save step 0: No space left on device" in capsys.readouterr().err


def test_leaving_a_run_finishes_the_save_under_way(configured: Make, gate: threading.Event) -> None:
    threading.Timer(0.1, gate.set).start()
    config = configured("sft", train__save_every=1)
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(config, KeyboardInterrupt)
    verify(Path(config.run.out) / "checkpoints/step-00000000")


def save_and_raise(config: Any, error: type[BaseException]) -> None:
    with begun(config) as run:
        run.checkpoint(new()[1])
        raise error


def test_a_log_that_cannot_be_written_is_one_line(configured: Make) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no device that is always full")

    def train() -> None:
        with begun(configured("sft")) as run:
            assert run._log is not None
            run._log._file.close()
            run._log._file = Path("/dev/full").open("w")  # noqa: SIM115
            run.log(new()[1], {"loss": 1.0})

    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot write: No space left on device"):
        train()


# ---------------------------------------------------------------- which stay


def test_the_best_and_every_nth_stay(tmp_path: Path) -> None:
    model, state = new()
    losses = [5.0, 2.0, 3.0, 1.0, None, float("nan"), 4.0, 4.0, 4.0]

    def sitting(steps: list[float | None]) -> None:
        made = saver(tmp_path, keep_checkpoints=1, keep_every=3, keep_best="-loss")
        made.choose()
        for loss in steps:
            advance(model, state)
            made.note(state.step, {"other": 1.0} if loss is None else {"loss": loss, "other": 0.0})
            made.save(state, wait=False)
        made.close()

    sitting(losses[:4])
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["3", "4"]
    sitting(losses[4:])  # another sitting finds in the checkpoints what was best
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["3", "4", "6", "9"]


def test_a_metric_that_nobody_logs_is_one_line_and_the_step_is_saved(tmp_path: Path) -> None:
    model, state = new()
    made = saver(tmp_path, keep_best="-los")
    advance(model, state)
    made.note(0, {"eval_loss": 2.0})
    made.note(1, {"loss": 1.0})
    with pytest.raises(InputError, match=r"train\.keep_best: no metric is called 'los'; .* eval_loss, loss$"):
        made.save(state, wait=False)
    verify(tmp_path / "step-00000001")


def test_a_damaged_checkpoint_is_left_alone_and_counts_for_nothing(tmp_path: Path) -> None:
    model, state = new()
    made = saver(tmp_path, keep_checkpoints=2)
    for _ in range(3):
        advance(model, state)
        made.save(state, wait=True)
    (tmp_path / "step-00000003/state.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    made = saver(tmp_path, keep_checkpoints=2)
    made.choose()
    assert made.taken is not None
    assert made.taken.name == "step-00000002"
    _, state = new(seed=5)
    state.restore(made.taken)
    made.save(state, wait=True)  # gone on from: not written again
    for _ in range(2):
        advance(model, state)
        made.save(state, wait=True)
        # The newest two of the whole ones, not the newest by their names.
        names = [p.name for p in checkpoints(tmp_path)]
        assert names == [f"step-{state.step - 1:08d}", f"step-{state.step:08d}", "step-00000009"]
        for name in names[:2]:
            verify(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_every": 10}, "keep_every must be a multiple of save_every"),
        ({"keep_every": 10, "save_every": 4}, "keep_every must be a multiple of save_every"),
        ({"keep_best": "loss"}, "keep_best has no effect without save_every"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_config(TrainConfig, None, options)


# ---------------------------------------------------------------- going on


@pytest.fixture
def stopped(configured: Make) -> tuple[Path, Path]:
    """Two runs of six steps: one straight through, one stopped behind the checkpoints of steps 2 and 4."""
    straight = methods.find("sft").train(configured("sft", out="straight", train__save_every=2))
    config = configured("sft", out="stopped", train__save_every=2, train__eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        methods.find("sft").train(config, on_eval=stop_at(6))
    out = Path(config.run.out)
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-00000002", "step-00000004"]
    return straight.out, out


def test_a_run_with_a_damaged_checkpoint_is_the_run_that_never_stopped(
    stopped: tuple[Path, Path], configured: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, out = stopped
    for file in ("tensors.safetensors", "state.json", "checksums.json"):
        copy = out.parent / f"copy-{file}"
        shutil.copytree(out, copy)
        spoilt = copy / "checkpoints/step-00000004" / file
        whole = bytearray(spoilt.read_bytes())
        whole[len(whole) // 2] ^= 4
        spoilt.write_bytes(whole)
        methods.find("sft").train(
            configured("sft", out=copy.name, run__resume=True, train__save_every=2, train__eval_every=1)
        )
        said = capsys.readouterr().err
        assert f"step-00000004 is damaged ({file}: checksum)" in said
        assert "going on from step-00000002" in said
        assert_same_run(straight, copy)
        for step in (4, 6):
            verify(copy / f"checkpoints/step-{step:08d}")


def test_the_choices_come_from_the_checkpoint_that_is_taken(
    stopped: tuple[Path, Path], configured: Make
) -> None:
    """The damaged one says another dtype; the older one's holds."""
    straight, out = stopped
    file = out / "checkpoints/step-00000004/state.json"
    text = file.read_text()
    assert '"dtype": "float32"' in text
    file.write_text(text.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    options = {"model__dtype": "auto", "train__save_every": 2}
    methods.find("sft").train(configured("sft", out="stopped", run__resume=True, **options))
    assert_same_run(straight, out)


def test_nothing_whole_ends_the_run_and_deletes_nothing(stopped: tuple[Path, Path], configured: Make) -> None:
    _, out = stopped
    for checkpoint in checkpoints(out / "checkpoints"):
        (checkpoint / "tensors.safetensors").write_bytes(b"")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    config = configured("sft", out="stopped", run__resume=True, train__save_every=2)
    with pytest.raises(InputError, match=r"step-00000004 \(tensors\.safetensors: 0 of [\d,]+ bytes\), step-"):
        methods.find("sft").train(config)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    # What the line advises works.
    shutil.rmtree(out / "checkpoints")
    methods.find("sft").train(config)
    assert [m["step"] for m in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_a_lost_configuration_are_a_run_too(
    stopped: tuple[Path, Path], configured: Make
) -> None:
    """Beside them a new run's own would count as the oldest and be deleted."""
    straight, out = stopped
    (out / "config.toml").unlink()
    with pytest.raises(InputError, match="already holds a run"):
        methods.find("sft").train(configured("sft", out="stopped", train__save_every=2))
    methods.find("sft").train(configured("sft", out="stopped", train__save_every=2, run__resume=True))
    assert_same_run(straight, out)


def test_resume_auto_begins_goes_on_and_does_nothing(
    configured: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sft.toml"
    file.write_text(dump_toml(configured("sft", out="auto", train__save_every=2, train__steps=2)))
    words = ["sft", str(file), "--resume", "auto"]
    assert command(words) == 0
    assert "going on" not in capsys.readouterr().err
    assert command([*words, "--train.steps", "4"]) == 0
    assert "going on from step-00000002" in capsys.readouterr().err
    assert command(["sft", str(file), "--train.steps=4", "--run.resume=auto"]) == 0
    assert [m["step"] for m in read_metrics(tmp_path / "auto/metrics.jsonl")] == [1, 2, 3, 4]
    assert command(["sft", str(file), "--resume", "perhaps"]) == 2
    said = capsys.readouterr().err
    assert "run.resume: takes true, false or \"auto\" (got 'perhaps')" in said


def test_auto_is_a_word_in_a_file_too(tmp_path: Path) -> None:
    for text, resume in (('"auto"', True), ("true", True), ("false", False)):
        (tmp_path / "run.toml").write_text(f"resume = {text}\n")
        config = load_config(RunConfig, tmp_path / "run.toml")
        assert config.resume is resume
        assert f"resume = {str(resume).lower()}" in dump_toml(config)


def test_a_halved_micro_batch_stays_halved_unless_the_option_changes(
    configured: Make, tiny_model: Path
) -> None:
    def state(tokens: int, resume: bool) -> Any:
        config = configured("sft", run__resume=resume, train__micro_batch_tokens=tokens, train__save_every=1)
        with Run("sft", config, config.run, config.train) as run:
            state = run.resume(run.new_state(load_model(config.model)))
            run.start(6, state.step)
            if not resume:
                assert state.micro_batch_tokens == tokens
                state.micro_batch_tokens //= 4
                run.checkpoint(state)
            return state

    state(64, resume=False)
    assert state(64, resume=True).micro_batch_tokens == 16
    assert state(48, resume=True).micro_batch_tokens == 48
    saved = json.loads((Path(configured("sft").run.out) / "checkpoints/step-00000000/state.json").read_text())
    assert saved["environment"]["micro_batch_tokens"] == 16


def test_a_checkpoint_knows_its_steps_metrics(stopped: tuple[Path, Path]) -> None:
    _, out = stopped
    logged = {m.pop("step"): m for m in read_metrics(out / "metrics.jsonl")}
    for step in (2, 4):
        recorded = verify(out / f"checkpoints/step-{step:08d}")["metrics"]
        assert recorded == logged[step]
        assert recorded["loss"] > 0
    assert tiny.saved_state(out, 4)["position"] == 16
