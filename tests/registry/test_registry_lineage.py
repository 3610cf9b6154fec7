"""lineage.json as it is written: at the start, at a checkpoint, at every kind of end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import InputError, Terminated
from trimtab.registry import lineage as module
from trimtab.registry.ancestry import config_digest, finished, run_digest
from trimtab.registry.lineage import Lineage
from trimtab.registry.process import is_alive, this_process
from trimtab.registry.scores import schedules, scores

CONFIG = """
[model]
path = "{model}"
[data]
sources = [{{ path = "{data}" }}]
[train]
lr = 0.1
seed = 3
[dpo]
beta = 0.1
reference = ""
[run]
out = "{out}"
"""
COUNTS: dict[str, Any] = {"steps": 0, "optimiser_tokens": 0, "wall_s": 0.0, "lines": []}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as it is when a run starts."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return directory(tmp_path, "one", tmp_path / "base")


def directory(top: Path, name: str, model: Path) -> Path:
    out = top / name
    out.mkdir()
    text = CONFIG.format(model=model, data=top / "rows.jsonl", out=out)
    (out / "config.toml").write_text(text)
    return out


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "lineage.json").read_text())


def begin(out: Path, *, resumed: bool = False, parent: str = "", **counts: Any) -> Lineage:
    lineage = Lineage(out, "dpo")
    lineage.begin(COUNTS | counts, {"dtype": "float32"}, total=4, resumed=resumed, parent=parent)
    return lineage


def complete(out: Path, **keywords: Any) -> None:
    lineage = begin(out, **keywords)
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "model.safetensors").write_text(f"trained in {out.name}")
    (out / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5, "lr": 0.01}\n')
    lineage.finish(COUNTS | {"steps": 4}, {"beta": 0.1, "model": "as the method says"})


def test_from_the_start_to_the_end(run: Path) -> None:
    lineage = begin(run)
    first = read(run)
    assert (first["status"], first["ended"], first["digest"]) == ("running", None, None)
    assert [item["role"] for item in first["inputs"]] == ["model", "data.sources.0"]
    assert not finished(run)
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.7, "eval_loss": 0.9}\n{"step": 3, "lo')
    lineage.update(COUNTS | {"steps": 2})
    second = read(run)
    assert (second["status"], second["steps"], second["sittings"][0]["to_step"]) == ("running", 2, 2)
    assert second["scores"] == {"step": 2, "train": {"loss": 0.7}, "eval_step": 2, "eval": {"eval_loss": 0.9}}
    complete(run)
    last = read(run)
    assert (last["status"], last["steps"], last["model"]) == ("finished", 4, "as the method says")
    assert all(len(item["sha256"]) == 64 for item in last["inputs"])
    assert last["outputs"]["model"]["files"].keys() == {"model.safetensors"}
    assert last["digest"] == run_digest(last)
    assert last["schedules"]["beta"] == {"start": 0.1, "end": 0.1}
    assert last["schedules"]["learning_rate"]["last"] == 0.01
    assert len(last["code"]["sha256"]) == 64
    assert last["started"] <= last["ended"]
    assert finished(run)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("step 3: the loss is nan"), "step 3: the loss is nan"),
        (KeyboardInterrupt(), "interrupted"),
        (Terminated("step 3 is saved"), "Terminated: step 3 is saved"),
        (RuntimeError("a fault"), "RuntimeError: a fault"),
    ],
)
def test_a_run_that_stops_says_why(run: Path, error: BaseException, reason: str) -> None:
    begin(run).stop(error)
    found = read(run)
    assert (found["status"], found["reason"]) == ("stopped", reason)
    assert found["sittings"][0]["reason"] == reason
    assert not finished(run)


def test_a_run_that_never_began_leaves_none_and_a_finished_one_stays_so(run: Path) -> None:
    Lineage(run, "dpo").stop(InputError("bad data"))
    assert not (run / "lineage.json").exists()
    lineage = begin(run)
    lineage.finish(COUNTS, {})
    lineage.stop(None)
    assert read(run)["status"] == "finished"


def test_each_sitting_is_kept_and_a_change_between_them_is_seen(run: Path) -> None:
    lineage = begin(run)
    assert lineage._hashing is not None
    lineage._hashing.join()
    lineage.stop(KeyboardInterrupt())
    (run.parent / "rows.jsonl").write_text("{} {}\n")
    complete(run, resumed=True, steps=2)
    found = read(run)
    assert [s["from_step"] for s in found["sittings"]] == [0, 2]
    assert [s["inputs_changed"] for s in found["sittings"]] == [[], ["data.sources.0"]]
    assert found["started"] == found["sittings"][0]["started"]
    complete(run)  # not resumed: from the beginning
    assert len(read(run)["sittings"]) == 1


def test_a_damaged_lineage_does_not_keep_a_run_from_going_on(run: Path) -> None:
    (run / "lineage.json").write_text('{"status": "runn')
    assert not finished(run)
    complete(run, resumed=True)
    assert read(run)["status"] == "finished"


def test_parents_are_found_from_the_folders(run: Path) -> None:
    complete(run)
    second = directory(run.parent, "two", run / "model")
    complete(second)
    third = directory(run.parent, "three", second / "model")
    complete(third)
    found = read(third)
    assert found["parent"] == str(second)
    [parent] = found["ancestors"]
    assert (parent["role"], parent["path"], parent["digest"]) == (
        "parent",
        str(second),
        read(second)["digest"],
    )
    assert parent["ancestors"][0]["path"] == str(run)
    fourth = directory(run.parent, "four", second / "model")
    complete(fourth, parent=str(run))
    assert [(a["role"], a["path"]) for a in read(fourth)["ancestors"]] == [
        ("parent", str(run)),
        ("model", str(second)),
    ]
    assert read(run)["parent"] == ""


def test_no_secret_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    lineage = begin(run, lines=["loading with very-secret-value", "from https://u:p@host/x"])
    lineage.stop(InputError("no access with very-secret-value"))
    text = (run / "lineage.json").read_text()
    assert "very-secret-value" not in text
    assert "u:p@" not in text
    assert "https://[redacted]@host/x" in text


def test_a_folder_that_cannot_be_written_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = begin(run)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(InputError, match=r"cannot write lineage\.json: No space left"):
        lineage.update(COUNTS)
    lineage.stop(InputError("another"))  # the error that is on its way is the news
    assert read(run)["status"] == "running"


def test_numbers_that_json_has_not(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    begin(run).update(COUNTS)
    assert "NaN" not in (run / "lineage.json").read_text()
    assert read(run)["scores"]["train"] == {"loss": "nan"}


def test_the_configurations_digest_leaves_out_where_the_run_lives() -> None:
    config = {
        "train": {"lr": 1.0},
        "run": {"out": "a", "resume": False, "parent": "", "save_dtype": "float32"},
    }
    moved = {
        "train": {"lr": 1.0},
        "run": {"out": "b", "resume": True, "parent": "c", "save_dtype": "float32"},
    }
    other = {"train": {"lr": 1.0}, "run": {"out": "a", "save_dtype": "bfloat16"}}
    assert config_digest(config) == config_digest(moved) != config_digest(other)


def test_scores_are_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "eval_loss": 3.0}', '{"step": 1, "loss": 2.0, "eval_loss": 2.5}']
    lines += [json.dumps({"step": n, "loss": 1 / n, "note": "é" * 40}) for n in range(2, 3000)]
    file.write_text("\n".join(lines) + "\n[1]\nnot json\n" + '{"step": 3000, "lo', encoding="utf-8")
    found = scores(file)
    assert (found["step"], found["train"]["loss"]) == (2999, 1 / 2999)
    assert (found["eval_step"], found["eval"]) == (1, {"eval_loss": 2.5})
    assert scores(tmp_path / "none") == {}


def test_schedules_of_ppo() -> None:
    config = {
        "train": {"lr": 1e-5, "schedule": "cosine", "warmup_steps": 2, "final_lr": 0.1},
        "critic": {"lr": 1e-4},
        "ppo": {"beta": 0.05, "kl_control": "adaptive", "kl_target": 0.1, "clip_low": 0.2, "value_clip": 0.3},
    }
    rate = {"schedule": "cosine", "warmup_steps": 2, "final_lr": 0.1, "steps": None}
    assert schedules(config, None) == {
        "learning_rate": {"peak": 1e-5, **rate},
        "critic_learning_rate": {"peak": 1e-4, **rate},
        "beta": {"start": 0.05, "control": "adaptive", "target": 0.1},
        "epsilon": {"clip_low": 0.2, "value_clip": 0.3},
    }


def test_a_process_is_told_from_another_with_its_number() -> None:
    mine = this_process()
    assert mine["pid"] == os.getpid()
    if mine["began"] is None:
        pytest.skip("no /proc here")
    assert is_alive(mine)
    assert not is_alive(mine | {"began": "1"})
    assert not is_alive(mine | {"boot": "another"})
    assert not is_alive(None)


def test_schedules_of_what_moves_and_of_what_stays() -> None:
    section = {"beta": 0.1, "beta_end": 0.3, "beta_shape": "cosine", "clip_low": 0.2, "clip_shape": "linear"}
    made = schedules({"train": {}, "ppo": {**section, "clip_end": None}}, 10)
    assert made["beta"] == {"start": 0.1, "end": 0.3, "shape": "cosine"}
    assert made["epsilon"] == {"clip_low": 0.2}
    made = schedules({"train": {}, "ppo": {**section, "clip_end": 0.5}}, 10)
    assert made["epsilon"] == {"clip_low": 0.2, "clip_end": 0.5, "clip_shape": "linear"}
