"""The newsroom's tokenizer gives every text back; its model is the same for the same seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trimtab.errors import InputError
from trimtab.newsroom import gold
from trimtab.newsroom.model import new_model
from trimtab.newsroom.summaries import write_summary
from trimtab.newsroom.tokenizer import build_tokenizer, vocabulary
from trimtab.newsroom.world import make_article, prompt_of


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def newsroom_texts() -> list[str]:
    rng = random.Random(0)
    texts = []
    for index in range(200):
        article = make_article(11, index)
        texts += [prompt_of(article), gold.best_summary(article.facts)]
        texts += [write_summary(article, rng, rng.random()) for _ in range(3)]
    return texts


def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in newsroom_texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_vocabulary_is_closed_and_small(tokenizer: PreTrainedTokenizerFast) -> None:
    words = vocabulary()
    assert len(words) == len(set(words)) == len(tokenizer)
    assert 300 <= len(words) <= 600
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer("microsoft")["input_ids"] == [tokenizer.unk_token_id]


def test_nothing_is_added_and_specials_are_kept_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("acme . <eos>")["input_ids"]
    assert len(ids) == 3
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "acme ."


def test_prompt_and_completion_join_with_or_without_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    article = make_article(11, 0)
    prompt, completion = prompt_of(article), gold.best_summary(article.facts)
    apart = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
    assert tokenizer(f"{prompt} {completion}")["input_ids"] == apart
    assert tokenizer(prompt + completion)["input_ids"] == apart


def test_tokenizer_and_model_survive_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = new_model(len(tokenizer), 0, hidden_size=32).eval()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in newsroom_texts()[:50]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<pad>", "<eos>", "<bos>")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_model_is_seeded_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = new_model(50, 1), new_model(50, 1), new_model(50, 2)
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.model.layers[1].mlp.up_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_model_is_as_described() -> None:
    model = new_model(300, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # Embeddings 300·128, tied; two layers of 4·128² + 3·128·256 + 2·128; the last norm 128.
    assert model.num_parameters() == 300 * 128 + 2 * (4 * 128**2 + 3 * 128 * 256 + 2 * 128) + 128
    assert model.config.eos_token_id == 2
    wider = new_model(300, 0, hidden_size=64, layers=3, heads=2, intermediate_size=100, max_positions=99)
    assert wider.config.num_hidden_layers == 3
    assert wider.config.max_position_embeddings == 99
    assert wider.model.layers[0].mlp.up_proj.weight.shape == (100, 64)


def test_rope_theta_takes_effect() -> None:
    # Channel couple k of a head of 32 turns by theta^(−2k/32) a word: 20^(−1/16) = 0.829250 for k = 1.
    assert new_model(50, 0).model.rotary_emb.inv_freq[1].item() == pytest.approx(0.829250, abs=1e-5)
    slower = new_model(50, 0, rope_theta=10_000.0).model.rotary_emb.inv_freq[1].item()
    assert slower == pytest.approx(0.562341, abs=1e-5)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of twice heads"):
        new_model(50, 0, hidden_size=100, heads=3)
