"""``trimtab plan`` as a user meets it: of a file, a model, several methods; files, exit codes, bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trimtab.cli.main import run
from trimtab.config import dump_toml, load_config
from trimtab.methods import dpo, names
from trimtab.planning.devices import CARDS, find_device, keep, usual_threads
from trimtab.planning.look import GIB
from trimtab.planning.plan import plan as plan_of
from trimtab.planning.quick import quick_job
from trimtab.planning.quick_config import QuickConfig
from trimtab.studies import calibrate, plan_place
from trimtab.studies.job import job_of

QUICK = ("--model", "smollm2-135m", "--prompt", "64", "--response", "64")
Planned = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No measurement of this machine, no GPU, no hub: the same on every machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_place, "DRIVER", tmp_path / "no-driver")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    """``planned("grpo", …)``: exit code, stdout, stderr of ``trimtab plan grpo …``."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["plan", *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def documented(planned: Planned) -> Callable[..., dict[str, Any]]:
    """The JSON that it prints, which has no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    def call(*arguments: str) -> dict[str, Any]:
        code, out, err = planned(*arguments, "--json", "-")
        assert code in (0, 1), err
        found: dict[str, Any] = json.loads(out, parse_constant=refuse)
        return found

    return call


@pytest.fixture
def dpo_file(tmp_path: Path, tiny_data: Path) -> Path:
    """Of a model of 44 million parameters that has no weights and no tokenizer, only its configuration."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    about = {"model_type": "llama", "vocab_size": 8192, "max_position_embeddings": 2048, **sizes}
    (model / "config.json").write_text(json.dumps(about))
    source = {"path": str(tiny_data / "pairs.jsonl")}
    config = load_config(
        dpo.Config,
        None,
        {
            "model.path": str(model),
            "model.dtype": "float32",
            "data.sources": [source],
            "data.max_prompt_tokens": 256,
            "data.max_tokens": 512,
            "train.steps": 10,
            "train.micro_batch_tokens": 4096,
            "run.out": str(tmp_path / "out"),
        },
    )
    file = tmp_path / "dpo.toml"
    file.write_text(dump_toml(config))
    return file


def held(document: dict[str, Any], kind: str, phase: str = "training") -> int:
    found = next(one for one in document["phases"] if one["phase"] == phase)
    return sum(part["bytes"] for part in found["parts"] if part["kind"] == kind)


# ---------------------------------------------------------------- without a file


def test_a_model_is_planned_without_a_file(documented: Callable[..., dict[str, Any]]) -> None:
    document = documented("grpo", *QUICK, "--device", "a100", "--price", "2.5", "--steps", "100")
    options = {"method": "grpo", "model": "smollm2-135m", "prompt": 64, "response": 64, "steps": 100}
    job = quick_job(QuickConfig(**options, engine="gpu"))
    plan = plan_of(job, find_device("a100"), 80 * GIB, price_per_hour=2.5)
    assert document["peak_bytes"] == round(plan.memory.peak)
    assert document["available_bytes"] == 80 * GIB
    assert document["fits"] is True
    assert plan.time is not None
    assert document["time"]["device"] == "A100-80GB"
    assert document["time"]["run_s"] == pytest.approx(plan.time.run_s)
    assert document["time"]["cost"] == pytest.approx(2.5 * plan.time.run_s / 3600)
    assert document["advice"] is None
    for phase in document["phases"]:
        assert sum(part["bytes"] for part in phase["parts"]) == pytest.approx(
            phase["bytes"], abs=len(phase["parts"])
        )


def test_the_terminal_says_what_was_planned(planned: Planned) -> None:
    code, out, err = planned("grpo", *QUICK, "--memory", "40GiB", "--price", "0.5")
    assert (code, err) == (0, "")
    for word in ("SmolLM2-135M", "fits: peak", "W weights", "40.0 GiB", "sampling", "a step", "cost", "0.50"):
        assert word in out, word
    assert out.isascii()
    assert all(len(line) <= 80 for line in out.splitlines())


