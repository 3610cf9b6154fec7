"""Bad input, as a user meets it: one line on stderr, exit code 2, nothing of an earlier run lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab.cli.main import run
from trimtab.config import dump_toml
from trimtab.training.metrics import read_metrics

Fails = Callable[..., str]


@pytest.fixture
def config_file(configured: Callable[..., Any], tmp_path: Path) -> Callable[..., list[str]]:
    """``config_file("sft", …)``: the arguments of a run whose configuration is written to a file."""

    def make(name: str, **changed: Any) -> list[str]:
        file = tmp_path / f"{name}.toml"
        file.write_text(dump_toml(configured(name, **{"train__steps": 2, **changed})), encoding="utf-8")
        return [name, str(file)]

    return make


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command, which must end in one line and exit code 2; returns the line."""

    def check(arguments: list[str]) -> str:
        capsys.readouterr()
        code = run(arguments)
        errors = capsys.readouterr().err
        # Lines of progress and of what was decided may come before it; the error is the last, and alone.
        lines = errors.splitlines()
        assert code == 2, errors
        assert lines, "nothing was said"
        assert [line for line in lines if line.startswith("error:")] == lines[-1:], errors
        assert "Traceback" not in errors
        assert all(line.startswith(("error:", "sft", "dpo", "grpo")) for line in lines), errors
        return lines[-1]

    return check


def rows(folder: Path, *lines: object) -> list[dict[str, str]]:
    """A source of these rows; text is written as it stands."""
    path = folder / "bad.jsonl"
    if all(isinstance(line, dict) for line in lines):
        tiny.write_rows(path, lines)  # type: ignore[arg-type]
    else:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [{"path": str(path)}]


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("dpo", (GOOD, '{"prompt": "a", "chosen": '), "bad.jsonl:2"),
        ("dpo", (), "no rows in"),
        ("dpo", ('{"prompt": "a", "chosen": "b"}',), "column `rejected` is missing"),
        ("dpo", (GOOD, '{"prompt": "a", "chosen": "b", "rejected": "b"}'), "identical"),
        ("dpo", ('{"prompt": "a", "chosen": "  ", "rejected": "b"}',), "empty"),
        ("sft", ('{"prompt": "a", "completion": ""}',), "the response in `completion` is empty"),
        ("sft", ('{"question": "a"}',), "no format has these columns (question)"),
        ("sft", ('["a"]',), "not an object"),
        ("grpo", ('{"prompt": " "}',), "`prompt` is empty"),
    ],
)
def test_bad_rows(
    name: str, lines: tuple[str, ...], message: str, config_file: Any, fails: Fails, tmp_path: Path
) -> None:
    said = fails(config_file(name, data__sources=rows(tmp_path, *lines)))
    assert message in said
    assert "bad.jsonl" in said
    # The file was mended: the same command now runs, in the same folder.
    tiny.write_rows(tmp_path / "bad.jsonl", tiny.demonstrations() if name == "sft" else tiny.pairs())
    assert run(config_file(name, data__sources=[{"path": str(tmp_path / "bad.jsonl")}])) == 0


def test_missing_data_file(config_file: Any, fails: Fails, tmp_path: Path) -> None:
    said = fails(config_file("sft", data__sources=[{"path": str(tmp_path / "nowhere.jsonl")}]))
    assert "nowhere.jsonl" in said


def test_no_sources(config_file: Any, fails: Fails) -> None:
    assert "data.sources is empty" in fails(config_file("sft", data__sources=[]))


LONG = " ".join(["a"] * (tiny.CONTEXT + 5))


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_prompt_over_the_context(name: str, config_file: Any, fails: Fails, tmp_path: Path) -> None:
    good = tiny.demonstrations() if name == "sft" else tiny.pairs()
    long = {**good[0], "prompt": LONG}
    sources = rows(tmp_path, long, *good)
    said = fails(config_file(name, data__sources=sources))
    assert "bad.jsonl:0" in said
    assert f"a prompt of {tiny.CONTEXT + 5} tokens exceeds" in said

    assert (
        run(config_file(name, data__sources=sources, data__on_long="skip", run__out=str(tmp_path / "s"))) == 0
    )
    lines = (tmp_path / "s" / "lineage.json").read_text()
    assert "1 skipped (prompt too long)" in lines
    cut = {"data__on_long": "truncate", "run__out": str(tmp_path / "t"), "data__max_prompt_tokens": 20}
    assert run(config_file(name, data__sources=sources, **cut)) == 0
    assert read_metrics(tmp_path / "t" / "metrics.jsonl")[-1]["step"] == 2


def test_no_row_is_left(config_file: Any, fails: Fails, tmp_path: Path) -> None:
    sources = rows(tmp_path, {"prompt": LONG, "completion": "a"})
    assert "no group is left" in fails(config_file("sft", data__sources=sources, data__on_long="skip"))


def test_no_room_for_a_prompt(config_file: Any, fails: Fails) -> None:
    said = fails(config_file("grpo", sampling__max_new_tokens=tiny.CONTEXT))
    assert "leave no room for a prompt" in said
    assert "sampling.max_new_tokens" in said


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('answer')", "KeyError: 'answer'"),
        ("return float('nan')", "returned nan: return a finite number"),
        ("return None", "returned None, not a number"),
        ("return 'high'", "not a number"),
    ],
)
def test_reward_that_fails(body: str, message: str, config_file: Any, fails: Fails, tmp_path: Path) -> None:
    name = tiny.write_reward(tmp_path / "bad_reward.py", body)
    said = fails(config_file("grpo", reward__terms=[{"name": name}]))
    assert message in said
    assert "'score' on prompts.jsonl:" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:score", "there is no file nowhere.py"),
        ("no_such_package.module:score", "no module"),
        ("json:scoer", "json has no 'scoer'"),
        ("numerik", "did you mean 'numeric'"),
    ],
)
def test_reward_that_does_not_exist(name: str, message: str, config_file: Any, fails: Fails) -> None:
    assert message in fails(config_file("grpo", reward__terms=[{"name": name}]))


