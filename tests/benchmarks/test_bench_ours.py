"""Our side of PPO, on a model of one layer: a request is one whole rollout, whatever its epochs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import inputs as written
from benchmarks import ours, settings
from benchmarks.protocol import Channel

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | TINY)
    monkeypatch.setattr(settings, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(settings, "RESPONSE_TOKENS", 4)
    monkeypatch.setattr(settings, "ROLLOUTS", {"8": settings.Rollout(8, 8, 4)})
    monkeypatch.setattr(settings, "PAIRS", {"shared": settings.Pairs("pairs", 8, 4)})
    monkeypatch.setattr(settings, "SFT_LENGTHS", (4, 12))
    monkeypatch.setattr(settings, "SFT_TOKENS", 256)
    monkeypatch.setattr(written, "PAIRS", settings.PAIRS)
    written.write(tmp_path / "inputs")
    return tmp_path / "inputs"


@pytest.mark.parametrize(("epochs", "steps_per_rollout"), [("1", 2), ("4", 8)])
def test_a_request_is_one_rollout(epochs: str, steps_per_rollout: int, inputs: Path) -> None:
    requests = io.StringIO('{"cmd": "step"}\n' * 2)
    replies = io.StringIO()
    data = json.loads((inputs / "data.json").read_text())
    with pytest.raises(SystemExit):
        ours.run_ppo(str(inputs / "model"), data, Channel(requests, replies), f"8 {epochs}")
    ready, *steps = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert list(ready) == ["ready"]
    assert [list(step) for step in steps] == [["seconds"], ["seconds"]]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    # the row of the step at which the worker was told to leave is not written
    assert [row["step"] for row in rows if row["step"]][-1] == 2 * steps_per_rollout - 1
    generated = {row["step"]: row["generated_tokens"] for row in rows if row["step"]}
    rollout = 8 * settings.RESPONSE_TOKENS
    assert generated[steps_per_rollout] == rollout
    assert generated[steps_per_rollout + 1] == 2 * rollout
    assert all(row["response_tokens"] == settings.RESPONSE_TOKENS for row in rows if row["step"])
    learned = [row["reward/learned"] for row in rows if row["step"]]
    assert any(abs(value) > 0 for value in learned)


@pytest.mark.parametrize(
    ("name", "model", "variant", "groups"),
    [("dpo", "model", ["shared"], 8), ("sft", "model", ["packed"], 32), ("reward", "reward", [], 8)],
)
def test_a_request_is_one_optimiser_step(
    name: str, model: str, variant: list[str], groups: int, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = io.StringIO('{"cmd": "step"}\n' * 3 + '{"cmd": "peak"}\n')
    replies = io.StringIO()
    channel = Channel(requests, replies)
    monkeypatch.setattr(ours, "Channel", lambda: channel)
    method, _ = ours.RUN[name]
    for loader in ("load_model", "load_scalar_model"):
        if hasattr(method, loader):
            # main() replaces it; put back what was there, for the tests that follow
            monkeypatch.setattr(method, loader, getattr(method, loader))
    with pytest.raises(SystemExit):
        ours.main(name, str(inputs / model), str(inputs / "data.json"), *variant)
    ready, *steps, peak = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert ready["ready"]["parameters"] > 0
    assert [list(step) for step in steps] == [["seconds"]] * 3
    # the system counts resident pages in batches, so the two may be off by a few
    assert 0 < peak["loaded_mb"] <= peak["peak_mb"] + 16
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"]]
    assert [row["step"] for row in rows] == [1, 2]
    data = json.loads((inputs / "data.json").read_text())
    epoch = len(data["demonstrations"]) if name == "sft" else len(data["pairs"])
    assert rows[0]["epoch"] in (0, pytest.approx(groups / epoch))