def test_what_does_not_fit_gets_advice_that_does(planned: Planned, documented: Callable[..., Any]) -> None:
    options = ("sft", *QUICK, "--groups", "64", "--micro_batch_tokens", "8192")
    peak = documented(*options, "--memory", "500GiB")["peak_bytes"]
    memory = ("--memory", f"{0.7 * peak / 2**20:.0f}MiB")
    code, out, _ = planned(*options, *memory)
    assert code == 1
    assert "does not fit" in out
    advice = documented(*options, *memory)["advice"]
    assert advice["fits"]
    assert advice["changes"]
    assert f"--{next(iter(advice['changes'][0]['options']))}" in out
    changed = {key: str(value) for change in advice["changes"] for key, value in change["options"].items()}
    again = [word for key, value in changed.items() for word in (f"--{key}", value)]
    left = [*options] if "micro_batch_tokens" not in changed else [*options[:-2]]
    assert planned(*left, *again, *memory)[0] == 0
    code, out, _ = planned(*options, *memory, "--no-advice")
    assert code == 1
    assert "with these changes" not in out


def test_devices_share_what_learns(documented: Callable[..., dict[str, Any]]) -> None:
    many = {"1": [], "4": ["--weights", "shard"]}
    one, four = (
        documented("sft", *QUICK, "--device", "a100", "--devices", n, *more) for n, more in many.items()
    )
    assert held(four, "optimiser") == pytest.approx(held(one, "optimiser") / 4, rel=0.02)
    assert four["time"]["devices"] == 4


def test_hyphens_and_equals_signs(documented: Callable[..., dict[str, Any]]) -> None:
    spelled = documented("sft", "--model=smollm2-135m", "--micro-batch-tokens=2048", "--memory=9GiB")
    assert spelled == documented(
        "sft", "--model", "smollm2-135m", "--micro_batch_tokens", "2048", "--memory", "9GiB"
    )


# ---------------------------------------------------------------- several methods


def test_all_methods_side_by_side(planned: Planned, documented: Callable[..., dict[str, Any]]) -> None:
    document = documented("all", *QUICK, "--memory", "40GiB")
    assert sorted(document["plans"]) == names()
    assert document["failed"] == {}
    alone = documented("kto", *QUICK, "--memory", "40GiB")
    assert document["plans"]["kto"]["peak_bytes"] == alone["peak_bytes"]
    code, out, _ = planned("all", *QUICK, "--memory", "40GiB")
    assert code == 0
    for name in names():
        assert sum(line.split()[:1] == [name] for line in out.splitlines()) == 2  # a row and a bar
    assert all(len(line) <= 80 for line in out.splitlines())


def test_one_that_fits_is_enough(planned: Planned, documented: Callable[..., dict[str, Any]]) -> None:
    plans = documented("sft,ppo", *QUICK, "--memory", "40GiB")["plans"]
    sft, ppo = (plans[name]["peak_bytes"] for name in ("sft", "ppo"))
    assert sft < ppo
    assert planned("sft,ppo", *QUICK, "--memory", f"{(sft + ppo) / 2 / 2**20:.0f}MiB")[0] == 0
    assert planned("sft,ppo", *QUICK, "--memory", f"{sft / 2 / 2**20:.0f}MiB")[0] == 1


def test_an_option_goes_to_those_that_heed_it(
    planned: Planned, documented: Callable[..., dict[str, Any]]
) -> None:
    """The critic on the trunk makes PPO smaller and is nothing to DPO, which alone would refuse it."""
    own = documented("dpo,ppo", *QUICK, "--memory", "40GiB")["plans"]
    trunk = documented("dpo,ppo", *QUICK, "--memory", "40GiB", "--critic", "trunk")["plans"]
    assert trunk["ppo"]["peak_bytes"] < own["ppo"]["peak_bytes"]
    assert trunk["dpo"]["peak_bytes"] == own["dpo"]["peak_bytes"]
    code, _, err = planned("dpo,sft", *QUICK, "--critic", "trunk")
    assert code == 2
    assert "critic has no effect with dpo" in err


# ---------------------------------------------------------------- of a file


def test_a_file_is_planned_as_it_would_run(dpo_file: Path, documented: Callable[..., dict[str, Any]]) -> None:
    document = documented("dpo", str(dpo_file), "--memory", "40GiB")
    job, _, _ = job_of("dpo", load_config(dpo.Config, dpo_file))
    assert document["peak_bytes"] == round(plan_of(job).memory.peak)
    assert document["facts"]["steps"] == 10
    less = documented("dpo", str(dpo_file), "--train.micro_batch_tokens", "1024", "--memory", "40GiB")
    assert held(less, "activations") < held(document, "activations") / 2
    assert not (dpo_file.parent / "out").exists()