# ---------------------------------------------------------------- training that goes wrong


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_diverging_run_keeps_its_checkpoints(
    name: str, config_file: Any, fails: Fails, tmp_path: Path
) -> None:
    arguments = config_file(name, train__steps=8, train__lr=1e30, train__grad_clip=0.0, train__save_every=1)
    said = fails(arguments)
    assert "run.resume" in said
    assert "nan" in said or "inf" in said
    assert list((tmp_path / name / "checkpoints").glob("step-*"))
    assert not (tmp_path / name / "model").exists()


def test_a_folder_that_holds_a_run_is_left_alone(config_file: Any, fails: Fails, tmp_path: Path) -> None:
    arguments = config_file("sft")
    assert run(arguments) == 0
    files = [p for p in sorted((tmp_path / "sft").rglob("*")) if p.is_file()]
    before = [p.read_bytes() for p in files]
    said = fails([*arguments, "--train.lr", "0.5"])
    assert "already holds a run" in said
    assert "--resume auto" in said
    # What another method goes on with is its own.
    said = fails([*config_file("dpo"), "--run.out", str(tmp_path / "sft"), "--resume", "auto"])
    assert "holds a run of sft, with which dpo cannot go on" in said
    assert [p.read_bytes() for p in files] == before


def test_output_folder_that_cannot_be_written(config_file: Any, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = fails([*config_file("sft"), "--run.out", str(tmp_path / "file" / "run")])
    assert "cannot write the run directory" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(config_file: Any, fails: Fails, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "Permission denied" in fails([*config_file("sft"), "--run.out", str(locked / "run")])


def test_disk_that_fills_up(
    config_file: Any, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.training import checkpoint

    original = checkpoint.write_synced
    saved: list[Path] = []

    def full(path: Path, parts: Any) -> tuple[int, str]:
        saved.append(path)
        if [p.name for p in saved].count("tensors.safetensors") == 2:
            raise OSError(28, "No space left on device")
        return original(path, parts)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    said = fails(config_file("sft", train__steps=4, train__save_every=1))
    assert "cannot save step 2: No space left on device" in said
    assert [p.name for p in (tmp_path / "sft" / "checkpoints").glob("step-*")] == ["step-00000001"]


# ---------------------------------------------------------------- models


def test_model_folders(config_file: Any, fails: Fails, tmp_path: Path, tiny_model: Path) -> None:
    assert "no such folder" in fails([*config_file("sft"), "--model.path", str(tmp_path / "nowhere")])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in fails([*config_file("sft"), "--model.path", str(empty)])
    (empty / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (empty / "pytorch_model.bin").write_bytes(b"pickle")
    said = fails([*config_file("sft"), "--model.path", str(empty)])
    assert "no .safetensors file" in said
    (empty / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:64])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (empty / name).write_bytes((tiny_model / name).read_bytes())
    assert "model.path: cannot load" in fails([*config_file("sft"), "--model.path", str(empty)])
    said = fails([*config_file("sft"), "--model.chat_template", str(tmp_path / "no.jinja")])
    assert "no.jinja: no such file" in said


# ---------------------------------------------------------------- configuration and command line


def test_unknown_key_and_wrong_type_in_the_file(config_file: Any, fails: Fails) -> None:
    arguments = config_file("sft")
    file = Path(arguments[1])
    file.write_text(file.read_text() + "\n[sfft]\nloss_on = 1\n")
    line = file.read_text().splitlines().index("[sfft]") + 1
    assert f"{file}:{line}: unknown key 'sfft'; did you mean 'sft'" in fails(arguments)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train.lr", "abc"], "--train.lr: train.lr: "),
        (["--train.steps", "-1"], "--train.steps: train.steps: "),
        (["--train.step", "5"], "--train.step: unknown key 'train.step'; did you mean 'train.steps'"),
        (["--train.schedule=step"], "'constant', 'linear' or 'cosine'"),
        (["--train.lr"], "expected one argument"),
        (["--stages.x"], "--stages.x needs a value"),
        (["--stages.x", "--train.steps=1", "--stages.y", "2"], "--stages.x needs a value"),
        (["--stages.x", "--stages.y", "2"], "--stages.x needs a value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--nonsense.key", "1"], "--nonsense.key: unknown key 'nonsense'"),
    ],
)
def test_options(extra: list[str], message: str, config_file: Any, fails: Fails) -> None:
    assert message in fails([*config_file("sft"), *extra])


def test_commands(fails: Fails, tmp_path: Path) -> None:
    assert "CONFIG.toml" in fails(["sft"])
    assert "nowhere.toml: no such configuration file" in fails(["sft", str(tmp_path / "nowhere.toml")])
    said = fails(["ppoo"])
    assert "ppoo" in said
    assert "grpo" in said
    assert "neither eval.json nor audit.json here" in fails(["report", str(tmp_path)])
    assert "no such folder" in fails(["generate", str(tmp_path / "nowhere"), "a"])
    assert "required" in fails(["report"])
