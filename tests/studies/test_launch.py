"""Every run is planned before it: shown, kept beside what was measured, refused where it cannot fit.

The plans are of a stand-in: a MiB for each token of a micro-batch, and 100 MiB of weights.
"""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab import methods
from trimtab.cli.main import run
from trimtab.config import dump_toml, load_config
from trimtab.errors import InputError
from trimtab.evaluation.pages.sweep_report import sweep_table
from trimtab.evaluation.pages.training import memory_part
from trimtab.planning.devices import find_device
from trimtab.planning.result import Memory, Part, Phase, Plan, Time, within_budget
from trimtab.registry.ancestry import read_lineage
from trimtab.studies import job_data, launch, launch_words, quickstart
from trimtab.studies.compare import StudyConfig, rewrite_report, run_study
from trimtab.studies.grid import SweepConfig, trials
from trimtab.studies.order import in_order
from trimtab.studies.pipeline import PipelineConfig, run_pipeline
from trimtab.studies.sweep import run_sweep
from trimtab.training.measured import MeasuredMemory
from trimtab.training.memory import give_back, resident_mb
from trimtab.training.metrics import read_metrics

MIB = 2**20


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], None]:
    """``planned(available_mb)``: from here on runs are planned by the stand-in on such a machine."""

    def plan_run(name: str, config: Any, available: float | None) -> Plan:
        tokens = config.train.micro_batch_tokens
        if tokens < 64:
            raise InputError("one group needs 64 tokens")
        weights = Part("policy", "weights", 100 * MIB)
        training = Phase("training", (weights, Part("policy", "activations", tokens * MIB)))
        time = Time("a stand-in", (), 3.0, 0.0, 300.0, 0, 0)
        return Plan("", Memory((Phase("loading", (weights,)), training)), time, available)

    def on(available_mb: float | None) -> None:
        monkeypatch.setattr(launch, "plan_run", plan_run)
        found = None if available_mb is None else available_mb * MIB
        monkeypatch.setattr(launch, "free_bytes", lambda device: found)

    return on


Planned = Callable[[float | None], None]
Configured = Callable[..., Any]


def arguments(config: Any, tmp_path: Path) -> list[str]:
    file = tmp_path / "dpo.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    return ["dpo", str(file)]


