"""The command line itself: help, speed, the allocator, and the commands on a model."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab import __version__, methods
from trimtab.cli import launch
from trimtab.cli.main import COMMANDS, METHODS, run
from trimtab.config import dump_toml, fields
from trimtab.evaluation.eval_config import EvalConfig
from trimtab.training.metrics import read_metrics


def helped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_every_method_is_a_command() -> None:
    assert sorted(METHODS) == methods.names()


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    text = capsys.readouterr().out
    assert text == helped(["--help"], capsys)
    for name, summary in {**METHODS, **{name: summary for name, (summary, _) in COMMANDS.items()}}.items():
        assert re.search(rf"^ +{name}\s+{re.escape(summary)}$", text, re.MULTILINE), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert helped(["--version"], capsys).strip() == __version__


@pytest.mark.parametrize("name", sorted(METHODS))
def test_help_has_one_line_per_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = helped([name, "--help"], capsys).splitlines()
    for key, _, text, _ in fields(methods.find(name).Config):
        found = [line for line in lines if re.match(rf" +--{re.escape(key)} ", line)]
        assert len(found) == 1, key
        assert text in found[0], found[0]
    assert any("constant|linear|cosine" in line for line in lines), "choices are shown as they are typed"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_other_commands_have_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped([name, "--help"], capsys)
    assert COMMANDS[name][0] in text
    assert "--" in text.replace("--help", "") or name == "report"


def test_parsing_imports_nothing_heavy() -> None:
    """The list of commands, the version and a mistyped command must answer at once."""
    code = (
        "import sys\nfrom trimtab.cli.main import run\nassert run([]) == 0\nassert run(['ppoo']) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the allocator


def test_allocator_is_set_once_and_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert launch.wants_allocator({})
    assert launch.wants_allocator({"TRIMTAB_ALLOCATOR": "tuned"})
    assert not launch.wants_allocator({"TRIMTAB_ALLOCATOR": "default"})
    # The second start, or a user's own settings.
    assert not launch.wants_allocator({"GLIBC_TUNABLES": launch.TUNABLES})
    assert not launch.wants_allocator({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    monkeypatch.setattr(launch.platform, "libc_ver", lambda: ("", ""))
    assert not launch.wants_allocator({})


def test_launcher_starts_again_with_the_tunables(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], dict[str, str]]] = []

    class Replaced(BaseException):
        pass

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        started.append((path, arguments, environment))
        raise Replaced

    monkeypatch.setattr(launch.os, "execve", execve)
    monkeypatch.setattr(launch, "wants_allocator", lambda environment: True)
    monkeypatch.setattr(sys, "argv", ["trimtab", "sft", "run.toml"])
    with pytest.raises(Replaced):
        launch.main()
    [(path, arguments, environment)] = started
    assert path == sys.executable
    assert arguments[-4:] == ["-m", "trimtab.cli.main", "sft", "run.toml"]
    assert environment["GLIBC_TUNABLES"] == launch.TUNABLES

    monkeypatch.setattr(launch, "wants_allocator", lambda environment: False)
    monkeypatch.setattr(sys, "argv", ["trimtab"])
    with pytest.raises(SystemExit) as caught:
        launch.main()
    assert caught.value.code == 0


# ---------------------------------------------------------------- commands


def test_a_method_runs_with_overrides(
    configured: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dpo.toml"
    file.write_text(dump_toml(configured("dpo")))
    overrides = ["--train.steps", "2", "--run.out=2024", "--data.heldout_fraction", "0.25"]
    overrides[2] = f"--run.out={tmp_path / '2024'}"
    assert run(["dpo", str(file), *overrides]) == 0
    assert f"dpo: 2 steps, model in {tmp_path / '2024' / 'model'}" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "2024" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert "eval_accuracy_implicit_reward" in metrics[-1]


def test_ctrl_c_says_how_to_go_on(
    configured: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "sft.toml"
    file.write_text(dump_toml(configured("sft")))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(methods.find("sft"), "train", interrupted)
    assert run(["sft", str(file)]) == 130
    assert capsys.readouterr().err == "interrupted; go on with --resume auto\n"


def test_generate(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-new-tokens", "5", "--n", "2", "--seed", "3"]
    assert run(["generate", str(tiny_model), "a b", "c", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("\t")[0] for line in lines] == ["a b", "a b", "c", "c"]
    assert len(set(lines)) > 2
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\n\nc\n"))
    assert run(["generate", str(tiny_model), *options]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    greedy = ["--temperature", "0", "--max-new-tokens", "4", "--chat"]
    assert run(["generate", str(tiny_model), "a", *greedy]) == 0
    first = capsys.readouterr().out
    assert run(["generate", str(tiny_model), "a", *greedy, "--seed", "9"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n", "0"], "--n is 0"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-new-tokens", "500"], "leaves"),
        (["--n", "two"], "invalid int value"),
    ],
)
def test_generate_refuses(
    extra: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(tiny_model), "a", *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def eval_file(folder: Path, model: Path, data: Path, **more: Any) -> Path:
    values = {
        "model": {"path": str(model)},
        "prompts": [{"path": str(data / "prompts.jsonl")}],
        "pairs": [{"path": str(data / "pairs.jsonl")}],
        "reward": {"terms": [{"name": f"{data / 'rewards.py'}:score"}]},
        "sampling": {"max_new_tokens": 5},
        "samples": 3,
        "out": str(folder / "eval.json"),
        **more,
    }
    file = folder / "eval.toml"
    file.write_text(dump_toml(EvalConfig.model_validate(values)))
    return file


def test_eval(tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = eval_file(tmp_path, tiny_model, tiny_data, reference=str(tiny_model))
    assert run(["eval", str(file)]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    printed = capsys.readouterr().out
    assert printed.startswith(found["verdict"]["sentence"])
    assert (tmp_path / "report.html").exists()
    assert found["drift"]["kl_per_token"] == pytest.approx(0.0, abs=1e-9)
    assert found["reward"]["ci95"][0] < found["reward"]["mean"] < found["reward"]["ci95"][1]
    assert found["preference"]["pairs"] == 8
    assert found["preference"]["implicit_reward"] == 0.5  # the model against itself
    other = tiny.save_model(tmp_path / "other", seed=5)
    assert run(["eval", str(file), "--reference", str(other), "--samples", "1"]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["drift"]["kl_per_token"] > 0.01


def test_eval_refuses(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = eval_file(tmp_path, tiny_model, tiny_data)
    for extra, message in (
        (["--out", str(tmp_path / "no" / "eval.json")], "no such folder to write eval.json in"),
        (["--prompts", "[]", "--pairs", "[]"], "nothing to evaluate on"),
    ):
        assert run(["eval", str(file), *extra]) == 2
        assert message in capsys.readouterr().err


def test_eval_runs_a_model_in_the_layout_that_it_allows(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not honour the tree mask: measured in the tree, its numbers would be wrong."""
    from trimtab.batch import TreeBatch

    bare: dict[str, Any] = {"samples": 1, "sampling": {}}

    def pairs_only(**more: Any) -> dict[str, Any]:
        file = eval_file(tmp_path, tiny_model, tiny_data, prompts=[], reward=None, **bare, **more)
        assert run(["eval", str(file)]) == 0
        return json.loads((tmp_path / "eval.json").read_text())["preference"]

    # The packed layout has no mask to spoil: an attention that it does not know leaves it aside.
    monkeypatch.setattr("trimtab.models.layout.attention_kernel", lambda lm: "another")
    truth = pairs_only()
    original = TreeBatch.attention_mask_BLL
    monkeypatch.setattr(
        TreeBatch, "attention_mask_BLL", lambda self, window=None: original(self).tril() | True
    )
    used: list[bool] = []
    from trimtab.spread import deal

    collate = deal.collate

    def watched(*args: Any, **keywords: Any) -> TreeBatch:
        batch = collate(*args, **keywords)
        used.append(batch.branching)
        return batch

    monkeypatch.setattr(deal, "collate", watched)
    assert pairs_only() == truth
    assert used == [False]
