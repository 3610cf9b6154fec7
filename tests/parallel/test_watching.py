"""What is measured while a run trains is what one process measures, in every process, and asked for once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from parity import Runs, assert_same_run
from processes import Processes

from trimtab.cli.main import COMMANDS
from trimtab.cli.main import run as command
from trimtab.data.convert import as_pairs
from trimtab.data.readers import read_groups
from trimtab.data.render import tokenise
from trimtab.errors import InputError
from trimtab.evaluation.judging.dealt import DealtJudge, dealt
from trimtab.evaluation.pages.training import memory_part
from trimtab.groups import Group, Response
from trimtab.models.load import ModelConfig, load_model
from trimtab.parallel.world import world
from trimtab.rewards.judge_config import JudgeConfig
from trimtab.rewards.judges import Judge, Judgement, build_judge
from trimtab.spread.deal import Part, numbers
from trimtab.training.stopping import StopOptions, Stopping

SHORT = {"train.steps": 2, "train.eval_every": 1, "data.heldout_fraction": 0.4}


def evals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each evaluation."""
    figures = [{k: v for k, v in m.items() if k.startswith("eval_")} for m in found["metrics"]]
    return [row for row in figures if row]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- held-out rows

HELD_OUT: list[tuple[str, set[str]]] = [
    ("sft", {"eval_loss"}),
    ("dpo", {"eval_accuracy_likelihood", "eval_accuracy_implicit_reward"}),
    ("rank", {"eval_accuracy_implicit_reward"}),
    ("mixed", {"eval_label_auc", "eval_loss", "eval_accuracy_likelihood"}),
    ("reward", {"eval_accuracy", "eval_ece", "eval_reward_margin"}),
    ("process-reward", {"eval_loss", "eval_first_error_accuracy"}),
    ("grpo", {"eval_reward", "eval_response_tokens"}),
]


SPREAD = {"dpo", "reward", "grpo"}
"""Of these the same is asked of weights that are spread."""
CASES = [(name, measured, "replicate") for name, measured in HELD_OUT]
CASES += [(name, measured, "shard") for name, measured in HELD_OUT if name in SPREAD]


@pytest.mark.parametrize(("name", "measured", "weights"), CASES)
def test_held_out_rows(name: str, measured: set[str], weights: str, runs: Runs) -> None:
    alone = runs.alone(name, changed=SHORT, evaluated=True)
    together = runs(name, changed={**SHORT, "parallel.weights": weights}, evaluated=True)
    assert_same_run(alone, together)
    assert len(evals(alone)) == 3
    assert evals(alone)[0].keys() >= measured
    assert evals(alone)[0] != evals(alone)[2], "a run that changes nothing shows nothing"


def _shares(model: Path, file: Path) -> dict[str, Any]:
    """Which responses this process passed through the model, and what it was told of all."""
    lm = load_model(ModelConfig(path=str(model), dtype="float64"))
    read, _ = read_groups(str(file))
    pairs, _ = tokenise(as_pairs(read), lm.tokenizer)
    own: list[str] = []

    def find(part: Part) -> list[list[float]]:
        own.extend(group.id for group in part.groups)
        return part.batch.ragged(lm.token_logprobs(part.batch)[0])

    return {"own": own, "found": numbers(lm, pairs, 72, find)}


