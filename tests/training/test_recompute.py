"""Recomputation by a budget: fewer bytes kept, the same gradient to the last bit."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch

from trimtab.data.collate import collate, in_each_layout
from trimtab.errors import InputError
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, probe_groups
from trimtab.models.roles import frozen_copy
from trimtab.training.config import TrainConfig
from trimtab.training.recompute import (
    OWN,
    PROBE_TOKENS,
    fit_activations,
    forward_times,
    kept_bytes,
    layers_of,
)

FAMILIES = ["llama", "gemma3", "mixtral", "gpt2", "deepseek"]


def settled(family: str, **options: Any) -> LanguageModel:
    lm = families.tiny(family, **options)
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)))
    return lm


def budget(lm: LanguageModel, mb: int, tokens: int = 50_000) -> str | None:
    return fit_activations(lm, TrainConfig(activation_mb=mb, micro_batch_tokens=tokens))


def needs(lm: LanguageModel, tokens: int = 50_000) -> int:
    """MiB for these tokens, everything kept; experts' temporary tensors make it vary by a thousandth."""
    return math.ceil(1.01 * kept_bytes(lm) * tokens / PROBE_TOKENS / 2**20)


def again(lm: LanguageModel) -> int:
    """Layers that are computed again."""
    return sum(OWN in vars(layer) for layer in layers_of(lm))


def gradients(lm: LanguageModel) -> list[torch.Tensor | None]:
    batch = collate(families.groups(), layout=lm.layout)
    logps, entropy = lm.token_logprobs(batch, entropy=True)
    loss = (torch.linspace(-1, 1, logps.numel()).view(logps.shape) * (logps + entropy)).sum()
    return [loss, *torch.autograd.grad(loss, list(lm.model.parameters()), allow_unused=True)]


