"""The critic and the reward model: read at the right places, in either layout, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trimtab.data.collate import collate, in_each_layout
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.models.layout import choose_scalar_layout, probe_groups
from trimtab.models.load import ModelConfig, load_classifier, load_scalar_model
from trimtab.models.scalar_model import ScalarModel
from trimtab.training.config import TrainConfig
from trimtab.training.export import save_model
from trimtab.training.optimiser import Optimiser


@pytest.fixture
def scalar(tiny_model: Path) -> ScalarModel:
    lm = load_scalar_model(
        ModelConfig(path=str(tiny_model), dtype="float32", device="cpu"), new_head="normal"
    )
    with torch.no_grad():
        lm.head.weight.mul_(4)  # so that a wrong place shows
    return lm


def test_scores_and_values_do_not_depend_on_the_layout(scalar: ScalarModel) -> None:
    groups = probe_groups(scalar.vocab_size)
    batches = in_each_layout(groups)
    assert choose_scalar_layout(scalar, batches) is None
    assert scalar.layout == "packed"
    plain = batches["plain"]
    for layout in ("packed", "tree"):
        batch = batches[layout]  # type: ignore[index]
        torch.testing.assert_close(scalar.scores(batch), scalar.scores(plain), atol=1e-5, rtol=0)
        torch.testing.assert_close(scalar.values(batch), scalar.values(plain), atol=1e-5, rtol=0)


def test_gradients_of_scores_and_values_do_not_depend_on_the_layout(scalar: ScalarModel) -> None:
    batches = in_each_layout(probe_groups(scalar.vocab_size))
    choose_scalar_layout(scalar, batches)
    found = []
    for batch in batches.values():
        values, scores = scalar.values(batch), scalar.scores(batch)
        loss = (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum()
        loss = loss + (scores[:, 0] * torch.linspace(1, 2, len(scores))).sum()
        grads = torch.autograd.grad(loss, list(scalar.model.parameters()), allow_unused=True)
        found.append([g for g in grads if g is not None])
    top = max(float(g.abs().max()) for g in found[0])
    assert len(found) == 3
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).abs().max() < 1e-5 * top


def test_scores_are_those_of_transformers(scalar: ScalarModel) -> None:
    groups = probe_groups(scalar.vocab_size)
    scores = iter(scalar.scores(collate(groups))[:, 0].tolist())
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*(group.prompt_tokens or []), *(response.tokens or [])]])
            assert next(scores) == pytest.approx(float(scalar.model(input_ids=ids).logits), abs=1e-5)


def test_a_value_is_that_of_the_state_before_the_token(scalar: ScalarModel) -> None:
    group = Group(id="g", prompt_tokens=[5, 6, 7], responses=[Response(tokens=[8, 9]), Response(tokens=[10])])
    values = scalar.values(collate([group]))
    # V before the first token is the prompt's and so the same for both; before the second it has seen 8.
    for ids, value in (([5, 6, 7], values[0, 0]), ([5, 6, 7], values[1, 0]), ([5, 6, 7, 8], values[0, 1])):
        assert float(value) == pytest.approx(
            float(scalar.model(input_ids=torch.tensor([ids])).logits), abs=1e-5
        )
    assert values[1, 1] == 0.0  # no token there
    later = float(scalar.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits)
    assert abs(float(values[0, 1]) - later) > 1e-3  # what a value read one token too late would be


def test_a_single_token_and_an_empty_response_have_their_last_places() -> None:
    group = Group(
        id="g",
        prompt_tokens=[5, 6, 7],
        responses=[Response(tokens=[8, 9]), Response(tokens=[]), Response(tokens=[4])],
    )
    assert collate([group]).lasts_N.tolist() == [4, 2, 5]
    assert collate([group], layout="plain").lasts_N.tolist() == [4, 5 + 2, 10 + 3]


def test_masked_tokens_have_no_value_but_count_for_the_score(scalar: ScalarModel) -> None:
    response = Response(tokens=[8, 9], mask=[True, False])
    batch = collate([Group(id="g", prompt_tokens=[5, 6], responses=[response])])
    whole = collate([Group(id="g", prompt_tokens=[5, 6], responses=[Response(tokens=[8, 9])])])
    assert scalar.values(batch)[0, 1] == 0.0
    assert torch.equal(scalar.scores(batch), scalar.scores(whole))


def test_a_bf16_trunk_is_read_in_fp32(scalar: ScalarModel) -> None:
    scalar.cast(torch.bfloat16)
    assert scalar.scores(collate(probe_groups(scalar.vocab_size))).dtype == torch.float32


def test_a_saved_model_loads_with_transformers_and_scores_alike(scalar: ScalarModel, tmp_path: Path) -> None:
    save_model(scalar, Optimiser(scalar.model, TrainConfig(), torch.float32), tmp_path / "rm", "float32")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    # Padded on the right with an end token inside: transformers must read at the end token, not before it.
    end = tokenizer.eos_token_id
    rows = [[5, 6, 7, 8, end], [5, 6, end]]
    pad = loaded.config.pad_token_id
    assert pad != end
    ids = torch.tensor([row + [pad] * (5 - len(row)) for row in rows])
    theirs = loaded(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0]
    groups = [
        Group(id=str(i), prompt_tokens=row[:2], responses=[Response(tokens=row[2:])])
        for i, row in enumerate(rows)
    ]
    ours = scalar.scores(collate(groups))[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_new_head_follows_the_seed_and_the_width(tiny_model: Path) -> None:
    config = ModelConfig(path=str(tiny_model), dtype="float32", device="cpu")
    heads = [load_scalar_model(config, new_head="normal", seed=s).head.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.3 < float(heads[0].std()) * (16 + 1) ** 0.5 < 2
    assert not load_scalar_model(config, new_head="zeros").head.weight.any()


def test_a_causal_model_is_no_reward_model(tiny_model: Path) -> None:
    config = ModelConfig(path=str(tiny_model), dtype="float32", device="cpu")
    with pytest.raises(InputError, match="no reward head"):
        load_scalar_model(config)
    with pytest.raises(InputError, match="no reward model"):
        load_classifier(config)


def test_a_family_that_cannot_be_a_tree_falls_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(tiny.VOCABULARY), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    lm = load_scalar_model(ModelConfig(path=str(tmp_path), dtype="float32", device="cpu"), new_head="normal")
    groups = probe_groups(lm.vocab_size)
    batches = in_each_layout(groups)
    assert choose_scalar_layout(lm, batches) is None  # GPT-2 can; then a model that ignores the mask cannot
    assert lm.layout == "packed"
    lm._plan = lm._tree_masks = lambda batch: None  # type: ignore[method-assign]
    line = choose_scalar_layout(lm, batches)
    assert line is not None
    assert "does not support the tree layout" in line
    assert lm.layout == "plain"
