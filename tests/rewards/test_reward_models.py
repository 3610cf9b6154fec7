"""A reward model as a term: the scores are those that its own forward pass gives, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trimtab.cli.main import run
from trimtab.config import dump_toml
from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.rewards.base import Mixture, RewardConfig, RewardTerm
from trimtab.rewards.functions import build_mixture
from trimtab.rewards.models import RewardModel, build_reward_model

LABELS = ["toxic", "neutral", "kind"]


def group(id: str, prompt: Any, *texts: str) -> Group:
    return Group(id=id, prompt=prompt, responses=[Response(text=text) for text in texts])


GROUPS = [
    ("p:0", "a b c", ("d", "e f g", "h i", "j")),
    ("p:1", "k", ("l m n o p", "")),
    ("p:0", "q r", ("s",)),  # an id that comes up twice, as in a rollout that reads a prompt again
]


def groups() -> list[Group]:
    return [group(id, prompt, *texts) for id, prompt, texts in GROUPS]


def own_score(folder: Path, ids: list[int]) -> list[float]:
    """transformers alone, one sequence without padding."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def ids_of(prompt: Any, text: Any) -> list[int]:
    tokenizer = tiny.tokenizer()
    words = tokenizer(f"{prompt} {text}", add_special_tokens=False)["input_ids"]
    return [*words, tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_reward_model(tmp_path_factory.mktemp("rm") / "rm")


# ---------------------------------------------------------------- decoders


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_scores_of_a_group_are_those_of_each_text_alone(batch_tokens: int, scored: Path) -> None:
    scorer = build_reward_model({"path": str(scored), "batch_tokens": batch_tokens})
    assert scorer.scalar is not None, "it was meant to be computed as trees"
    assert scorer.scalar.layout == "packed"
    found: Any = scorer.score(groups())
    for (_, prompt, texts), row in zip(GROUPS, found, strict=True):
        for text, outputs in zip(texts, row, strict=True):
            [expected] = own_score(scored, ids_of(prompt, text))
            assert outputs == {"": pytest.approx(expected, abs=1e-5)}
    values = [outputs[""] for row in found for outputs in row]
    assert len({round(value, 4) for value in values}) == len(values), "a model that tells nothing apart"
    assert scorer.notes == []
    assert scorer.facts() == {"reward_model_truncated": 0.0}


def test_a_trained_reward_model_as_a_term(configured: Callable[..., Any]) -> None:
    result, _ = tiny.train(configured("reward", train__steps=10, train__batch_groups=8), "reward")
    folder = result.out / "model"
    term = {"name": "reward_model", "weight": 2.0, "label": "learned", "args": {"path": str(folder)}}
    mixture = build_mixture(RewardConfig.model_validate({"terms": [term]}))
    assert mixture.models == 1
    rows = groups()
    report = mixture.score(rows)
    assert report.facts == {"reward_model_truncated": 0.0}
    for row in rows:
        for response in row.responses:
            [expected] = own_score(folder, ids_of(row.prompt, response.text))
            assert response.reward_terms == {"learned": pytest.approx(expected, abs=1e-5)}
            assert response.reward == pytest.approx(2 * expected, abs=1e-5)
            assert response.tokens is None, "what the policy drew is not touched"


def test_padding_that_is_the_end_token_is_read_as_the_model_reads_it(tmp_path: Path) -> None:
    """transformers then reads before the end token; so does the term, and it says so."""
    folder = tiny.save_reward_model(tmp_path / "gpt-like", pad_token_id=2)
    scorer = build_reward_model({"path": str(folder)})
    assert scorer.scalar is None
    [line] = scorer.notes
    assert "does not read at the last token" in line
    found: Any = scorer.score(groups())
    ends_apart = []
    for (_, prompt, texts), row in zip(GROUPS, found, strict=True):
        for text, outputs in zip(texts, row, strict=True):
            [expected] = own_score(folder, ids_of(prompt, text))
            assert outputs == {"": pytest.approx(expected, abs=1e-5)}
            [before] = own_score(folder, ids_of(prompt, text)[:-1])
            ends_apart.append(abs(expected - before))
    assert max(ends_apart) < 1e-5, "the end token was meant to be taken for padding"


def test_a_tokenizer_that_pads_otherwise_than_the_model_pads_nothing(tmp_path: Path) -> None:
    """transformers reads at the last token that is not the model's padding: the tokenizer's would be read."""
    folder = tiny.save_reward_model(tmp_path / "rm", pad_token_id=1)
    assert tiny.tokenizer().pad_token_id != 1
    scorer = build_reward_model({"path": str(folder), "input": "response"})
    found: Any = scorer.score(groups())
    lone = [
        scorer.score([group("x", "a", text)])[0][0][""] for _, _, texts in GROUPS for text in texts if text
    ]
    together = [
        o[""]
        for (_, _, texts), row in zip(GROUPS, found, strict=True)
        for t, o in zip(texts, row, strict=True)
        if t
    ]
    assert together == pytest.approx(lone, abs=1e-5)
    assert len({round(value, 4) for value in lone}) > 3


def test_another_tokenizer_reads_the_text_anew(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids for the same words are others: were the policy's ids passed on, the scores would be wrong."""
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "VOCABULARY", [*tiny.SPECIALS, *reversed(tiny.VOCABULARY[6:])])
        folder = tiny.save_reward_model(tmp_path / "other", seed=3)
        theirs = [ids_of("a b c", text) for text in ("d", "e f g")]
    assert theirs[0] != ids_of("a b c", "d")
    scorer = build_reward_model({"path": str(folder)})
    sampled = group("p:0", "a b c", "d", "e f g")
    sampled.prompt_tokens = [6, 7, 8]
    for response in sampled.responses:
        response.tokens = ids_of("", response.text)
    found = scorer.score([sampled])[0]
    for ids, outputs in zip(theirs, found, strict=True):
        assert outputs == {"": pytest.approx(own_score(folder, ids)[0], abs=1e-5)}
    line = scorer.differs_from(tiny.tokenizer())
    assert line is not None
    assert "other has another tokenizer than the policy: responses reach it as text" in line
    same = build_reward_model({"path": str(scored)})
    assert same.differs_from(tiny.tokenizer()) is None
    other_template = tiny.tokenizer()
    other_template.chat_template = "{{ messages }}"
    assert "another chat template" in str(same.differs_from(other_template))


def test_a_run_says_that_the_tokenizer_differs(
    configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "VOCABULARY", [*tiny.SPECIALS, *reversed(tiny.VOCABULARY[6:])])
        folder = tiny.save_reward_model(tmp_path / "other")
    terms = [{"name": "reward_model", "args": {"path": str(folder)}}]
    result, _ = tiny.train(configured("grpo", train__steps=1, reward__terms=terms), "grpo")
    text = (result.out / "lineage.json").read_text()
    assert "another tokenizer than the policy" in text
    assert '"models_in_memory": 3' in text


def test_conversations_are_read_through_its_own_template(scored: Path) -> None:
    scorer = build_reward_model({"path": str(scored)})
    chat = [{"role": "user", "content": "a b"}]
    [[outputs]] = scorer.score([group("c:0", chat, "d e")])
    text = "<|im_start|> user a b <|im_end|> <|im_start|> assistant d e <|im_end|>"
    ids = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert outputs == {"": pytest.approx(own_score(scored, ids)[0], abs=1e-5)}


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_a_decoder_of_several_outputs(activation: str, tmp_path: Path) -> None:
    folder = tiny.save_reward_model(
        tmp_path / "several", id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}
    )
    scorer = build_reward_model(
        {"path": str(folder), "outputs": {"kind": 1.0, "toxic": -2.0}, "activation": activation}
    )
    one = group("p:0", "a b", "c", "d e")
    Mixture([RewardTerm("model", 0.5, scorer)]).score([one])
    for response in one.responses:
        logits = torch.tensor(own_score(folder, ids_of("a b", response.text)))
        chosen = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1)}[activation]
        toxic, _, kind = chosen.tolist()
        assert response.reward_terms == {
            "model/kind": pytest.approx(kind, abs=1e-5),
            "model/toxic": pytest.approx(toxic, abs=1e-5),
        }
        assert response.reward == pytest.approx(0.5 * (kind - 2 * toxic), abs=1e-5)


