"""``trimtab diagnose`` on runs of each kind of critic: what it reads, writes and refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab.cli.main import run as command
from trimtab.errors import InputError
from trimtab.methods import ppo, sft
from trimtab.models.load import ModelConfig, load_model, load_scalar_model
from trimtab.models.value_head import load_value_head
from trimtab.studies.diagnose import DiagnoseConfig, diagnose, run_diagnose

Make = Callable[..., Any]
SMALL = {"limit": 3, "positions": 2, "alternatives": 1, "completions": 3}
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "trunk": {"critic__share": "trunk", "critic__lr": 0.05},
    "adapters": {"adapter__kind": "lora", "adapter__rank": 2, "critic__lr": 0.05},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> dict[str, Path]:
    """A finished run of each kind; not to be changed."""
    top = tmp_path_factory.mktemp("runs")
    for name, changed in KINDS.items():
        options = {"train__steps": 4, "ppo__reward_clip": 0.5, "ppo__beta": 0.2, **changed}
        ppo.train(tiny.configure("ppo", tiny_model, tiny_data, top / name, **options))
    return {name: top / name for name in KINDS}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_runs_own_critic_is_read(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Its value at the start of an answer is that of an ordinary forward pass over the prompt."""
    prompts = [{"path": str(tiny.write_rows(tmp_path / "one.jsonl", [{"prompt": "a b c"}]))}]
    config = {"run": str(runs[kind]), "prompts": prompts, **SMALL, "positions": 99}
    found = diagnose(DiagnoseConfig.model_validate(config))
    at_start = [row for row in found.rows if row.position == 0]
    assert len(at_start) == 2, "the sampled token and an alternative"
    where = {"dtype": "float32", "device": "cpu"}
    lm = load_model(ModelConfig.model_validate({"path": str(runs[kind] / "model"), **where}))
    ids = torch.tensor([lm.tokenizer("a b c", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        if kind == "trunk":
            head = load_value_head(runs[kind] / "critic", lm)
            value = float(head(lm.trunk(input_ids=ids, use_cache=False).last_hidden_state[0])[-1])
        else:
            critic: Any = load_scalar_model(
                ModelConfig.model_validate({"path": str(runs[kind] / "critic"), **where})
            )
            hidden = critic.trunk(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            value = float(hidden @ critic.head.weight[0])
    assert value != 0.0
    for row in at_start:
        assert row.critic_value == pytest.approx(value, abs=1e-4)


def test_the_command_writes_its_files(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "diagnose.toml"
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a b c"}, {"prompt": "d e"}])
    file.write_text(
        f'run = "{runs["own"]}"\nprompts = [{{ path = "{prompts}" }}]\nout = "{tmp_path / "out"}"\n'
    )
    arguments = ["diagnose", str(file), "--completions", "4", "--positions", "2", "--samples", "2"]
    assert command(arguments) == 0
    said = capsys.readouterr().out
    assert "Q̂ − V̂ ± se" in said
    assert "The critic's V(s) is off by" in said
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"] == len(rows) == len(summary["table"])
    assert {row["prompt"].split(":")[0] for row in rows} == {"prompts.jsonl"}
    assert summary["options"]["completions"] == 4
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    assert command(arguments) == 2
    assert "already holds something" in capsys.readouterr().err


def test_the_return_is_the_runs(runs: dict[str, Path]) -> None:
    """Rewards are held within ±0.5 as in the run, less the penalty; without the KL no return leaves that."""
    without = diagnose(DiagnoseConfig(run=str(runs["own"]), kl=False, **SMALL))
    assert all(-1.5 - 1e-9 <= row.q <= 0.5 + 1e-9 for row in without.rows)
    with_kl = diagnose(DiagnoseConfig(run=str(runs["own"]), **SMALL))
    assert [r.token for r in with_kl.rows] == [r.token for r in without.rows], "the same draws"
    assert any(abs(a.q - b.q) > 1e-4 for a, b in zip(with_kl.rows, without.rows, strict=True))


def test_what_it_refuses(runs: dict[str, Path], tmp_path: Path, configured: Make) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            run_diagnose(DiagnoseConfig(run=str(folder), out=str(tmp_path / "out"), **SMALL))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", r"^run: .*nowhere holds no finished run")
    other = sft.train(configured("sft", train__steps=1)).out
    refused(other, "is a run of sft, which has no critic")
    half = shutil.copytree(runs["trunk"], tmp_path / "half")
    shutil.rmtree(half / "critic")
    refused(half, "left no critic")
    shutil.rmtree(half / "model")
    refused(half, "did not come to its end")
    for line, by in (
        ('reward_normalise = "none"', 'reward_normalise = "rollout"'),
        ("whiten_rewards = false", "whiten_rewards = true"),
    ):
        moved = shutil.copytree(runs["trunk"], tmp_path / by.split()[0])
        text = (moved / "config.toml").read_text()
        assert line in text
        (moved / "config.toml").write_text(text.replace(line, by))
        refused(moved, "unit is another in every rollout")
    assert not (tmp_path / "out").exists()