def assert_equal(ours: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def smallest(lm: LanguageModel) -> int:
    """The smallest budget that is taken, as the refusal states it."""
    with pytest.raises(InputError) as caught:
        budget(lm, 1)
    (found,) = re.findall(r"it takes (\d+);", str(caught.value))
    return int(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_budget_changes_a_bit_of_the_gradient(family: str, dtype: torch.dtype) -> None:
    lm = settled(family)
    lm.cast(dtype)
    truth = gradients(lm)
    whole, least = needs(lm), smallest(lm)
    assert again(lm) == 0
    assert least < whole
    counts = []
    for mb in (whole, (whole + least) // 2, least):
        fresh = copy.deepcopy(lm)
        line = budget(fresh, mb)
        assert line is not None
        counts.append(again(fresh))
        assert f"{counts[-1]} of {len(layers_of(lm))} layers" in line
        assert_equal(gradients(fresh), truth)
    assert counts[0] == 0
    assert 0 < counts[1] < counts[2] == len(layers_of(lm))


@pytest.mark.parametrize("layout", ["packed", "tree", "plain"])
def test_kept_bytes_fall_below_the_budget(layout: str) -> None:
    """Measured on a batch of the probe's size in the layout that the model has."""
    lm = families.tiny("llama")
    choose_layout(lm, in_each_layout(probe_groups(lm.vocab_size)), layout)
    assert lm.layout == layout
    whole, least = needs(lm), smallest(lm)
    kept = [kept_bytes(lm)]
    for mb in ((whole + least) // 2, least):
        fresh = copy.deepcopy(lm)
        budget(fresh, mb)
        kept.append(kept_bytes(fresh))
        assert kept[-1] * 50_000 / PROBE_TOKENS <= mb * 2**20
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < kept[0] / 4


def test_kept_bytes_by_hand() -> None:
    """A trunk of no layers keeps the hidden state for its last norm, and the norm one number a token."""
    lm = families.tiny("llama")
    before = kept_bytes(lm)
    lm.model.model.layers = torch.nn.ModuleList()  # type: ignore[union-attr]
    alone = kept_bytes(lm)
    assert PROBE_TOKENS * 32 * 4 <= alone < PROBE_TOKENS * 32 * 4 * 4
    assert before > 3 * 8 * PROBE_TOKENS * 32 * 4


def test_a_budget_too_small_says_what_would_do() -> None:
    lm = settled("llama")
    least = smallest(lm)
    with pytest.raises(InputError) as caught:
        budget(lm, least - 1)
    line = str(caught.value)
    assert "\n" not in line
    assert f"train.activation_mb = {least - 1}" in line
    assert f"it takes {least};" in line
    (tokens,) = re.findall(r"micro_batch_tokens to (\d+)", line)
    # Either advice is good, and one less is not.
    budget(copy.deepcopy(lm), least - 1, int(tokens))
    with pytest.raises(InputError):
        budget(lm, least - 1, int(tokens) + 50)
    assert again(lm) == 0


def test_no_budget_no_line() -> None:
    lm = settled("llama")
    assert budget(lm, 0) is None
    assert again(lm) == 0


def test_a_model_without_layers_is_refused() -> None:
    lm = settled("llama")
    lm.model.model.layers = torch.nn.ModuleList()  # type: ignore[union-attr]
    with pytest.raises(InputError, match="has no list of layers"):
        budget(lm, 100)


def test_without_a_gradient_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = settled("llama")
    groups = collate(families.groups(), layout=lm.layout)
    with torch.no_grad():
        truth = lm.token_logprobs(groups)[0]
    budget(lm, smallest(lm))

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("recomputation in a pass without gradient")

    monkeypatch.setattr("trimtab.training.recompute.checkpoint", refuse)
    with torch.no_grad():
        assert torch.equal(lm.token_logprobs(groups)[0], truth)
        lm.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        lm.token_logprobs(groups)


@pytest.mark.parametrize("copied", [copy.deepcopy, frozen_copy])
def test_a_copy_of_it_is_its_own(copied: Callable[[Any], Any]) -> None:
    """The copy that is sampled from while the policy learns must not have the policy's layers."""
    lm = settled("llama")
    budget(lm, smallest(lm))
    batch = collate(families.groups(), layout=lm.layout)
    twin = copied(lm)
    with torch.no_grad():
        before = lm.token_logprobs(batch)[0]
        assert torch.equal(twin.token_logprobs(batch)[0], before)
        for name, parameter in lm.model.named_parameters():
            if "layers" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert (lm.token_logprobs(batch)[0] - before).abs().max() > 0.1
        assert torch.equal(twin.token_logprobs(batch)[0], before)


def test_a_run_with_a_budget_is_the_run_without(configured: Callable[..., Any], tmp_path: Path) -> None:
    runs = []
    for out, mb in (("free", 0), ("tight", 2)):
        config = configured("dpo", out=out, train__activation_mb=mb, train__micro_batch_tokens=2048)
        result, metrics = tiny.train(config, "dpo")
        runs.append(tiny.comparable(metrics))
        lines = [
            line for line in (result.out / "lineage.json").read_text().splitlines() if "activations:" in line
        ]
        assert len(lines) == (mb > 0)
    assert "layers are computed again" in lines[0]
    assert not re.search(r"; 0 of", lines[0])
    assert runs[0] == runs[1]
    tiny.assert_same_run(tmp_path / "free", tmp_path / "tight")


def test_a_run_that_cannot_fit_is_refused_before_it_trains(configured: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"train\.activation_mb = 1 is too small for train\.micro_batch"):
        tiny.train(configured("dpo", train__activation_mb=1, train__micro_batch_tokens=10**6), "dpo")


def test_passes_without_gradient_take_more_at_once() -> None:
    lm = settled("llama")
    for layers, times in ((1, 1), (2, 1), (6, 3), (16, 8), (64, 8)):
        lm.trunk.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(layers)])
        assert forward_times(lm, TrainConfig()) == times
        assert forward_times(lm, TrainConfig(activation_mb=1)) == 1, "layers computed again keep little too"