def test_bf16_is_near(scored: Path) -> None:
    values = []
    for dtype in ("float32", "bfloat16"):
        found: Any = build_reward_model({"path": str(scored), "dtype": dtype}).score(groups())
        values.append(torch.tensor([outputs[""] for row in found for outputs in row]))
    assert 0 < float((values[0] - values[1]).abs().max()) < 0.1


# ---------------------------------------------------------------- what is too long


def test_what_exceeds_the_context_is_cut_and_counted(scored: Path) -> None:
    """Of the prompt the oldest words go; each response is cut for itself, so siblings change no score."""
    scorer = build_reward_model({"path": str(scored)})
    prompt = " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(40))
    long = " ".join("0123456789"[i % 10] for i in range(12))
    both = scorer.score([group("p:0", prompt, "a b", long)])[0]
    assert scorer.facts() == {"reward_model_truncated": 1.0}, (
        "40 + 2 + 1 tokens fit in 48; 40 + 12 + 1 do not"
    )
    ids = ids_of(prompt, "a b")
    assert both[0] == {"": pytest.approx(own_score(scored, ids)[0], abs=1e-5)}
    assert both[1] == {
        "": pytest.approx(own_score(scored, ids_of(prompt, long)[-tiny.CONTEXT :])[0], abs=1e-5)
    }


