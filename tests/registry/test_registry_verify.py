"""On runs of the methods: ancestry, and what ``trimtab verify`` says of runs whole, changed and killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from trimtab import methods
from trimtab.cli.main import run as trimtab
from trimtab.evaluation.watching.during import heldout_evaluation
from trimtab.registry.runs import read_run
from trimtab.registry.tree import ancestry
from trimtab.studies.verify import verify

TESTS = Path(__file__).parents[1]
OPTIONS = {"train__steps": 3, "data__heldout_fraction": 0.3, "train__save_every": 2}


def train(name: str, model: Path, data: Path, out: Path, **more: Any) -> Path:
    config = tiny.configure(name, model, data, out, **OPTIONS | more)
    methods.find(name).train(config, on_eval=heldout_evaluation(config))
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft → reward model, dpo, and a ppo that stands on both; tests that change something put it back."""
    top = tmp_path_factory.mktemp("registry")
    base, data = tiny.save_model(top / "base"), top / "data"
    data.mkdir()
    tiny.write_rows(data / "pairs.jsonl", tiny.pairs())
    tiny.write_rows(data / "demonstrations.jsonl", tiny.demonstrations())
    tiny.write_rows(data / "prompts.jsonl", tiny.prompts())
    tiny.write_reward(data / "rewards.py", "return float(len(response))")
    sft = train("sft", base, data, top / "sft") / "model"
    train("reward", sft, data, top / "rm")
    train("dpo", sft, data, top / "dpo", model__dtype="bfloat16")
    train("ppo", sft, data, top / "ppo", critic__path=str(top / "rm" / "model"))
    # In bf16 the layout's check comes out otherwise on the trained weights: the recorded one has to be taken.
    train("sft", base, data, top / "lora", adapter__kind="lora", adapter__rank=4, model__dtype="bfloat16")
    return top


