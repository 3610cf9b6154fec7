"""The workers that are no training loop, on a model of one layer; and the picture of growth."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from benchmarks import growth, growth_points, inputs, ours_sampling, peak, plot, settings
from benchmarks.protocol import Channel
from trimtab.rollouts.engine import TreeSampler

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def talk(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """Run a worker's main for two steps; its replies."""
    replies = io.StringIO()
    requests = io.StringIO('{"cmd": "step"}\n' * 2 + '{"cmd": "peak"}\n')
    channel = Channel(requests, replies)
    monkeypatch.setattr(module, "Channel", lambda: channel)
    module.main(*arguments)
    found = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert [next(iter(reply)) for reply in found] == ["ready", "seconds", "seconds", "peak_mb"]
    return found


@pytest.mark.parametrize("workload", ["groups", "requests"])
def test_sampling_gives_each_response_its_length(
    workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workload == "requests" and "limits" not in inspect.signature(TreeSampler.sample).parameters:
        pytest.skip("the engine takes no limits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | TINY)
    monkeypatch.setattr(settings, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(settings, "RESPONSE_TOKENS", 4)
    monkeypatch.setattr(settings, "REQUESTS", 6)
    monkeypatch.setattr(settings, "REQUEST_NEW", (1, 9))
    inputs.write(tmp_path, ["model"])
    arguments = (str(tmp_path / "model"), str(tmp_path / "data.json"), f"{workload} generate")
    # the worker itself raises where a length is another than was asked for
    ready = talk(ours_sampling, monkeypatch, "sampling", *arguments)[0]["ready"]
    data = json.loads((tmp_path / "data.json").read_text())
    asked = 16 * 8 * 4 if workload == "groups" else sum(row["new"] for row in data["requests"])
    assert ready["tokens_per_step"] == asked
    assert ready["computes_in"] == "torch.bfloat16"


def test_peak_announces_what_the_fraction_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.MODEL_SIZES, "30M", TINY)
    ready = talk(peak, monkeypatch, "peak", "-", "-", "30M 2 2")[0]["ready"]
    # two trees, twice the work of one; the head alone is 128 tokens × 8,192 × 32
    assert ready["flops_per_step"] > 6 * 2 * 128 * 8192 * 32
    assert ready["peak_gflops"] > 0


def test_growth_runs_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.MODEL_SIZES, "30M", TINY)
    replies = talk(growth, monkeypatch, "growth", "-", "-", growth_points.Point(prompt=16, group=1).argument)
    assert replies[0]["ready"]["tokens_per_step"] == 4 * (16 + 64)
    assert replies[-1]["loaded_mb"] > 0


def test_a_picture_of_growth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"case": f"{case}, tuned allocator", "ours_s": 1.0 + i, "ours_above_model_mb": 100.0 + i}
        for i, case in enumerate(growth_points.points())
    ]
    (tmp_path / "growth.json").write_text(json.dumps({"rows": rows}))
    pictures = []
    for name in ("a.svg", "b.svg"):
        plot.draw_growth(tmp_path / "growth.json", tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert all(title in pictures[0] for title in growth_points.SWEEPS)