def test_a_response_over_the_context_keeps_its_end_token(scored: Path) -> None:
    scorer = build_reward_model({"path": str(scored)})
    long = " ".join("abcdefghij"[i % 10] for i in range(60))
    [[outputs]] = scorer.score([group("p:0", "x y", long)])
    ids = ids_of("x y", long)
    expected = [ids[1], *ids[2 : 2 + tiny.CONTEXT - 2], ids[-1]]
    assert len(expected) == tiny.CONTEXT
    assert outputs == {"": pytest.approx(own_score(scored, expected)[0], abs=1e-5)}
    assert scorer.facts() == {"reward_model_truncated": 1.0}


def test_the_run_counts_over_all_its_sittings(
    configured: Callable[..., Any], scored: Path, tmp_path: Path
) -> None:
    """The scorer is made anew on a resume and counts from 0; the run does not."""
    terms = [{"name": "reward_model", "args": {"path": str(scored)}}]
    long = [{"prompt": " ".join(["a"] * 40)} for _ in range(4)]
    tiny.write_rows(tmp_path / "long.jsonl", long)
    options = {
        "train__save_every": 1,
        "train__eval_every": 1,
        "train__steps": 3,
        "data__sources": [{"path": str(tmp_path / "long.jsonl")}],
        "sampling__max_new_tokens": 8,
        "reward__terms": terms,
        "sampling__min_new_tokens": 8,
    }
    straight, metrics = tiny.train(configured("grpo", out="straight", **options), "grpo")
    # 40 + 8 words and an end token are over 48; special tokens that were drawn are no words of the text.
    counts = [m["reward_model_truncated"] for m in metrics]
    assert 0 < counts[0] < counts[1] < counts[2] <= 48
    from trimtab.methods import grpo

    with pytest.raises(KeyboardInterrupt):
        grpo.train(configured("grpo", **options), on_eval=tiny.stop_at(2))
    resumed = grpo.train(configured("grpo", run__resume=True, **options))
    tiny.assert_same_run(straight.out, resumed.out)