@contextmanager
def changed(file: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(change(before))
    try:
        yield
    finally:
        file.write_bytes(before)


@contextmanager
def gone(path: Path) -> Iterator[None]:
    away = path.with_name(path.name + ".away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def differing(run: Path, *, evaluate: bool = False) -> dict[str, str]:
    """What verify finds at fault; the code is left out, which may be edited while these tests run."""
    found = verify(run, evaluate=evaluate)
    faults = [c for c in [*found.digests, *found.figures] if not c.holds and c.what != "code"]
    return {check.what: check.state for check in faults}


@pytest.mark.parametrize("name", ["sft", "rm", "dpo", "ppo", "lora"])
def test_a_run_that_nobody_touched_holds_and_measures_the_same(world: Path, name: str) -> None:
    found = verify(world / name)
    assert differing(world / name) == {}
    assert found.figures
    assert [check.state for check in found.figures] == ["same"] * len(found.figures)
    # On one machine much closer than the tolerance; to the bit only where products are the same wherever in
    # memory a weight lies, which MKL does not promise and not every processor gives.
    for check in found.figures:
        then, now = map(float, check.detail.removesuffix(" now").split(" then, "))
        assert now == pytest.approx(then, rel=1e-6, abs=1e-6), check
    written = {check.what for check in found.digests}
    assert {"written model", "written metrics.jsonl", "step-00000003", "config"} <= written


def test_lineage_of_a_run_of_a_method(world: Path) -> None:
    found = json.loads((world / "ppo" / "lineage.json").read_text())
    roles = {item["role"]: item for item in found["inputs"]}
    assert roles.keys() == {"model", "critic", "reward:vowels", "data.sources.0"}
    assert all(len(item["sha256"]) == 64 for item in roles.values())
    assert found["computing"]["dtype"] == "float32"
    assert found["schedules"]["epsilon"] == {"clip_low": 0.2, "clip_high": 0.2, "value_clip": 0.2}
    assert found["schedules"]["beta"]["end"] == found["beta"] == 0.05
    assert found["scores"]["eval_step"] == found["scores"]["step"] == 3
    assert found["hardware"]["memory_mb"] > 100
    assert found["sittings"][0]["to_step"] == 3


def test_ancestry_is_read_from_the_folders(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ancestry(world / "ppo")
    assert [(a.role, Path(a.path).name, a.state) for a in root.ancestors] == [
        ("parent", "sft", "same"),
        ("critic", "rm", "same"),
    ]
    assert [(a.role, Path(a.path).name) for a in root.ancestors[1].ancestors] == [("parent", "sft")]
    with gone(world / "rm"):
        critic = ancestry(world / "ppo").ancestors[1]
        assert critic.state == "missing"
        assert [Path(a.path).name for a in critic.ancestors] == ["sft"], "as its descendant recorded it"
        assert differing(world / "ppo") == {"critic": "missing", "ancestor critic": "missing"}
    weights = world / "sft" / "model" / "model.safetensors"
    with changed(weights, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])):
        parent = ancestry(world / "dpo").ancestors[0]
        assert (parent.state, parent.detail) == ("changed", "model changed: model.safetensors changed")
        assert trimtab(["runs", "--ancestry", str(world / "ppo")]) == 0
        assert capsys.readouterr().out.count("CHANGED: model changed") == 2
    assert ancestry(world / "dpo").ancestors[0].state == "same"
    lineage = world / "sft" / "lineage.json"
    with changed(lineage, lambda raw: raw.replace(b'"steps": 3,\n  "opt', b'"steps": 4,\n  "opt')):
        assert ancestry(world / "dpo").ancestors[0].state == "changed"


@pytest.mark.parametrize(
    ("file", "faults"),
    [
        ("data/demonstrations.jsonl", {"data.sources.0": "changed"}),
        ("base/model.safetensors", {"model": "changed"}),
        ("base/tokenizer_config.json", {"model": "changed"}),
        ("sft/metrics.jsonl", {"written metrics.jsonl": "changed"}),
        ("sft/checkpoints/step-00000002/state.json", {"step-00000002": "changed"}),
        ("sft/checkpoints/step-00000003/tensors.safetensors", {"step-00000003": "changed"}),
    ],
)
def test_one_changed_byte_is_found(world: Path, file: str, faults: dict[str, str]) -> None:
    # A digit for a digit, so that text stays what it is but for its meaning.
    def change(raw: bytes) -> bytes:
        at = max(raw.rfind(b"%d" % digit) for digit in range(10))
        at = at if at >= 0 else len(raw) // 2
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    with changed(world / file, change):
        assert differing(world / "sft") == faults
    assert differing(world / "sft") == {}


def test_a_changed_option_is_found_and_a_changed_comment_is_none(world: Path) -> None:
    with changed(world / "sft" / "config.toml", lambda raw: raw.replace(b"\nlr = 0.02", b"\nlr = 0.03")):
        assert differing(world / "sft") == {"config": "changed"}
    with changed(world / "sft" / "config.toml", lambda raw: raw.replace(b"# peak", b"# highest")):
        assert differing(world / "sft") == {}


def test_a_changed_reward_function_is_found(world: Path) -> None:
    with changed(world / "data" / "rewards.py", lambda raw: raw.replace(b"float(len", b"2 * (len")):
        assert differing(world / "ppo") == {"reward:vowels": "changed"}


def test_another_model_measures_otherwise(world: Path) -> None:
    """The digests would say so; the figures do without them."""
    other = (world / "base" / "model.safetensors").read_bytes()
    with changed(world / "sft" / "model" / "model.safetensors", lambda raw: other):
        faults = differing(world / "sft", evaluate=True)
    assert faults["written model"] == "changed"
    assert faults["eval_loss"] == "changed"


def test_an_evaluation_that_cannot_be_taken_is_a_fault_and_no_traceback(world: Path) -> None:
    with gone(world / "data" / "pairs.jsonl"):
        faults = differing(world / "dpo", evaluate=True)
    assert faults == {"data.sources.0": "missing", "evaluation": "missing"}


def test_exit_codes(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = json.loads((world / "sft" / "lineage.json").read_text())["code"]
    monkeypatch.setattr("trimtab.registry.check.code", lambda: recorded)
    assert trimtab(["verify", str(world / "sft"), "--no-eval"]) == 0
    assert "holds" in capsys.readouterr().out.splitlines()[-1]
    with changed(world / "data" / "demonstrations.jsonl", lambda raw: raw + b"\n"):
        assert trimtab(["verify", str(world / "sft"), "--no-eval"]) == 1
        assert capsys.readouterr().out.splitlines()[-1].endswith("differs: data.sources.0")
        assert trimtab(["verify", str(world / "sft"), "--no-eval", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["holds"] is False
    monkeypatch.setattr("trimtab.registry.check.code", lambda: recorded | {"sha256": "0" * 64})
    assert trimtab(["verify", str(world / "sft"), "--no-eval"]) == 1
    with changed(world / "sft" / "lineage.json", lambda raw: raw[: len(raw) // 2]):
        assert trimtab(["verify", str(world / "sft"), "--no-eval"]) == 2
        assert "damaged" in capsys.readouterr().err


def test_verify_finds_a_tree_that_was_moved(world: Path, tmp_path: Path) -> None:
    """Runs and data moved together: what was beside the run still is."""
    moved = tmp_path / "elsewhere"
    world.rename(moved)
    try:
        assert differing(moved / "dpo") == {}
    finally:
        moved.rename(world)


def test_a_killed_run_is_unfinished_and_its_second_sitting_finishes_it(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    code = (
        f"import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(TESTS)!r})\nimport tiny\n"
        f"c = tiny.configure('sft', Path({str(world / 'base')!r}), Path({str(world / 'data')!r}), "
        f"Path({str(out)!r}), train__steps=3, train__save_every=1, train__eval_every=1, "
        "train__save_in_background=False)\n"
        "def on_eval(lm, heldout, step):\n"
        "    if step == 2:\n        os.kill(os.getpid(), signal.SIGKILL)\n    return {}\n"
        "tiny.train(c, 'sft', on_eval=on_eval)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    lineage = json.loads((out / "lineage.json").read_text())
    assert (lineage["status"], lineage["steps"], lineage["ended"]) == ("running", 1, None)
    record = read_run(out)
    assert (record.status, record.method, record.steps) == ("unfinished", "sft", 1)
    assert differing(out, evaluate=True) == {"run": "missing"}

    options = {"train__steps": 3, "train__save_every": 1, "train__eval_every": 1, "run__resume": True}
    tiny.train(tiny.configure("sft", world / "base", world / "data", out, **options), "sft")
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["status"] == "finished"
    assert [(s["from_step"], s["to_step"]) for s in lineage["sittings"]] == [(0, 1), (1, 3)]
    assert lineage["sittings"][0]["ended"] is None
    assert differing(out) == {}
    # The same run again changes nothing of what it is.
    tiny.train(tiny.configure("sft", world / "base", world / "data", out, **options), "sft")
    assert json.loads((out / "lineage.json").read_text())["digest"] == lineage["digest"]