def test_a_file_on_another_device(dpo_file: Path, documented: Callable[..., dict[str, Any]]) -> None:
    """Another engine, other kernels: not this machine's plan with another limit."""
    here, there = (
        documented("dpo", str(dpo_file), *more) for more in (("--memory", "80GiB"), ("--device", "a100"))
    )
    assert there["time"]["device"] == "A100-80GB"
    assert there["available_bytes"] == 80 * GIB
    assert held(there, "framework") != held(here, "framework")


def test_a_file_on_several_devices(dpo_file: Path, documented: Callable[..., dict[str, Any]]) -> None:
    shown = ("dpo", str(dpo_file), "--device", "a100", "--price", "2", "--devices")
    one, whole = (documented(*shown, n) for n in "14")
    four = documented(*shown, "4", "--parallel.weights", "shard")
    assert held(four, "optimiser") == pytest.approx(held(one, "optimiser") / 4, rel=0.02)
    assert four["facts"]["weights"] == "sharded over all 4"
    # Small as it is, a run would replicate it, and says why.
    assert held(whole, "optimiser") == held(one, "optimiser")
    assert whole["facts"]["processes"] == 4
    assert whole["facts"]["weights"].startswith("replicated in each (they take about")
    assert "processes" not in one["facts"]
    assert four["time"]["cost"] == pytest.approx(2 * 4 * four["time"]["run_s"] / 3600)


def test_options_of_many_processes_are_those_of_the_run(dpo_file: Path, planned: Planned) -> None:
    shown = ("dpo", str(dpo_file), "--device", "a100", "--devices", "4")
    code, _, said = planned(*shown, "--parallel.weights", "shard", "--parallel.shard_over", "3")
    assert code == 2
    assert said.strip() == (
        "error: parallel.shard_over = 3 does not divide the number of processes, 4: choose one of 2, 4"
    )
    code, _, said = planned(*shown, "--parallel.shard_over", "2")
    assert code == 2
    assert said.startswith("error: parallel.shard_over has no effect, since weights are whole (they take")


def test_what_no_option_mends_says_how_many_devices(documented: Callable[..., dict[str, Any]]) -> None:
    """The number that was asked for must not undo the numbers that are tried; each computes groups."""
    asked = ("sft", "--model", "llama-3.1-70b", "--device", "a10g")
    for more in ((), ("--devices", "2")):
        advice = documented(*asked, *more)["advice"]
        assert not advice["fits"]
        assert re.search(r"so would \d+ devices", advice["otherwise"])
        # 70 billion frozen weights in 16 bits, over four devices, are 33 GiB each.
        assert "so would" not in documented(*asked, "--groups", "4", *more)["advice"]["otherwise"]


def test_no_more_devices_than_groups(dpo_file: Path, planned: Planned) -> None:
    for devices, expected in (("16", 0), ("17", 2)):
        for asked in (("grpo", *QUICK), ("dpo", str(dpo_file))):
            code, _, err = planned(*asked, "--device", "h100", "--devices", devices)
            assert code == expected, err
            assert code == 0 or "devices must be 16 or fewer" in err
    code, _, err = planned("grpo", *QUICK, "--device", "h100", "--devices", "17", "--groups", "17")
    assert code == 0, err


def test_names_as_they_are_typed(documented: Callable[..., dict[str, Any]], planned: Planned) -> None:
    assert documented("Dr_GRPO", *QUICK)["facts"] == documented("dr-grpo", *QUICK)["facts"]
    assert set(documented("DPO,dpo, kto", *QUICK)["plans"]) == {"dpo", "kto"}
    assert set(documented("ALL", *QUICK)["plans"]) == set(names())


def test_targets_with_commas(documented: Callable[..., dict[str, Any]]) -> None:
    lora = ("dpo", *QUICK, "--adapter", "lora", "--targets")
    typed, listed, one = (
        documented(*lora, text)["peak_bytes"] for text in ("q_proj, v_proj", '["q_proj", "v_proj"]', "q_proj")
    )
    assert typed == listed > one


