"""A plan never waits for the hub: files of this machine first, then one short question, then the limits."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.utils
from huggingface_hub import constants

from trimtab.errors import InputError
from trimtab.models import adapter_files
from trimtab.models.load import ModelConfig
from trimtab.planning import models
from trimtab.studies import job_hub, launch
from trimtab.studies.job import job_of

CARD = "bigcode/starcoder2-7b"


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every host that this process looks for; none is found, and the hub's cache is empty."""
    found: list[str] = []

    def refused(host: str, *arguments: Any, **named: Any) -> Any:
        found.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return found


def test_a_hub_that_is_away_is_asked_once(
    configured: Callable[..., Any], asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its client tries six times for each of several files, and waits 70 seconds in all."""
    config = configured("dpo", model__path=CARD, train__micro_batch_tokens=4096)
    _, facts, warnings = job_of("dpo", config)
    assert len(asked) == 1
    assert "the hub gave no answer; without a tokenizer" in warnings[0]
    assert facts["lengths"] == "the limits of the configuration"
    assert not caplog.records
    assert not constants.HF_HUB_OFFLINE
    assert logging.getLogger("huggingface_hub").level != logging.CRITICAL


def test_a_local_model_asks_nobody(configured: Callable[..., Any], asked: list[str]) -> None:
    config = configured("dpo", train__steps=1)
    _, facts, _ = job_of("dpo", config)
    assert facts["lengths"] == "all rows"
    launch.train("dpo", config)
    assert asked == []


def test_offline_means_offline(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        job_hub.tokenizer_at_hand(ModelConfig(path=CARD))
    assert asked == []


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_on_this_machine_comes_first(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, probes = list[bool](), list[int]()

    def load(config: ModelConfig) -> str:
        closed.append(constants.HF_HUB_OFFLINE)
        if constants.HF_HUB_OFFLINE and not cached:
            raise InputError("not here")
        return "tokenizer"

    def answers() -> bool:
        probes.append(1)
        return True

    monkeypatch.setattr(job_hub, "load_tokenizer", load)
    monkeypatch.setattr(models, "hub_answers", answers)
    assert job_hub.tokenizer_at_hand(ModelConfig(path="someone/something")) == "tokenizer"
    assert (closed, probes) == (([True], []) if cached else ([True, False], [1]))


def test_no_adapter_in_the_cache_is_not_none_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that follows in the same process asks for itself."""
    seen: list[bool] = []

    def find(name: str, revision: str) -> None:
        seen.append(constants.HF_HUB_OFFLINE)

    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", find)
    with job_hub.closed_hub():
        adapter_files.read_adapter("someone/planned-first")
    for _ in range(2):
        adapter_files.read_adapter("someone/planned-first")
    assert seen == [True, False]
