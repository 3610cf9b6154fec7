"""Digests against other programs' arithmetic, and what a configuration is found to read."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from trimtab.registry import surroundings
from trimtab.registry.digests import digests_of, file_digest, fingerprint, forget, hub_snapshot
from trimtab.registry.inputs import Input, hashed, inputs_of
from trimtab.registry.surroundings import VARIABLES, code


def test_a_files_digest_is_sha256sums(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"x" * 3_000_000)  # more than one block
    printed = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout
    assert file_digest(file) == fingerprint(file) == printed.split()[0]
    assert fingerprint(tmp_path / "none") is None


def test_a_folders_digest_is_that_of_its_list(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text("b")
    (folder / "deep" / "a.jsonl").write_text("a")
    (folder / ".hidden").write_text("h")
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
        for name, text in (("b.jsonl", "b"), ("deep/a.jsonl", "a"))
    )
    assert fingerprint(folder) == hashlib.sha256(lines.encode()).hexdigest()
    (folder / "deep" / "a.jsonl").rename(folder / "deep" / "c.jsonl")
    assert fingerprint(folder) != hashlib.sha256(lines.encode()).hexdigest(), "a name is content too"


def test_of_a_model_what_is_loaded_counts(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.model", "README.md", "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "config.json").write_text("{}")
    _, files = digests_of(tmp_path, "model")
    assert sorted(files) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_a_digest_is_kept_until_forgotten(tmp_path: Path) -> None:
    """The same size and time of change: what silent damage to a disk looks like."""
    import os

    file = tmp_path / "a"
    file.write_text("one")
    about = file.stat()
    first = file_digest(file)
    file.write_text("two")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file_digest(file) == first
    forget()
    assert file_digest(file) == hashlib.sha256(b"two").hexdigest()


def test_a_hub_name_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--acme--small"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "x").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert hub_snapshot("acme/small", "main", "models") == (snapshot, commit)
    assert hub_snapshot("acme/small", commit, "models") == (snapshot, commit)
    assert hub_snapshot("acme/small", "v2", "models") == (None, None)
    assert hub_snapshot("acme/small", "../../secret", "models") == (None, None)
    assert hub_snapshot("acme/other", "main", "models") == (None, None)
    found = hashed(Input("model", "acme/small", "model", "main"))
    assert (found["commit"], found["files"]) == (commit, {"config.json": hashlib.sha256(b"{}").hexdigest()})
    # The commit is known even where the files are gone.
    shutil.rmtree(snapshot)
    found = hashed(Input("model", "acme/small", "model", "main"))
    assert (found["commit"], found["sha256"], found["note"]) == (commit, None, "not on this disk")


def test_inputs_of_a_configuration(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    config: dict[str, Any] = {
        "model": {"path": str(adapter), "revision": "main", "chat_template": "t.jinja", "tokenizer": ""},
        "dpo": {"reference": "acme/ref", "beta": 0.1},
        "critic": {"path": "runs/rm/model"},
        "reward": {
            "terms": [
                {"name": "numeric"},
                {"name": "mine/rewards.py:score", "label": "mine"},
                {"name": "json.decoder:scanstring"},
                {"name": "reward_model", "args": {"path": "runs/rm/model"}},
                {"name": "judge", "args": {"kind": "function", "name": "j.py:f", "rubric_file": "r.txt"}},
            ]
        },
        "data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "heldout": [{"path": "c.jsonl"}]},
    }
    found = {item.role: (item.path, item.kind) for item in inputs_of(config)}
    scanner = found.pop("reward:scanstring")
    assert scanner[0].endswith("json/decoder.py")
    assert found == {
        "model": (str(adapter), "model"),
        "model.base": ("acme/base", "model"),
        "chat_template": ("t.jinja", "file"),
        "reference": ("acme/ref", "model"),
        "critic": ("runs/rm/model", "model"),
        "reward:mine": ("mine/rewards.py", "file"),
        "reward:reward_model": ("runs/rm/model", "model"),
        "reward:judge.rubric": ("r.txt", "file"),
        "reward:judge": ("j.py", "file"),
        "data.sources.0": ("a.jsonl", "folder"),
        "data.sources.1": ("b.jsonl", "folder"),
        "data.heldout.0": ("c.jsonl", "folder"),
    }


def test_code_has_a_digest_and_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "trimtab"
    package.mkdir()
    file = package / "__init__.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(surroundings, "PACKAGE", package)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    before = code()
    assert "commit" not in before
    subprocess.run([*git, "init", "-q"], check=True)
    assert code() == before, "in somebody else's repository, which does not hold the package"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    clean = code()
    assert (len(clean["commit"]), clean["changed"]) == (40, False)
    file.write_text("x = 22\n")
    changed = code()
    assert changed["changed"] is True
    assert changed["commit"] == clean["commit"]
    assert changed["sha256"] != clean["sha256"] == before["sha256"]


def test_only_listed_variables_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HOME_ADDRESS", "somewhere")
    recorded = surroundings.surroundings()["environment"]
    assert recorded["OMP_NUM_THREADS"] == "3"
    assert set(recorded) <= set(VARIABLES)