def test_a_run_that_cannot_fit_stops_with_advice(
    planned: Planned, configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(1000)
    config = configured("dpo", train__micro_batch_tokens=4096, train__steps=2)
    command = arguments(config, tmp_path)
    assert run(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: dpo: cannot fit: 4.10 GiB at most (training: activations 4.00 GiB)")
    assert "and 1000 MiB are free" in line.replace("1,000", "1000")
    assert "--force" in line
    # 1,000 MiB with 15 % to spare are 869: 512 tokens take 612; 1,024 would take 1,124.
    [option] = re.findall(r"add (--\S+ \S+) \(then 612 MiB\)", line)
    assert option == "--train.micro_batch_tokens 512"
    assert not Path(config.run.out).exists()
    assert run([*command, *option.split()]) == 0
    assert read_lineage(Path(config.run.out))["plan"]["peak_mb"] == 612


@pytest.mark.parametrize("spelling", [["--force"], ["--force", "true"], ["--force=true"]])
def test_force_goes_on(
    spelling: list[str],
    planned: Planned,
    configured: Configured,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned(1000)
    config = configured("dpo", train__micro_batch_tokens=4096, train__steps=1)
    command = arguments(config, tmp_path)
    assert run(["dpo", *spelling, command[1]]) == 0
    said = capsys.readouterr().err
    assert "dpo: plan: 4.10 GiB at most" in said
    assert "about 3.00 s a step, 5 min 00 s in all" in said
    assert "that does not fit; going on, since --force was given" in said
    lineage = read_lineage(Path(config.run.out))
    assert lineage["plan"]["forced"] is True
    assert lineage["plan"]["fits"] is False
    assert "force =" not in (Path(config.run.out) / "config.toml").read_text()


def test_force_takes_true_or_false(
    planned: Planned, configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(1000)
    command = arguments(configured("dpo", train__micro_batch_tokens=4096), tmp_path)
    assert run([*command, "--force", "false"]) == 2
    assert "cannot fit" in capsys.readouterr().err
    assert run([*command, "--force=perhaps"]) == 2
    assert "--force takes true or false, not 'perhaps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("available", "said"),
    [
        # The plan: 612 MiB. Refused above 1.15 times what is free, warned of up to what is free / 1.15.
        (532, "refused"),
        (533, "a near miss"),
        (703, "a near miss"),
        (704, ""),
        (None, ""),
    ],
)
def test_the_margin(available: float | None, said: str, planned: Planned, configured: Configured) -> None:
    planned(available)
    config = configured("dpo", train__micro_batch_tokens=512)
    ahead = launch.look_ahead("dpo", config)
    assert ahead.plan is not None
    assert ahead.short == (said == "refused")
    if said != "refused":
        lines = launch_words.lines_of(ahead)
        assert len(lines) == (2 if said else 1)
        assert said in lines[-1]
        assert ("free" in lines[0]) == (available is not None)


def test_nothing_is_enough(planned: Planned, configured: Configured) -> None:
    planned(50)
    with pytest.raises(InputError, match=r"reach is 164 MiB; a device with 1 GiB would do"):
        launch.train("dpo", configured("dpo", train__micro_batch_tokens=512))


def test_advice_that_fails_leaves_the_refusal(
    planned: Planned, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(50)
    monkeypatch.setattr(launch, "advise", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"and 50\.0 MiB are free; --force goes on all the same$"):
        launch.train("dpo", configured("dpo"))


def test_on_a_gpu_smaller_micro_batches_are_left_to_the_run(
    planned: Planned, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory there is an error that halves them; here the process would be killed."""
    planned(1000)
    config = configured("dpo", train__micro_batch_tokens=4096, train__steps=1)
    with pytest.raises(InputError, match="cannot fit"):
        launch.train("dpo", config)
    monkeypatch.setattr(launch, "device_of", lambda model: "cuda")
    result = launch.train("dpo", config)
    assert "plan: that does not fit at once; micro-batches will be halved" in "\n".join(
        read_lineage(result.out)["lines"]
    )


def test_a_plan_that_cannot_be_made_ends_nothing(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "plan_run", lambda *_: 1 / 0)
    result = launch.train("dpo", configured("dpo", train__steps=1))
    lineage = read_lineage(result.out)
    assert lineage["lines"][0] == "no plan: ZeroDivisionError: division by zero"
    assert lineage["plan"] is None
    assert memory_part(lineage) is None


def test_the_lineage_holds_plan_and_measurement(planned: Planned, configured: Configured) -> None:
    planned(8000)
    result = launch.train("dpo", configured("dpo", train__micro_batch_tokens=512, train__steps=2))
    lineage = read_lineage(result.out)
    plan = lineage["plan"]
    assert plan["peak_mb"] == 612
    assert plan["phase"] == "training"
    assert plan["parts"] == {"policy: weights": 100, "policy: activations": 512}
    assert plan["phases_mb"] == {"loading": 100, "training": 612}
    assert (plan["available_mb"], plan["step_s"], plan["run_s"]) == (8000, 3, 300)
    assert plan["fits"] is True
    assert plan["forced"] is False
    measured = lineage["peak_rss_mb"] - lineage["baseline_rss_mb"]
    assert 0 < measured < lineage["peak_rss_mb"] - 50  # what the process held before is not the run's
    assert plan["measured_peak_mb"] == pytest.approx(measured, abs=1)
    assert plan["error"] == pytest.approx(612 / plan["measured_peak_mb"] - 1)
    part = memory_part(lineage)
    assert part is not None
    assert part.title == "Memory: planned and measured"


def test_a_run_that_is_ended_early_has_its_plan(planned: Planned, configured: Configured) -> None:
    planned(8000)
    config = configured("dpo", train__eval_every=1)
    with pytest.raises(KeyboardInterrupt):
        launch.train("dpo", config, on_eval=tiny.stop_at(2))
    lineage = read_lineage(Path(config.run.out))
    assert lineage["status"] == "stopped"
    assert lineage["plan"]["peak_mb"] > 0
    assert "measured_peak_mb" not in lineage["plan"]
    assert config.run.plan is None
    # Resumed, the plan is of this sitting.
    planned(9000)
    again = launch.train("dpo", configured("dpo", train__eval_every=1, run__resume=True))
    assert read_lineage(again.out)["plan"]["available_mb"] == 9000


def test_the_plan_is_said_before_anything_is_loaded(
    planned: Planned,
    unweighed: dict[str, Any],
    configured: Configured,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Loading may be what memory ends; and a try that failed there is no run to protect."""
    planned(8000)
    config = configured("dpo", **unweighed, train__micro_batch_tokens=512)
    for _ in range(2):
        with pytest.raises(InputError, match=r"no \.safetensors file"):
            launch.train("dpo", config)
        [line] = [line for line in capsys.readouterr().err.splitlines() if "plan" in line]
        assert line.startswith("dpo: plan: 612 MiB at most")


def test_the_plan_is_said_once(
    planned: Planned, configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(8000)
    result = launch.train("dpo", configured("dpo", train__micro_batch_tokens=512, train__steps=1))
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("dpo: plan: 612 MiB at most") for line in said) == 1
    assert said[0].startswith("dpo: plan: ")
    assert read_lineage(result.out)["lines"][0].startswith("plan: 612 MiB at most")


def test_what_planning_reads_is_the_runs(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[torch.Tensor] = []
    plan_run = launch.plan_run

    def reading(*given: Any) -> Plan:
        held.append(torch.ones(64 * MIB // 4))
        return plan_run(*given)

    monkeypatch.setattr(launch, "plan_run", reading)
    lineage = read_lineage(launch.train("dpo", configured("dpo", train__steps=1)).out)
    plan = lineage["plan"]
    assert lineage["baseline_rss_mb"] == plan["held_before_mb"] > 0
    assert plan["measured_peak_mb"] > 60
    assert job_data._LAST == {}


def test_advice_that_only_just_fits_says_so(planned: Planned, configured: Configured) -> None:
    """64 tokens, the least, take 164 MiB; with 15 % to spare they would have to be under 148 of 170."""
    planned(170)
    with pytest.raises(InputError, match=r"tokens 64 \(then 164 MiB, with nothing to spare\)"):
        launch.train("dpo", configured("dpo", train__micro_batch_tokens=4096))
    ahead = launch.look_ahead("dpo", configured("dpo", train__micro_batch_tokens=64))
    assert launch_words.lines_of(ahead)[-1].startswith("plan: a near miss: it fits with nothing to spare")
    planned(160)
    ahead = launch.look_ahead("dpo", configured("dpo", train__micro_batch_tokens=64))
    assert launch_words.lines_of(ahead)[-1].startswith("plan: a near miss: it fits only if")


def test_a_refusal_says_where_lengths_are_limits(
    unweighed: dict[str, Any], configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "free_bytes", lambda device: 1.0 * MIB)
    with pytest.raises(InputError, match="cannot fit") as refused:
        launch.train("dpo", configured("dpo"))
    assert "limits" not in str(refused.value)
    gone = {**unweighed, "data__sources": [{"path": "/nowhere/rows.jsonl"}]}
    told = r"are free \(no such file .*rows\.jsonl.*lengths are the limits of the configuration\); "
    with pytest.raises(InputError, match=told):
        launch.train("dpo", configured("dpo", **gone))


def test_a_time_budget_ends_a_run() -> None:
    """Loading is 10 s of it: 60 s are left for 20 steps of 3 s, of 71 s for a 21st that is begun."""
    time = Time("a stand-in", (), 3.0, 10.0, 310.0, 1000, 0, cost=31.0)
    plan = Plan("", Memory(()), time, facts={"steps": 100})
    capped = within_budget(plan, 70.0, 100)
    assert capped.time is not None
    assert (capped.time.run_s, capped.time.tokens, capped.time.cost) == (70, 200, pytest.approx(7))
    assert capped.facts == {"steps": 20, "ended_by": "train.time_budget_s, 70 s"}
    later = within_budget(plan, 71.0, 100)
    assert later.time is not None
    assert (later.time.run_s, later.facts["steps"]) == (73, 21)
    assert within_budget(plan, 0.0, 100) is within_budget(plan, 1000.0, 100) is plan
    assert within_budget(plan, 5.0, 100).facts["steps"] == 1


def test_a_runs_plan_ends_with_its_time_budget(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "this_device", lambda *_: find_device("CPU"))
    free = launch.plan_run("dpo", configured("dpo", train__steps=10**6), None)
    held = launch.plan_run("dpo", configured("dpo", train__steps=10**6, train__time_budget_s=60), None)
    assert free.time is not None
    assert held.time is not None
    assert 60 <= held.time.run_s < 61 + held.time.step_s < free.time.run_s
    assert held.facts["ended_by"] == "train.time_budget_s, 60 s"


def test_a_plan_is_no_input(planned: Planned, configured: Configured) -> None:
    planned(8000)
    config = configured("dpo", out="planned", train__steps=2)
    untouched = config.model_copy(deep=True)
    first = launch.train("dpo", config).out
    second = methods.find("dpo").train(configured("dpo", out="plain", train__steps=2)).out
    assert config == untouched
    assert read_lineage(second)["plan"] is None
    for key in ("digest", "config_sha256"):
        assert read_lineage(first)[key] == read_lineage(second)[key]
    assert tiny.comparable(read_metrics(first / "metrics.jsonl")) == tiny.comparable(
        read_metrics(second / "metrics.jsonl")
    )


def test_what_is_measured_is_above_what_was_there() -> None:
    before = torch.ones(32 * MIB // 4)
    meter = MeasuredMemory("cpu", {"peak_mb": 128.0, "framework_mb": 0.0})
    more = torch.ones(64 * MIB // 4)
    del more
    plan = meter.beside_plan()["plan"]
    assert plan["measured_peak_mb"] == pytest.approx(64, abs=8)  # with what was there: 96
    assert plan["error"] == pytest.approx(1.0, abs=0.25)
    assert meter.figures()["baseline_rss_mb"] == meter.baseline_mb > before.nbytes / MIB
    assert MeasuredMemory("cuda:99", None).beside_plan() == {}


def test_what_was_freed_is_given_back() -> None:
    """Many small blocks below one that stays: the C library keeps them until it is told."""
    held = [bytes(1000) for _ in range(100_000)]
    last = held[-1:]
    before = resident_mb()
    del held
    give_back()
    assert resident_mb() < before - 50
    assert last


# ---------------------------------------------------------------- studies


def stages(data: Path, *names: str, **train: Any) -> dict[str, Any]:
    train = {"steps": 1, "batch_groups": 4, "threads": 1, **train}
    return {
        name: {
            "method": name,
            "data": {"sources": [{"path": str(data / f"{tiny.FILES[name]}.jsonl")}]},
            "train": {"lr": tiny.RATES[name], **train},
        }
        for name in names
    }


def test_a_comparison(planned: Planned, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    planned(1000)
    made = stages(tiny_data, "sft", "dpo")
    made["sft"]["train"]["micro_batch_tokens"] = 512
    values = {
        "out": str(tmp_path / "out"),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "stages": made,
        "evaluation": {"pairs": [{"path": str(tiny_data / "pairs.jsonl")}]},
    }
    told = r"^stages\.dpo: dpo: cannot fit.*add --stages\.dpo\.train\.micro_batch_tokens 512 .* --force"
    with pytest.raises(InputError, match=told):
        run_study(load_config(StudyConfig, None, values))
    assert (tmp_path / "out" / "sft" / "model").exists()
    assert not (tmp_path / "out" / "dpo").exists()
    config = load_config(StudyConfig, None, {**values, "resume": True, "force": True})
    row = run_study(config)["methods"]["dpo"]
    assert row["planned_peak_mb"] == 4196
    assert row["measured_peak_mb"] >= 0  # of a run this small hardly anything
    page = rewrite_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "Memory: planned and measured" in page
    assert "612 MB" in page
    assert "force = false" in (tmp_path / "out" / "study.toml").read_text()


def test_a_sweep_notes_it_and_goes_on(
    planned: Planned, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    planned(1000)
    block = stages(tiny_data, "dpo")["dpo"]
    del block["method"]
    values = {
        "out": str(tmp_path / "out"),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "methods": {"dpo": {**block, "sweep": {"train.micro_batch_tokens": [512, 4096]}}},
        "evaluation": {"pairs": [{"path": str(tiny_data / "pairs.jsonl")}]},
    }
    summary = run_sweep(load_config(SweepConfig, None, values), lambda line: None)
    reasons = [row.get("failed", "") for row in summary["runs"].values()]
    assert reasons[0] == ""
    assert "cannot fit" in reasons[1]
    assert "; take 4096 out of the sweep of train.micro_batch_tokens, or --force" in reasons[1]
    assert "--methods.dpo.train.micro_batch_tokens" not in reasons[1]  # both set and swept: refused
    header, rows = sweep_table(summary)
    assert header[-2:] == ["Planned peak memory", "Measured peak memory"]
    assert rows[1][-2] == "612 MB"
    assert rows[0][-2:] == ["–", "–"]


@pytest.mark.parametrize(("share", "lora"), [(0.85, False), (0.4, False)])
def test_advice_in_a_sweep_leaves_alone_what_is_swept(
    share: float,
    lora: bool,
    unweighed: dict[str, Any],
    configured: Configured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = configured("dpo", **unweighed, train__micro_batch_tokens=16384)
    needed = launch.plan_run("dpo", whole, None).memory.needed
    monkeypatch.setattr(launch, "free_bytes", lambda device: float(share * needed))
    values = {
        "out": str(tmp_path / "out"),
        "model": {"path": unweighed["model__path"], "dtype": "float32"},
        "methods": {
            "dpo": {
                "data": {"sources": unweighed["data__sources"]},
                "train": {"steps": 1, "batch_groups": 8},
                "sweep": {"train.lr": [1e-6, 2e-6], "train.micro_batch_tokens": [16384]},
            }
        },
        "evaluation": {"pairs": unweighed["data__sources"]},
    }
    with pytest.raises(InputError, match="every run failed") as refused:
        run_sweep(load_config(SweepConfig, None, values), lambda line: None)
    line = str(refused.value)
    assert ("take 16384 out of the sweep of train.micro_batch_tokens, or add" in line) == (not lora)
    assert "sweep of train.lr" not in line
    [typed] = re.findall(r"add (--.*?) \(then", line)
    words = typed.split()
    overrides = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    assert ("methods.dpo.adapter.kind" in overrides) == lora
    assert not any(key.startswith(("methods.dpo.train.lr", "methods.dpo.train.micro")) for key in overrides)
    advised = load_config(SweepConfig, None, {**values, **overrides})
    made = trials(advised, in_order(advised, {}, [], "prepare"))
    assert len(made) == 2
    for trial in made:
        assert launch.plan_run("dpo", trial.step.config, share * needed).fits


def test_quickstart_takes_what_it_is_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["quickstart", "--out", str(out), "--stagez.dpo.train.steps", "3"]) == 2
    assert "stagez" in capsys.readouterr().err
    assert run(["quickstart", "--out", str(out), "--stages.dpo.train.steps"]) == 2
    assert "needs a value" in capsys.readouterr().err
    assert not out.exists()
    seen: list[StudyConfig] = []

    def begun(folder: Path, **_: Any) -> None:
        raise OSError(28, "as far as this test goes")

    def loaded(kind: Any, file: Any, given: Any) -> Any:
        seen.append(load_config(kind, file, given))
        return seen[-1]

    monkeypatch.setattr(quickstart, "write_world", begun)
    monkeypatch.setattr(quickstart, "load_config", loaded)
    options = ["--stages.dpo.train.micro_batch_tokens", "512", "--stages.dpo.adapter.kind=lora", "--force"]
    assert run(["quickstart", "--out", str(out), *options]) == 2
    stage = seen[0].stages["dpo"].model_extra or {}
    assert (stage["train"]["micro_batch_tokens"], stage["adapter"]["kind"]) == (512, "lora")
    assert "lr" in stage["train"]  # the rest of the study's own file
    assert (seen[0].force, seen[0].out) == (True, str(out))


def test_a_pipeline(planned: Planned, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    planned(1000)
    values = {
        "out": str(tmp_path / "out"),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "stages": stages(tiny_data, "sft"),
    }
    with pytest.raises(InputError, match=r"^stages\.sft: sft: cannot fit"):
        run_pipeline(load_config(PipelineConfig, None, values), lambda line: None)
    assert not (tmp_path / "out" / "sft").exists()
    forced = load_config(PipelineConfig, None, {**values, "resume": True, "force": True})
    run_pipeline(forced, lambda line: None)
    assert json.loads((tmp_path / "out" / "sft" / "lineage.json").read_text())["plan"]["forced"] is True


# ---------------------------------------------------------------- with the planner itself


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_planned(name: str, configured: Configured) -> None:
    ahead = launch.look_ahead(name, configured(name))
    assert ahead.why == ""
    assert ahead.plan is not None
    assert 0 < ahead.plan.memory.needed < 2**30
    assert launch_words.lines_of(ahead)[0].startswith("plan: ")


@pytest.fixture
def unweighed(tmp_path: Path) -> dict[str, Any]:
    """A model of 150M parameters that has a configuration and a tokenizer but no weights, and long pairs."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
    config = tiny.llama_config(0.02).to_dict() | shape | {"max_position_embeddings": 2048, "head_dim": 256}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    prompt, answer = " ".join(["a", "b"] * 200), " ".join(["c"] * 200)
    rows = [{"prompt": prompt, "chosen": answer, "rejected": answer + " d"} for _ in range(16)]
    return {
        "model__path": str(tmp_path / "model"),
        "model__dtype": "float32",
        "data__sources": [{"path": str(tiny.write_rows(tmp_path / "long.jsonl", rows))}],
        "train__batch_groups": 8,
    }


@pytest.mark.parametrize("share", [0.85, 0.5, 0.4])
def test_advice_makes_the_plan_fit(
    share: float,
    unweighed: dict[str, Any],
    configured: Configured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configured("dpo", **unweighed)
    before = launch.plan_run("dpo", config, None).memory.needed
    available = float(share * before)
    monkeypatch.setattr(launch, "free_bytes", lambda device: available)
    assert run(arguments(config, tmp_path)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert not Path(config.run.out).exists()
    [typed] = re.findall(r"add (--.*?) \(then", line)
    words = typed.split()
    overrides = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    given = load_config(type(config), None, {**config.model_dump(exclude_none=True), **overrides})
    after = launch.plan_run("dpo", given, available)
    assert after.fits
    assert after.memory.needed < 0.9 * before
    # The mildest come first: an adapter only where a third is left.
    assert ("adapter.kind" in overrides) == (share < 0.6), line


def test_a_run_leaves_nothing_behind(configured: Configured) -> None:
    """In bf16 a hook on every parameter hands its gradient on; one that held the optimiser kept it all."""
    result = launch.train("dpo", configured("dpo", model__dtype="bfloat16", train__steps=1))
    master = next(iter(result.state.optimiser.masters.values()))
    left: list[weakref.ref[torch.Tensor]] = [
        weakref.ref(master),
        weakref.ref(next(result.lm.model.parameters())),
    ]
    del master
    del result
    gc.collect()
    assert [ref() for ref in left] == [None, None]
