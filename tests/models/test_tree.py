"""The tree layout = the plain layout = the model's own call, over families, kernels and windows."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import families
import pytest
import torch
import transformers as hf

from trimtab.batch import TreeBatch
from trimtab.data.collate import collate, in_each_layout
from trimtab.models.language_model import LanguageModel
from trimtab.models.layout import choose_layout, choose_scalar_layout, probe_groups, short_windows
from trimtab.models.load import wrap
from trimtab.models.scalar_model import ScalarModel

KERNELS = [(f, k) for f in families.TREE for k in ("sdpa", "eager") if (f, k) != ("gemma2", "sdpa")]


@torch.no_grad()
def logps_of(lm: LanguageModel, batch: TreeBatch, temperature: float = 1.0) -> torch.Tensor:
    return lm.token_logprobs(batch, temperature=temperature)[0]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def settle(lm: LanguageModel) -> str | None:
    probes = probe_groups(lm.vocab_size)
    return choose_layout(lm, in_each_layout(probes))


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
def test_tree_is_plain_is_direct(family: str, kernel: str) -> None:
    lm, groups = families.tiny(family, kernel), families.groups()
    truth = families.direct_logprobs(lm, groups)
    assert largest(logps_of(lm, collate(groups, layout="plain")), truth) < 1e-5
    assert largest(logps_of(lm, collate(groups)), truth) < 1e-5
    assert settle(lm) is None
    assert (lm.layout, lm.chunked_head) == ("packed" if kernel == "sdpa" else "tree", True)


@pytest.mark.parametrize("family", families.TREE)
def test_positions_carry_the_tree(family: str) -> None:
    """With positions counted along the packed row, as a model does by itself, siblings push each other on."""
    lm, groups = families.tiny(family), families.groups()
    batch = collate(groups)
    packed = torch.arange(batch.input_ids_BL.shape[1]).expand_as(batch.input_ids_BL)
    wrong = dataclasses.replace(batch, position_ids_BL=packed)
    assert largest(logps_of(lm, wrong), families.direct_logprobs(lm, groups)) > 0.05


@pytest.mark.parametrize("family", families.WINDOWED)
def test_windows_are_part_of_the_tree_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its window the mask is a full tree, and the numbers are those of another model."""
    lm, groups = families.tiny(family), families.groups()
    truth = families.direct_logprobs(lm, groups)
    windowed = TreeBatch.attention_mask_BLL
    monkeypatch.setattr(TreeBatch, "attention_mask_BLL", lambda batch, window=None: windowed(batch))
    assert largest(logps_of(lm, collate(groups)), truth) > 0.5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_response_does_not_see_its_siblings(kernel: str) -> None:
    lm, groups = families.tiny("llama", kernel), families.groups()
    before = logps_of(lm, collate(groups))
    groups[0].responses[0].tokens = [5] * 7
    after = logps_of(lm, collate(groups))
    assert not torch.equal(before[0], after[0])
    assert largest(before[1:], after[1:]) < 1e-5


@pytest.mark.parametrize("layout", ["tree", "plain"])
def test_padding_and_neighbours_change_nothing(layout: str) -> None:
    lm, groups = families.tiny("mistral"), families.groups()
    together = logps_of(lm, collate(groups, layout=layout, pad_id=7))  # type: ignore[arg-type]
    alone = logps_of(lm, collate(groups[1:2], layout=layout))  # type: ignore[arg-type]
    assert largest(together[3:5, :5], alone) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_temperature_divides_the_finished_logits(family: str) -> None:
    lm, groups = families.tiny(family), families.groups()
    truth = families.direct_logprobs(lm, groups, temperature=0.7)
    assert largest(logps_of(lm, collate(groups), 0.7), truth) < 1e-5
    assert largest(truth, families.direct_logprobs(lm, groups)) > 0.1


