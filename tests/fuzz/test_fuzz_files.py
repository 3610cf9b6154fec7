"""What runs and studies leave behind, damaged or made up: read as far as it is sound, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from plan import fuzzed, one_line
from safetensors.torch import save

from trimtab.cli.main import run
from trimtab.errors import InputError
from trimtab.groups import Group
from trimtab.models.vetting import INDEX, vet_folder
from trimtab.training.checkpoint import SUMS, Snapshot, newest_good, sealed, write
from trimtab.training.metrics import MetricsLog, read_metrics

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "loss", "a"]), inner)
    ),
    max_leaves=5,
)
LINES = st.one_of(
    JSON.map(json.dumps),
    st.text(max_size=10),
    st.builds(lambda s: json.dumps({"step": s, "loss": 0.5}), st.integers(1, 4)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@fuzzed(3)
@given(lines=st.lists(LINES, max_size=6), raw=st.binary(max_size=8), step=st.integers(0, 4))
@example(["[" * 100_000, '{"step": 1}'], b"", 1)
@example(['{"step": 1}', '{"step": "x"}', "5", '{"step": 1e999}', '{"step": true}'], b"\xff", 3)
def test_metrics(folder: Path, lines: list[str], raw: bytes, step: int) -> None:
    file = folder / "metrics.jsonl"
    file.write_bytes("\n".join(lines).encode("utf-8", "replace") + raw)
    found = read_metrics(file)
    assert all(isinstance(line, dict) for line in found)
    sound = [{"step": s, "loss": 0.5} for s in range(1, 5)]
    whole = lines if not raw else lines[:-1]
    wanted = [line for text in whole for line in sound if text == json.dumps(line)]
    assert [line for line in found if line in sound][: len(wanted)] == wanted
    MetricsLog(file, 10, "fuzz", from_step=step).close()
    assert all(line["step"] <= step for line in read_metrics(file))


HEADERS = st.recursive(
    st.one_of(st.none(), st.integers(-1, 2**64), st.sampled_from(["F32", "U8", "a", ""])),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["w", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


@fuzzed(3)
@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1), body=st.binary(max_size=16))
@example({"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}}, None, b"")
@example({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 2**63, b"1234")
def test_a_header_of_tensors(folder: Path, header: Any, length: int | None, body: bytes) -> None:
    """safetensors itself, on which every file of weights rests: an error or tensors, and no crash."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    text = json.dumps(header).encode()
    file = folder / "made-up.safetensors"
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(body)


@fuzzed(4)
@given(
    which=st.sampled_from(["tensors.safetensors", "state.json", SUMS]),
    place=st.integers(0, 10_000),
    bits=st.integers(1, 255),
    change=st.sampled_from(["flip", "cut", "empty", "remove", "replace", "append"]),
)
def test_a_damaged_checkpoint_is_not_believed(
    folder: Path, which: str, place: int, bits: int, change: str
) -> None:
    kept = folder / "checkpoints"
    tensors = {"model.w": torch.arange(64, dtype=torch.float32)}
    for step in (1, 2):
        write(kept, Snapshot(step, tensors, json.dumps({"step": step}), {"loss": 0.5}))
    assert newest_good(kept) == (kept / "step-00000002", {})
    file = kept / "step-00000002" / which
    data = bytearray(file.read_bytes())
    if change == "flip":
        data[place % len(data)] ^= bits
    elif change == "cut":
        del data[place % len(data) :]
    elif change == "append":
        data += bytes([bits])
    elif change == "replace":
        data[:] = save({"other": torch.zeros(4)}) if which.endswith("safetensors") else b'{"format": 2}'
    if change == "remove":
        file.unlink()
    else:
        file.write_bytes(b"" if change == "empty" else data)
    good, damaged = newest_good(kept)
    assert good == kept / "step-00000001"
    assert list(damaged) == [kept / "step-00000002"]


@fuzzed(3)
@given(text=st.one_of(JSON.map(json.dumps), st.binary(max_size=30)))
@example("[" * 100_000)
@example(json.dumps({"format": 2, "files": {"../../x": [0, ""]}, "step": 1}))
def test_made_up_checksums(folder: Path, text: str | bytes) -> None:
    kept = folder / "made-up"
    (kept / "step-00000001").mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    try:
        values = json.loads(data)
        data = sealed(values) if isinstance(values, dict) else data
    except (ValueError, RecursionError):
        pass
    (kept / "step-00000001" / SUMS).write_bytes(data)
    with pytest.raises(InputError) as caught:
        newest_good(kept)
    one_line(caught.value)


