"""The data that both sides are given: lengths, ids, and that the tokenizer turns text into those ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth_points, inputs, settings
from benchmarks.workloads import sorted_batches, workload_of


def test_data_has_the_stated_lengths() -> None:
    data = inputs.make_data()
    assert len(data["prompts"]) == 4 * settings.STEPS_OF_DATA
    assert {len(ids) for ids in data["prompts"]} == {256}
    for pair in data["pairs"]:
        assert (len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])) == (256, 64, 64)
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"].count(settings.END_ID) == 1
        assert pair["chosen"][-1] == settings.END_ID
    # a call that asked for more prompts than there are would repeat some within it
    for rollout in settings.ROLLOUTS.values():
        assert len(data["prompts"]) % rollout.prompts == 0
        assert rollout.prompts % rollout.mini_batch == 0
    assert len(data["prompts"]) % settings.SAMPLING_PROMPTS == 0
    for shape in settings.PAIRS.values():
        assert len(data[shape.key]) == settings.DPO_PAIRS * shape.steps
        found = {(len(p["prompt"]), len(p["chosen"]), len(p["rejected"])) for p in data[shape.key]}
        assert found == {(shape.prompt, shape.response, shape.response)}
    words = range(settings.FIRST_WORD_ID, settings.VOCABULARY)
    assert all(token in words for ids in data["prompts"] for token in ids)


def test_demonstrations_have_mixed_lengths_of_one_sum() -> None:
    rows = inputs.make_data()["demonstrations"]
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in rows]
    assert (len(lengths), sum(lengths)) == (32, 8192)
    low, high = settings.SFT_LENGTHS
    assert all(low <= length <= high for length in lengths)
    # uniform draws: a standard deviation of 143 around 264
    assert max(lengths) - min(lengths) > 300
    assert all(row["prompt"] and row["completion"][-1] == settings.END_ID for row in rows)


def test_requests_are_drawn_between_the_bounds() -> None:
    data = inputs.make_data()
    call = workload_of(data, "requests generate-16", 0)
    assert len(call.prompts) == 128
    assert call.tokens == sum(call.new)
    assert all(8 <= new <= 256 for new in call.new)
    assert all(16 <= len(ids) <= 96 for ids in call.prompts)
    assert max(call.new) > 200 > 60 > min(call.new)
    assert workload_of(data, "requests vllm", 5) == call


def test_groups_take_other_prompts_at_each_step() -> None:
    data = inputs.make_data()
    first, second = (workload_of(data, "groups generate", step) for step in (0, 1))
    assert (len(first.prompts), first.responses, first.tokens) == (16, 8, 8192)
    assert all(ids not in second.prompts for ids in first.prompts)
    assert workload_of(data, "groups generate", 4) == first


def test_sorted_batches_hold_every_request_and_run_to_their_longest() -> None:
    data = inputs.make_data()
    call = workload_of(data, "requests generate-32", 0)
    batches = sorted_batches(call, 32)
    assert [len(batch.prompts) for batch in batches] == [32] * 4
    assert sorted(ids for batch in batches for ids in batch.prompts) == sorted(call.prompts)
    longest = [batch.new[0] for batch in batches]
    assert longest == sorted(call.new, reverse=True)[::32]


def test_growth_moves_one_quantity_at_a_time() -> None:
    base = growth_points.Point()
    points = growth_points.points()
    assert {"group size 64", "prompt 4,096", "vocabulary 152,064", "model 500M"} <= points.keys()
    for point in points.values():
        moved = [
            f for f in ("model", "vocabulary", "group", "prompt") if getattr(point, f) != getattr(base, f)
        ]
        assert len(moved) <= 1
        assert growth_points.Point.parse(point.argument) == point
        assert point.config["max_position_embeddings"] >= point.prompt + growth_points.RESPONSE_TOKENS


def test_rollout_of_a_variant() -> None:
    assert settings.rollout_of("32 4 as-installed") == (settings.ROLLOUTS["32"], 4, True)
    assert settings.rollout_of("8 1") == (settings.ROLLOUTS["8"], 1, False)


def test_data_is_the_same_each_time() -> None:
    assert inputs.make_data() == inputs.make_data()


def test_reward_is_the_share_of_even_characters() -> None:
    assert settings.reward("bdac") == 0.5  # b and d are 98 and 100, a and c 97 and 99
    assert settings.reward("bbdb") == 1.0
    assert settings.reward("") == 0.0


def test_fingerprint_follows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = inputs.fingerprint()
    monkeypatch.setattr(settings, "PROMPT_TOKENS", 128)
    assert inputs.fingerprint() != before


def test_tokenizer_gives_the_ids_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | {"num_hidden_layers": 1, "intermediate_size": 64})
    inputs.write_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == settings.VOCABULARY
    ids = list(range(settings.FIRST_WORD_ID, settings.VOCABULARY))
    assert tokenizer(settings.to_text(ids) + "<end>")["input_ids"] == [*ids, settings.END_ID]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (settings.PAD_ID, settings.END_ID)


def test_reward_model_reads_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(settings, "QWEN2", settings.QWEN2 | {"num_hidden_layers": 1, "intermediate_size": 64})
    inputs.write(tmp_path)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "reward")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert reward.score.weight.shape == (1, settings.QWEN2["hidden_size"])
    assert reward.score.weight.abs().sum() > 0
    assert not (reward.model.embed_tokens.weight == policy.model.embed_tokens.weight).all()


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({}, 30.2),
        ({"vocab_size": settings.LARGE_VOCABULARY}, 103.8),
        (settings.MODEL_SIZES["3M"], 3.35),
        (settings.MODEL_SIZES["91M"], 91.3),
        (settings.MODEL_SIZES["124M"], 123.6),
        (settings.MODEL_SIZES["500M"], 502),
    ],
)
def test_models_have_the_stated_sizes(changes: dict[str, int], millions: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(settings.QWEN2 | changes)))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    assert size == pytest.approx(millions, rel=0.01)