def test_passes_are_dealt_out(processes: Processes, tiny_model: Path, uneven_data: Path) -> None:
    """Two processes make as many passes as one does, not twice as many; each knows all numbers."""
    given: dict[str, Any] = {"model": tiny_model, "file": uneven_data / "pairs.jsonl"}
    [alone] = processes.run(_shares, size=1, **given)
    first, second = processes.run(_shares, **given)
    assert first["own"]
    assert second["own"]
    assert Counter(first["own"] + second["own"]) == Counter(alone["own"])
    assert first["found"] == second["found"]
    for ours, theirs in zip(first["found"], alone["found"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


# ---------------------------------------------------------------- static prompts, judges, suites


def counting(folder: Path) -> str:
    """A reward function that leaves a line for each call, in a file that all processes write to."""
    file = folder / "calls.txt"
    return tiny.write_reward(
        folder / "counting.py",
        f"open({str(file)!r}, 'a').write(response + '\\n'); return float(len(response))",
    )


def watch_options(data: Path, folder: Path) -> dict[str, Any]:
    """Static prompts with a reward, a judge that counts its calls, KL, and a safety suite."""
    suite = ["prompt,type,label", *(f"{letter},t,safe" for letter in "abc"), "f,t,unsafe", "g,t,unsafe"]
    (folder / "suite.csv").write_text("\n".join(suite) + "\n")
    return {
        "train.steps": 2,
        "train.eval_every": 2,
        "train.lr": 0.05,
        "watch.prompts": [{"path": str(data / "prompts.jsonl")}],
        "watch.samples": 2,
        "watch.sampling.max_new_tokens": 6,
        "watch.reward.terms": [{"name": f"{data / 'rewards.py'}:score", "label": "words"}],
        "watch.judge.kind": "function",
        "watch.judge.name": counting(folder),
        "watch.safety": [{"path": str(folder / "suite.csv")}],
    }


@pytest.mark.parametrize(("name", "weights"), [("dpo", "replicate"), ("dpo", "shard"), ("grpo", "replicate")])
def test_static_prompts(name: str, weights: str, runs: Runs, uneven_data: Path, tmp_path: Path) -> None:
    """The answers are the same to the token, and written once; the judge is asked no more than by one."""
    found, calls, samples = [], [], []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = {**watch_options(uneven_data, folder), "run.out": str(folder / "run")}
        held = {} if size == 1 else {"parallel.weights": weights}
        found.append(runs(name, size, changed=options | held, evaluated=True))
        calls.append(Counter((folder / "calls.txt").read_text().splitlines()))
        samples.append(rows(folder / "run/samples.jsonl"))
    [alone], together = found
    assert_same_run(alone, together)
    last = evals(alone)[-1]
    assert last["eval_kl"] > 0.001
    assert last.keys() >= {"eval_win_rate", "eval_entropy", "eval_reward", "eval_under_refusal/suite"}
    assert sum(calls[0].values()) == sum(calls[1].values()) > 0
    assert calls[0] == calls[1]
    assert len(samples[0]) == 2 * (11 * 2 + 5)
    ours, theirs = ([{**row, "reward": None} for row in side if "reward" in row] for side in samples)
    assert ours == theirs
    assert [row.get("reward") for row in samples[1]] == pytest.approx([r.get("reward") for r in samples[0]])


def test_fewer_prompts_than_processes(runs: Runs, uneven_data: Path, tmp_path: Path) -> None:
    """One process has nothing to answer, and both know the answer."""
    changed = watch_options(uneven_data, tmp_path) | {"watch.limit": 1, "watch.samples": 1}
    changed["watch.safety"] = []
    assert_same_run(
        runs.alone("dpo", changed=changed, evaluated=True), runs("dpo", changed=changed, evaluated=True)
    )


class _Priced(Judge):
    """0.3 a group."""

    def __init__(self) -> None:
        super().__init__("score")
        self.costs.cost = 0.0

    def _judge(self, groups: list[Group]) -> list[Judgement]:
        self.costs.calls += len(groups)
        self.costs.cost = (self.costs.cost or 0.0) + 0.3 * len(groups)
        return [Judgement([0.5]) for _ in groups]


def _cost() -> dict[str, float]:
    judge = DealtJudge(_Priced())
    for _ in range(2):
        judge.judge([Group(id=str(i), responses=[Response(text="a")]) for i in range(5)])
    return {name: judge.facts()[f"judge_{name}"] for name in ("calls", "cost")}


def test_a_dealt_judges_cost_is_not_rounded(processes: Processes) -> None:
    for found in processes.run(_cost):
        assert found == {"calls": 10, "cost": pytest.approx(3.0)}


def _judged(name: str) -> dict[str, Any]:
    judge = dealt(build_judge(JudgeConfig(kind="function", name=name)))
    assert isinstance(judge, DealtJudge) is (world().size > 1)
    texts = [("a", "b c"), ("a b", "c"), ("x", "x"), ("d e f", "d"), ("y y", "z")]
    groups = [
        Group(id=str(i), prompt="p", responses=[Response(text=one) for one in pair])
        for i, pair in enumerate(texts)
    ]
    try:
        found = judge.judge(groups)
    except InputError as error:
        return {"error": str(error)}
    costs = {k: v for k, v in judge.facts().items() if k != "judge_seconds"}
    return {
        "values": [j.values for j in found],
        "pairs": [j.pairs()[0].outcome for j in found],
        "costs": costs,
    }


def test_a_judge_is_shared(processes: Processes, tmp_path: Path) -> None:
    """Each question is asked by one process; what it costs is counted as if one had asked them all."""
    name = counting(tmp_path)
    [alone] = processes.run(_judged, size=1, name=name)
    first, second = processes.run(_judged, name=name)
    assert alone == first == second
    assert alone["pairs"] == [0.0, 1.0, 0.5, 1.0, 1.0]
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 2 * alone["costs"]["judge_calls"]


def test_a_judge_that_fails_in_one_process_ends_all_with_one_line(
    processes: Processes, tmp_path: Path
) -> None:
    name = tiny.write_reward(tmp_path / "fails.py", "return 1.0 if response != 'z' else 1 / 0")
    first, second = processes.run(_judged, name=name)
    assert first == second
    assert "division by zero" in first["error"]


# ---------------------------------------------------------------- early ends


def test_early_stopping_and_the_best_weights(runs: Runs) -> None:
    changed = {
        "train.steps": 12,
        "train.eval_every": 1,
        "train.lr": 0.05,
        "train.schedule": "constant",
        "train.keep_checkpoints": 1,
        "data.heldout_fraction": 0.4,
        "watch.stop_metric": "eval_loss",
        "watch.patience": 2,
        "watch.restore_best": True,
    }
    alone = runs.alone("reward", changed=changed, evaluated=True)
    together = runs("reward", changed=changed, evaluated=True)
    assert alone["stopped"]
    assert alone["model_step"] < alone["state"]["step"] < 12
    assert_same_run(alone, together)
    for other in together:
        assert (other["stopped"], other["model_step"]) == (alone["stopped"], alone["model_step"])


class Told:
    """As much of a State as :class:`Stopping` reads."""

    def __init__(self) -> None:
        self.step, self.controllers = 0, dict[str, float]()


def _stopped(metric: str) -> list[Any]:
    """A metric by a clock, which goes another way in the second process."""
    stopping = Stopping(StopOptions(stop_metric=metric, stop_mode="max", patience=1))
    state: Any = Told()
    found = []
    for value in (1.0, 2.0, 1.5):
        state.step += 1
        mine = value if world().first else -value
        metrics = {"loss": 1.0, metric: mine}
        stopping.stepped(state, metrics)
        found.append([stopping.evaluated(state, metrics), stopping.reason(state)])
    return found


@pytest.mark.parametrize("metric", ["tokens_per_s", "eval_speed"])
def test_processes_that_measure_otherwise_stop_together(processes: Processes, metric: str) -> None:
    first, second = processes.run(_stopped, metric=metric)
    [alone] = processes.run(_stopped, size=1, metric=metric)
    assert first == second == alone
    assert [best for best, _ in first] == [True, True, False]
    assert first[-1][1].startswith(f"{metric} was not better than 2")


def test_a_reward_model_is_calibrated_alike(runs: Runs, tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        out = tmp_path / str(size)
        changed = {**SHORT, "reward_model.calibrate": True, "run.out": str(out), "train.lr": 0.05}
        runs("reward", size, changed=changed, evaluated=True)
        about = json.loads((out / "model/reward.json").read_text())["calibration"]
        found.append({k: v for k, v in about.items() if isinstance(v, int | float)})
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("weights", ["replicate", "shard"])
def test_an_adapter_that_goes_on_is_held_against_itself_as_it_was(
    weights: str, runs: Runs, uneven_data: Path, tmp_path: Path
) -> None:
    """The reference is the shared base with a copy of the adapter as it was saved."""
    adapter = {"adapter.kind": "lora", "adapter.rank": 2, "train.lr": 0.1}
    runs("sft", 1, changed={**SHORT, **adapter, "run.out": str(tmp_path / "first")}, evaluated=True)
    changed = watch_options(uneven_data, tmp_path) | adapter
    changed |= {"model.path": str(tmp_path / "first/model"), "watch.safety": []}
    alone = runs.alone("dpo", changed=changed, evaluated=True)
    together = runs("dpo", changed={**changed, "parallel.weights": weights}, evaluated=True)
    assert evals(alone)[0]["eval_kl"] == pytest.approx(0.0, abs=1e-12)
    assert evals(alone)[-1]["eval_kl"] > 0.001
    assert_same_run(alone, together)


# ---------------------------------------------------------------- commands for one process


def launched(arguments: list[str], **environment: str) -> list[tuple[int, str]]:
    """Two processes as torchrun starts them: the exit code of each, and what it said."""
    started = [
        subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "trimtab.cli.main", *arguments],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
            | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    spoken = [started[0].communicate(timeout=60)[1]]
    time.sleep(1.5)
    started[1].terminate()  # as torchrun does when one has ended
    spoken.append(started[1].communicate(timeout=60)[1])
    return [(process.returncode, text) for process, text in zip(started, spoken, strict=True)]


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if not line.startswith("import time:")]


def test_another_command_runs_in_one_process() -> None:
    """The first process says so, before anything heavy is imported; the other waits for it, silently."""
    first, second = launched(["eval", "config.toml"])
    assert (first[0], second[0]) == (2, 2)
    assert said(first[1]) == ["error: trimtab eval runs in one process: start it without torchrun"]
    assert said(second[1]) == []
    imported = {line.split("|")[-1].strip() for line in first[1].splitlines()}
    assert "trimtab.cli.main" in imported or "trimtab.cli.alone" in imported
    assert not {"torch", "numpy", "transformers"} & imported


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_but_the_methods(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    assert command([name, "--help"]) == 2
    assert (
        capsys.readouterr().err == f"error: trimtab {name} runs in one process: start it without torchrun\n"
    )


@pytest.mark.parametrize(("key", "value"), [("RANK", "one"), ("WORLD_SIZE", "2.5")])
def test_an_environment_that_is_no_number(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(key, value)
    assert command(["eval", "config.toml"]) == 2
    line = f"error: the environment variable {key} is {value!r}: it has to be a whole number\n"
    assert capsys.readouterr().err == line


# ---------------------------------------------------------------- what is shown of such a run


def test_the_number_of_processes_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"peak_mb": 95.0, "measured_peak_mb": 90.0, "available_mb": 900.0}
    each = [{"rank": rank, "host": f"node{rank}", "peak_rss_mb": 430.0 + rank} for rank in range(2)]
    for name, found in (("one", {}), ("two", {"processes": each})):
        (tmp_path / name).mkdir()
        lineage = {"format": 1, "method": "dpo", "status": "finished", "wall_s": 2.0, "plan": plan, **found}
        (tmp_path / name / "lineage.json").write_text(json.dumps(lineage))
        (tmp_path / name / "config.toml").write_text("")
    assert command(["runs", str(tmp_path), "--where", "processes=2", "--columns", "processes"]) == 0
    assert capsys.readouterr().out.splitlines() == ["name\tprocesses", "two\t2"]
    assert command(["runs", str(tmp_path)]) == 0
    assert "seconds\tprocesses\tdate" in capsys.readouterr().out
    assert command(["runs", str(tmp_path / "one")]) == 0
    assert "processes" not in capsys.readouterr().out
    [grid, folded] = memory_part({"plan": plan, "processes": each}).blocks  # type: ignore[union-attr]
    assert grid.rows[0][0] == "The first of 2 processes"  # type: ignore[union-attr]
    assert [row[1] for row in folded.blocks[0].rows] == ["node0", "node1"]  # type: ignore[union-attr]