def test_the_advised_file_runs_where_the_first_did_not_fit(dpo_file: Path, planned: Planned) -> None:
    options, new = ("--memory", "900MiB"), dpo_file.parent / "new.toml"
    code, out, _ = planned("dpo", str(dpo_file), *options, "--write", str(new))
    assert code == 1
    assert "with these changes it fits" in out
    assert load_config(dpo.Config, new) != load_config(dpo.Config, dpo_file)
    assert planned("dpo", str(new), *options)[0] == 0
    other = dpo_file.parent / "other.toml"
    code, _, err = planned("dpo", str(dpo_file), "--memory", "40GiB", "--write", str(other))
    assert code == 0
    assert "nothing is to be changed" in err
    assert not other.exists()


def test_a_gpu_that_is_not_here(dpo_file: Path, planned: Planned) -> None:
    code, _, err = planned("dpo", str(dpo_file), "--model.device", "cuda:7")
    assert code == 2
    assert "--device" in err
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------- the device


def test_this_machine_as_it_was_measured(planned: Planned) -> None:
    _, out, _ = planned("sft", *QUICK)
    assert "this machine was not measured" in out
    assert "a common CPU" in out
    keep(dataclasses.replace(CARDS["CPU-AMX"], name="Xeon of a test", measured=True), usual_threads())
    _, out, _ = planned("sft", *QUICK)
    assert "not measured" not in out
    assert "Xeon of a test" in out


