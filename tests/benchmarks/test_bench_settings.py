"""The data that both sides are given: lengths, ids, and that the tokenizer turns text into those ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import settings


def test_data_has_the_stated_lengths() -> None:
    data = settings.make_data()
    assert len(data["prompts"]) == 4 * settings.STEPS_OF_DATA
    assert {len(ids) for ids in data["prompts"]} == {256}
    for pair in data["pairs"]:
        assert (len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])) == (256, 64, 64)
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"].count(settings.END_ID) == 1
        assert pair["chosen"][-1] == settings.END_ID
    # a rollout that asked for more prompts than there are would repeat some within it
    assert len(data["prompts"]) % settings.PPO_PROMPTS == 0
    assert settings.PPO_PROMPTS % settings.PPO_MINI_BATCH == 0
    words = range(settings.FIRST_WORD_ID, settings.VOCABULARY)
    assert all(token in words for ids in data["prompts"] for token in ids)


def test_data_is_the_same_each_time() -> None:
    assert settings.make_data() == settings.make_data()


def test_reward_is_the_share_of_even_characters() -> None:
    assert settings.reward("bdac") == 0.5  # b and d are 98 and 100, a and c 97 and 99
    assert settings.reward("bbdb") == 1.0
    assert settings.reward("") == 0.0


def test_fingerprint_follows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings.fingerprint()
    monkeypatch.setattr(settings, "PROMPT_TOKENS", 128)
    assert settings.fingerprint() != before


def test_tokenizer_gives_the_ids_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | {"num_hidden_layers": 1, "intermediate_size": 64})
    settings.write_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == settings.VOCABULARY
    ids = list(range(settings.FIRST_WORD_ID, settings.VOCABULARY))
    assert tokenizer(settings.to_text(ids) + "<end>")["input_ids"] == [*ids, settings.END_ID]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (settings.PAD_ID, settings.END_ID)


def test_reward_model_reads_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | {"num_hidden_layers": 1, "intermediate_size": 64})
    settings.write(tmp_path)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "reward")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert reward.score.weight.shape == (1, settings.QWEN2["hidden_size"])
    assert reward.score.weight.abs().sum() > 0
    assert not (reward.model.embed_tokens.weight == policy.model.embed_tokens.weight).all()


def test_model_has_the_stated_size() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings.QWEN2))
    assert sum(p.numel() for p in model.parameters()) == 30_163_456
