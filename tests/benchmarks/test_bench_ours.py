"""Our side of PPO, on a model of one layer: a request is one whole rollout, whatever its epochs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

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
    settings.write(tmp_path / "inputs")
    return tmp_path / "inputs"


@pytest.mark.parametrize(("epochs", "steps_per_rollout"), [("1", 2), ("4", 8)])
def test_a_request_is_one_rollout(epochs: str, steps_per_rollout: int, inputs: Path) -> None:
    requests = io.StringIO('{"cmd": "step"}\n' * 2)
    replies = io.StringIO()
    data = json.loads((inputs / "data.json").read_text())
    with pytest.raises(SystemExit):
        ours.run_ppo(str(inputs / "model"), data, Channel(requests, replies), epochs)
    ready, *steps = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert list(ready) == ["ready"]
    assert [list(step) for step in steps] == [["seconds"], ["seconds"]]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    # the row of the step at which the worker was told to leave is not written
    assert [row["step"] for row in rows if row["step"]][-1] == 2 * steps_per_rollout - 1
    generated = {row["step"]: row["generated_tokens"] for row in rows if row["step"]}
    rollout = settings.PPO_PROMPTS * settings.RESPONSE_TOKENS
    assert generated[steps_per_rollout] == rollout
    assert generated[steps_per_rollout + 1] == 2 * rollout
    assert all(row["response_tokens"] == settings.RESPONSE_TOKENS for row in rows if row["step"])
    learned = [row["reward/learned"] for row in rows if row["step"]]
    assert any(abs(value) > 0 for value in learned)