def _sharp(scores: bool = False) -> Any:
    """24 layers in bf16 whose outputs rounding moves as it does a trained model's: by tenths of a nat."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "vocab_size": 512}
    config = hf.Qwen2Config(
        **sizes, num_hidden_layers=24, num_key_value_heads=2, initializer_range=0.2, num_labels=1
    )
    kind = hf.AutoModelForSequenceClassification if scores else hf.AutoModelForCausalLM
    model = kind.from_config(config).to(torch.bfloat16)
    return ScalarModel(model, None, "tree") if scores else wrap(model, None)


@pytest.mark.parametrize("scores", [False, True])
def test_rounding_of_a_sharp_model_is_no_fault_of_a_layout(scores: bool) -> None:
    """Its gap in bf16 is over what is allowed in general, and as large between two plain forms."""
    lm = _sharp(scores)
    choose: Any = choose_scalar_layout if scores else choose_layout
    right = in_each_layout(probe_groups(lm.vocab_size))
    if not scores:
        lm.layout = "tree"
        with torch.no_grad(), short_windows(lm):
            gap = lm.token_logprobs(right["tree"])[0] - lm.token_logprobs(right["plain"])[0]
        assert float(gap.abs().max()) > 0.05
    assert choose(lm, right) is None
    assert lm.layout == "packed"
    # Siblings that push each other on are found all the same.
    wrong = {
        layout: dataclasses.replace(
            batch,
            position_ids_BL=torch.arange(batch.input_ids_BL.shape[1]).expand_as(batch.input_ids_BL),
        )
        for layout, batch in right.items()
    }
    assert "differ" in choose(lm, wrong | {"plain": right["plain"]})
    assert lm.layout == "plain"


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bloom", "ValueError"), ("gptneo", "packed places"), ("llama4", "differ"), ("mamba", "TypeError")],
)
def test_what_cannot_be_a_tree_falls_back_to_plain_with_a_line(family: str, reason: str) -> None:
    lm, groups = families.tiny(family), families.groups()
    line = settle(lm)
    assert lm.layout == "plain"
    assert line is not None
    assert reason in line
    assert "\n" not in line
    truth = families.direct_logprobs(lm, groups)
    assert largest(logps_of(lm, collate(groups, layout="plain")), truth) < 1e-5


def test_a_window_over_packed_places_passes_a_short_probe_and_fails_a_long_row() -> None:
    """Why the check looks at GPT-Neo's masks: the probe's rows are shorter than its window of 40."""
    lm = families.tiny("gptneo")
    probes = probe_groups(lm.vocab_size)
    assert largest(logps_of(lm, collate(probes)), families.direct_logprobs(lm, probes)) < 1e-5
    long = [dataclasses.replace(families.groups()[0], responses=families.groups()[0].responses * 3)]
    assert largest(logps_of(lm, collate(long)), families.direct_logprobs(lm, long)) > 0.05


def test_a_check_leaves_windows_as_they_were() -> None:
    lm = families.tiny("mistral")
    settle(lm)
    assert lm.config.sliding_window == families.WINDOW
    layers = {m.sliding_window for m in lm.model.modules() if hasattr(m, "sliding_window")}
    assert layers <= {families.WINDOW}


def test_a_window_wider_than_the_probe_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that forgets windows passes a short probe unless the windows are shrunk for it."""
    lm = families.tiny("mistral", "eager")
    for holder in [lm.config, *lm.model.modules()]:
        if getattr(holder, "sliding_window", None):
            holder.sliding_window = 4096
    windowed = TreeBatch.attention_mask_BLL
    monkeypatch.setattr(TreeBatch, "attention_mask_BLL", lambda batch, window=None: windowed(batch))
    line = settle(lm)
    assert lm.layout == "plain"
    assert line is not None
    assert "differ" in line


def gradients(lm: LanguageModel, batch: TreeBatch) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every token's log-probability and entropy differently."""
    logps, entropy = lm.token_logprobs(batch, temperature=0.8, entropy=True)
    weights = torch.linspace(-1, 1, logps.numel(), dtype=torch.float64).view(logps.shape)
    loss = (weights * logps + weights.flip(0) * entropy).sum()
    named = dict(lm.model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


class Double:
    """torch with fp32 replaced by fp64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mixtral", "gpt2"])
def test_gradients_of_the_tree_are_those_of_the_plain_layout(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, groups = families.tiny(family, dtype=torch.float64), families.groups()
    # transformers takes norms, angles and softmax in fp32 whatever the model's dtype: 1e-6 is all that would
    # be seen of a difference. For this test it takes them in fp64 (and the experts by their plain loop).
    monkeypatch.setattr(sys.modules[type(lm.model).__module__], "torch", Double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    lm.config._experts_implementation = "eager"
    tree, plain = (gradients(lm, collate(groups, layout=layout)) for layout in ("tree", "plain"))
    moved = 0
    for name, gradient in plain.items():
        if gradient is None:
            assert tree[name] is None
            continue
        moved += bool(gradient.any())
        assert largest(tree[name], gradient) <= 1e-10 * max(1.0, float(gradient.abs().max())), name
    assert moved > len(plain) / 2


def test_masked_tokens_and_rows_without_responses_cost_no_log_probability() -> None:
    lm, groups = families.tiny("llama"), families.groups()
    whole = logps_of(lm, collate(groups))
    groups[0].responses[2].mask = [True, False] * 5 + [True]
    part = collate(groups)
    got = logps_of(lm, part)
    assert not got[~part.mask_NT].any()
    assert largest(got[part.mask_NT], whole[part.mask_NT]) < 1e-6
    for response in groups[0].responses:
        response.mask = [False] * len(response.tokens or ())
    empty = collate(groups[:1])
    logps, entropy = lm.token_logprobs(empty, entropy=True)
    assert not logps.any()
    assert not entropy.any()
    logps.sum().backward()