def test_calibrating(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    device = dataclasses.replace(CARDS["CPU-AMX"], name="Xeon of a test")
    monkeypatch.setattr(calibrate, "calibrate", lambda: (keep(device, usual_threads()), device)[1])
    code, out, err = planned("--calibrate")
    assert code == 0
    assert "measuring" in err
    assert "Xeon of a test: 1,070 GFLOP/s in float32, 17,200 in bfloat16, 100.0 GB/s" in out
    assert "Xeon of a test" in planned("sft", *QUICK)[1]


def test_the_gpu_of_this_machine(planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = tmp_path / "driver" / "0000:00:1e.0" / "information"
    about.parent.mkdir(parents=True)
    about.write_text("Model: \t\t NVIDIA A10G\nIRQ:   \t 40\n")
    monkeypatch.setattr(plan_place, "DRIVER", tmp_path / "driver")
    _, out, _ = planned("sft", *QUICK)
    assert "on A10G" in out
    assert "22.5 GiB" in out


# ---------------------------------------------------------------- files


def test_json_and_svg_are_written(planned: Planned, tmp_path: Path) -> None:
    code, out, _ = planned("ppo", *QUICK, "--memory", "12GiB", "--json", "plan.json", "--svg", "plan.svg")
    assert code == 0
    assert "W weights" in out
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == 1
    words = [text.text for text in ElementTree.parse(tmp_path / "plan.svg").getroot().iter() if text.text]
    assert "12.0 GiB available" in words
    assert "training" in words
    code, _, _ = planned("ppo,sft", *QUICK, "--memory", "12GiB", "--json", "two.json", "--svg", "two.svg")
    assert set(json.loads((tmp_path / "two.json").read_text())["plans"]) == {"ppo", "sft"}
    words = [text.text for text in ElementTree.parse(tmp_path / "two.svg").getroot().iter() if text.text]
    assert "ppo: training" in words


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a method"),
        (("grop", *QUICK), "'grop' is no method; did you mean grpo"),
        (("grpo",), "give its CONFIG.toml, or --model"),
        (("grpo", "there-is-none.toml"), "no such configuration file"),
        (("grpo,dpo", "x.toml"), "several methods are planned from --model"),
        (("--memory", "3", *QUICK), "a method comes before --model"),
        (("grpo", *QUICK, "--device", "a101"), "did you mean A10"),
        (("grpo", *QUICK, "--devices", "0"), "--devices must be 1 or more (got 0)"),
        (("grpo", *QUICK, "--devices", "-2"), "--devices must be 1 or more (got -2)"),
        (("grpo", *QUICK, "--devices", "two"), "invalid int value: 'two'"),
        (("grpo", *QUICK, "--memory", "0"), "memory must be more than 0"),
        (("grpo", *QUICK, "--memory", "big"), "'big' is no size"),
        (("grpo", *QUICK, "--price", "-1"), "--price must be a number, 0 or more"),
        (("grpo", *QUICK, "--price", "nan"), "--price must be a number, 0 or more"),
        (("grpo", *QUICK, "--prompt", "9000"), "over the context"),
        (("grpo", *QUICK, "--groups", "0"), "--groups"),
        (("grpo", *QUICK, "--response", "-1"), "--response"),
        (("grpo", *QUICK, "--micro_batch", "12"), "did you mean --micro_batch_tokens?"),
        (("grpo", *QUICK, "--method", "dpo"), "--method is no option"),
        (("grpo", *QUICK, "--epochs"), "--epochs needs a value"),
        (("grpo", *QUICK, "config.json"), "unexpected argument 'config.json'"),
        (("grpo", *QUICK, "--without_reference", "--groups", "4"), "needs a value (true or false)"),
        (("grpo", *QUICK, "--rows", "--groups", "4"), "--rows needs a value\n"),
        (
            ("dpo", "dpo.toml", *QUICK),
            "--model plans without a file: with dpo.toml the model is --model.path",
        ),
        (
            ("dpo", *QUICK, "dpo.toml"),
            "--model plans without a file: with dpo.toml the model is --model.path",
        ),
        (("dpo,", *QUICK), "'dpo,' has an empty name between commas"),
        ((",", *QUICK), "',' has an empty name between commas"),
        (("dpo", *QUICK, "--adapter", "lora", "--targets", "q_proj,"), "names are as in q_proj,v_proj"),
        (("dpo", *QUICK, "--adapter", "lora", "--targets", "q_proj,v_prj"), "no linear layer 'v_prj'"),
        (("grpo", *QUICK, "--device", "h100", "--devices", "17"), "devices must be 16 or fewer"),
        (("dpo", *QUICK, "--critic", "trunk"), "critic has no effect"),
        (("dpo", *QUICK, "--rank", "8"), "rank has no effect without an adapter"),
        (("dpo", *QUICK, "--write", "x.toml"), "--write needs a CONFIG.toml"),
        (("dpo", *QUICK, "--svg", "x.png"), "only SVG is drawn"),
        (("dpo", *QUICK, "--svg", "nowhere/x.svg"), "nowhere/x.svg: cannot be written"),
        (("dpo", *QUICK, "--json", "nowhere/x.json"), "nowhere/x.json: cannot be written"),
        (("dpo", *QUICK, "--json", "x.svg", "--svg", "x.svg"), "two outputs go to x.svg"),
        (("dpo", *QUICK, "--json", ""), "names no file"),
        (("dpo", *QUICK, "--json", "/"), "names no file"),
        (("dpo", *QUICK, "--json", "."), "names no file"),
        (("--calibrate", "--device", "a100"), "leave --device out"),
        (("--calibrate", "--json", "x.json"), "--json has no effect on --calibrate alone"),
        (("dpo", *QUICK, "--write", "x.toml", "--no-advice"), "leave --no-advice out"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, planned: Planned, tmp_path: Path
) -> None:
    code, out, err = planned(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".json", ".svg", ".toml")]


def test_an_unknown_architecture(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "lama"}')
    code, _, err = planned("dpo", "--model", str(tmp_path / "odd"))
    assert code == 2
    assert "llama" in err


# ---------------------------------------------------------------- speed


def test_nothing_heavy_is_loaded() -> None:
    """PyTorch alone would take seconds."""
    code = (
        "import sys\nfrom trimtab.cli.main import run\n"
        "assert run(['plan', 'ppo', '--model', 'qwen3-0.6b', '--svg', '/dev/null/x.svg']) == 2\n"
        "assert run(['plan', 'all', '--model', 'qwen3-0.6b', '--json', '-']) in (0, 1)\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'scipy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["plan", "ppo", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--device",
        "--devices",
        "--memory",
        "--price",
        "--calibrate",
        "--json",
        "--svg",
        "--write",
    ):
        assert f"  {option} " in text
    for key in QuickConfig.model_fields:
        assert (f"  --{key} " in text) == (key not in ("method", "engine")), key
    assert "trimtab ppo --help" in text