# ---------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three classes that reads words, [CLS] a b [SEP] c d [SEP], at most 16 of them."""
    folder = tmp_path_factory.mktemp("bert") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tiny.WORDS, ":", "user:", "assistant:"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=16, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def encoded(folder: Path, *texts: str) -> torch.Tensor:
    """Logits of one text or pair by transformers alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("reads", ["response", "pair", "conversation"])
def test_an_encoder_reads_what_it_is_told(reads: str, activation: str, encoder: Path) -> None:
    scorer = build_reward_model(
        {
            "path": str(encoder),
            "input": reads,
            "activation": activation,
            "outputs": {"toxic": -1.0, "kind": 0.5},
            "batch_tokens": 48,  # three texts at once, so that some are padded
        }
    )
    rows = [group("p:0", "a b ", "c", "d e f", "g"), group("p:1", "h i j ", "k l m")]
    found = [outputs for row in scorer.score(rows) for outputs in row]
    texts = [(str(g.prompt), str(r.text)) for g in rows for r in g.responses]
    for (prompt, text), outputs in zip(texts, found, strict=True):
        given = {"response": (text,), "pair": (prompt, text), "conversation": (prompt + text,)}[reads]
        logits = encoded(encoder, *given)
        chosen = {"none": logits, "sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1)}[activation]
        toxic, _, kind = chosen.tolist()
        assert outputs == {"toxic": pytest.approx(toxic, abs=1e-5), "kind": pytest.approx(kind, abs=1e-5)}
    assert scorer.outputs == {"toxic": -1.0, "kind": 0.5}


def test_an_encoder_reads_a_conversation_with_its_roles(encoder: Path) -> None:
    scorer = build_reward_model({"path": str(encoder), "input": "conversation", "outputs": {"kind": 1.0}})
    [[outputs]] = scorer.score([group("c:0", [{"role": "user", "content": "a b"}], "c d")])
    expected = float(encoded(encoder, "user: a b assistant: c d")[2])
    assert outputs == {"kind": pytest.approx(expected, abs=1e-5)}


def test_an_encoder_counts_what_it_cut(encoder: Path) -> None:
    scorer = build_reward_model({"path": str(encoder), "input": "response", "outputs": {"kind": 1.0}})
    long = " ".join(["a"] * 40)
    found: Any = scorer.score([group("p:0", "x", long, "b")])[0]
    assert scorer.facts() == {"reward_model_truncated": 1.0}
    kept = " ".join(["a"] * 14)  # and [CLS] and [SEP]
    assert found[0]["kind"] == pytest.approx(float(encoded(encoder, kept)[2]), abs=1e-5)


# ---------------------------------------------------------------- bad input


def refused(**args: Any) -> str:
    with pytest.raises(InputError) as caught:
        build_reward_model(args)
    message = str(caught.value)
    assert message.startswith("reward 'reward_model': ")
    assert "\n" not in message
    return message.removeprefix("reward 'reward_model': ")


def test_bad_encoders(encoder: Path) -> None:
    path = str(encoder)
    assert "is an encoder: say what it reads" in refused(path=path, outputs={"kind": 1.0})
    assert "has 3 outputs (toxic, neutral, kind): give each that counts" in refused(path=path, input="pair")
    unknown = refused(path=path, input="pair", outputs={"kindness": 1.0})
    assert unknown == "outputs: 'kindness' is none of toxic, neutral, kind"
    assert "input" in refused(path=path, input="prompt", outputs={"kind": 1.0})


def test_bad_decoders(scored: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert refused(path=str(tmp_path / "nowhere")) == f"args.path: {tmp_path}/nowhere: no such folder"
    causal = refused(path=str(tiny_model))
    assert causal.startswith(
        f"args.path: {tiny_model} has no weights for score.weight: it is no reward model"
    )
    assert "softmax is always 1" in refused(path=str(scored), activation="softmax")
    assert "path is required" in refused()
    assert "unknown key 'weights'" in refused(path=str(scored), weights={})
    assert "args.tokenizer: cannot load" in refused(path=str(scored), tokenizer=str(tmp_path / "nowhere"))


def test_a_conversation_without_a_template_is_one_line(tmp_path: Path) -> None:
    folder = tiny.save_reward_model(tmp_path / "plain")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    for file in folder.glob("*template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    scorer: RewardModel = build_reward_model({"path": str(folder)})
    chat = [{"role": "user", "content": "a b"}]
    with pytest.raises(InputError, match=r"^reward model .*plain: rows:3: .*no chat template") as caught:
        Mixture([RewardTerm("learned", 1.0, scorer)]).score([group("rows:3", chat, "c")])
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_code_2(
    configured: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [{"name": "reward_model", "args": {"path": str(tmp_path / "nowhere")}}]
    file = tmp_path / "ppo.toml"
    file.write_text(dump_toml(configured("ppo", reward__terms=terms)), encoding="utf-8")
    assert run(["ppo", str(file)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == f"error: reward 'reward_model': args.path: {tmp_path}/nowhere: no such folder"
    assert not (tmp_path / "ppo" / "config.toml").exists(), "nothing is left that would stop a second try"