@fuzzed(2)
@given(config=JSON, index=JSON)
def test_the_papers_of_a_model(folder: Path, config: Any, index: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"attn_implementation": config, "x": config}))
    (folder / INDEX).write_text(json.dumps(index if isinstance(index, list) else {"weight_map": index}))
    try:
        vet_folder(folder)
    except InputError as error:
        one_line(error)


@fuzzed(2)
@given(values=JSON)
def test_groups_of_a_checkpoint(values: Any) -> None:
    """What a checkpoint's checksum has vouched for is still a mapping of known fields."""
    if not isinstance(values, dict):
        return
    with pytest.raises((TypeError, KeyError)):
        Group.from_dict(values)


SUMMARIES = st.recursive(
    st.one_of(st.none(), st.floats(), st.text(max_size=4), st.booleans(), st.integers()),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(
            ["methods", "title", "reference", "sft", "grpo", "gold_reward", "gold_reward_ci95", "win_rate",
            "judge",
             "reward_models", "head_to_head", "notes", "prompt", "outputs", "text", "score", "columns",
             "accuracy"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@fuzzed(1)
@given(summary=SUMMARIES, samples=st.just([]) | SUMMARIES, methods=st.booleans())
@example({"methods": {"sft": {"gold_reward": "x", "gold_reward_ci95": 3}}}, [{"prompt": 3}], False)
def test_a_made_up_study(
    folder: Path, capsys: pytest.CaptureFixture[str], summary: Any, samples: Any, methods: bool
) -> None:
    study = folder / "study"
    for name in ("sft", "grpo"):
        (study / name).mkdir(parents=True, exist_ok=True)
        (study / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    if methods and isinstance(summary, dict):
        summary = {"title": "t", "reference": "sft", **summary, "methods": {"sft": summary, "grpo": {}}}
    (study / "summary.json").write_text(json.dumps(summary))
    (study / "samples.json").write_text(json.dumps(samples))
    (study / "report.html").unlink(missing_ok=True)
    capsys.readouterr()
    code = run(["report", str(study)])
    said = capsys.readouterr()
    assert code in (0, 2)
    if code == 2:
        assert len(said.err.splitlines()) == 1
    else:
        assert "<script" not in (study / "report.html").read_text(encoding="utf-8")


LINEAGE = [
    "status",
    "method",
    "steps",
    "seed",
    "config_sha256",
    "digest",
    "inputs",
    "outputs",
    "scores",
    "ancestors",
    "computing",
    "environment",
    "code",
    "packages",
    "eval",
    "eval_step",
    "model",
    "sha256",
    "path",
    "role",
    "kind",
    "files",
    "date",
    "wall_s",
    "parent",
    "lines",
]
PAPERS = st.recursive(
    st.one_of(st.none(), st.floats(), st.integers(-3, 3), st.booleans(), st.sampled_from(["model", "data",
    "finished", "../..",
              "/", "a" * 64, "\x1b[2J", "\ud800", "\0", ""])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(LINEAGE), inner, max_size=5),
    max_leaves=15,
)  # fmt: skip


@fuzzed(4)
@given(
    lineage=st.dictionaries(st.sampled_from(LINEAGE), PAPERS, max_size=8) | PAPERS,
    config=st.sampled_from(["", "[", "seed = 3", "[train]\nlr = 'x'",
    "[run]\nout = '/'"]) | st.text(max_size=10),
    arguments=st.sampled_from(
        [["runs", "RUN"], ["runs", "--ancestry", "RUN"], ["runs", "--compare", "RUN", "RUN"], ["verify",
        "RUN", "--no-eval"],
         ["runs", "RUN", "--json"], ["runs", "RUN", "--where", "steps>1", "--sort", "method"],
         ["runs", "RUN", "--columns", "inputs,scores.eval"], ["verify", "RUN", "--no-eval", "--json"]]
    ),
)  # fmt: skip
@example({"ancestors": [{"ancestors": json.loads("[" * 60 + "]" * 60)}]}, "", ["runs", "--ancestry", "RUN"])
def test_a_made_up_run(
    folder: Path, capsys: pytest.CaptureFixture[str], lineage: Any, config: str, arguments: list[str]
) -> None:
    made = folder / "runs" / "run"
    (made / "model").mkdir(parents=True, exist_ok=True)
    (made / "lineage.json").write_text(json.dumps(lineage))
    (made / "config.toml").write_text(config, encoding="utf-8")
    (made / "metrics.jsonl").write_text(json.dumps(lineage) + "\n")
    before = sorted(p.name for p in made.rglob("*"))
    capsys.readouterr()
    code = run([part.replace("RUN", str(made)) for part in arguments])
    said = capsys.readouterr()
    assert code in (0, 1, 2)
    assert sorted(p.name for p in made.rglob("*")) == before
    assert "\x1b[2J" not in said.out + said.err
    if code == 2:
        assert len(said.err.splitlines()) == 1
