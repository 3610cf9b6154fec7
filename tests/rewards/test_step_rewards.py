"""Rewards for steps: a process reward model and Python functions, and what they leave on a response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from trimtab.errors import InputError
from trimtab.groups import Group, Response
from trimtab.methods import find
from trimtab.models.load import ModelConfig, load_model
from trimtab.rewards.base import Mixture, RewardConfig, RewardTerm, RewardTermConfig
from trimtab.rewards.functions import build_mixture
from trimtab.rewards.steps import StepFunction, StepFunctionArgs, build_process_reward_model, outcome_of

Make = Callable[..., Any]


def test_outcomes_by_hand() -> None:
    rewards = [0.9, 0.5, 0.8]
    assert outcome_of(rewards, "product") == pytest.approx(0.36)
    assert outcome_of(rewards, "min") == 0.5
    assert outcome_of(rewards, "mean") == pytest.approx(2.2 / 3)
    assert outcome_of(rewards, "last") == 0.8


def step_function(function: Any, tokenizer: Any = None, **args: Any) -> StepFunction:
    return StepFunction(function, StepFunctionArgs(function="x:y", **args), tokenizer)


def test_a_function_sees_bare_steps_and_columns() -> None:
    seen = []

    def judge(prompt: str, steps: list[str], answer: str) -> list[float]:
        seen.append((prompt, steps, answer))
        return [float(answer in step) for step in steps]

    group = Group(id="g", prompt="p", responses=[Response(text="one\n\n two \nthree"), Response(text="two")])
    group.columns = {"answer": "two", "other": 1}
    [row] = step_function(judge).score([group])
    assert row == [{"": pytest.approx(1 / 3)}, {"": 1.0}]
    assert seen == [("p", ["one", "two", "three"], "two"), ("p", ["two"], "two")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0]", "returned 1 rewards for 2 steps: return one for each"),
        ("[1.0, float('nan')]", "return finite numbers"),
        ("[1.0, 'x']", "return finite numbers"),
        ("3", "TypeError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_ends_the_run_or_skips(value: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(f"def judge(prompt, steps, **columns):\n    return {value}\n")
    term = RewardTermConfig(name="steps", args={"function": f"{file}:judge"})
    groups = [Group(id="g:1", prompt="p", responses=[Response(text="a\nb")])]
    with pytest.raises(InputError, match=rf"reward 'steps' on g:1: .*{message}"):
        build_mixture(RewardConfig(terms=[term])).score(groups)
    report = build_mixture(RewardConfig(terms=[term], on_error="skip")).score(groups)
    assert report.skipped == 1
    assert groups[0].responses[0].step_rewards is None
    assert groups[0].responses[0].step_ends is None


def test_terms_that_judge_steps_are_added_by_weight() -> None:
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("a b z c")["input_ids"] + [tokenizer.eos_token_id]
    long = step_function(lambda prompt, steps: [float(len(s)) for s in steps], tokenizer, separator=" z")
    one = step_function(lambda prompt, steps: [1.0] * len(steps), tokenizer, separator=" z", outcome="last")
    terms = [RewardTerm("long", 0.5, long), RewardTerm("one", 2.0, one)]
    terms.append(RewardTerm("plain", 1.0, lambda prompt, response: 7.0))
    group = Group(id="g", prompt="p", responses=[Response(text="a b z c", tokens=tokens)])
    Mixture(terms).score([group])
    [response] = group.responses
    assert response.reward_terms == {"long": 2.0, "one": 1.0, "plain": 7.0}
    assert response.reward == pytest.approx(0.5 * 2 + 2 + 7)
    assert response.step_rewards == pytest.approx([0.5 * 3 + 2, 0.5 * 1 + 2])
    assert response.step_ends == [2, 4]
    other = step_function(lambda prompt, steps: [1.0] * len(steps), tokenizer, separator="\n")
    with pytest.raises(
        InputError, match=r"'long' splits steps at ' z' and 'other' at .*: give both one separator"
    ):
        Mixture([terms[0], RewardTerm("other", 1.0, other)])


def test_without_such_a_term_steps_are_left_alone() -> None:
    group = Group(id="g", prompt="p", responses=[Response(text="a", step_rewards=[1.0], step_ends=[0])])
    Mixture([RewardTerm("plain", 1.0, lambda prompt, response: 7.0)]).score([group])
    assert group.responses[0].step_rewards == [1.0]


# ---------------------------------------------------------------- a process reward model


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prm") / "run"
    config = tiny.configure(
        "process-reward", tiny_model, tiny_data, out, train__steps=10, process_reward__separator="z"
    )
    return Path(find("process-reward").train(config).out) / "model"


def own_chances(folder: Path, prompt: str, steps: list[str], end: str = " z") -> list[float]:
    """By transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    out, text = [], prompt
    for step in steps:
        text = f"{text} {step}{end}"
        with torch.no_grad():
            ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
            out.append(float(model(ids).logits.sigmoid()))
    return out


def test_it_judges_steps_as_it_was_trained(trained: Path) -> None:
    scorer = build_process_reward_model({"path": str(trained), "outcome": "min"})
    assert scorer.separator == "z"
    texts = ["a b z c", "d", "e z f z g h z"]
    group = Group(id="g", prompt="x y", responses=[Response(text=text) for text in texts])
    [row] = scorer.score([group])
    for response, value, steps in zip(
        group.responses, row, [["a b", "c"], ["d"], ["e", "f", "g h"]], strict=True
    ):
        found = scorer.steps_of(response)
        expected = own_chances(trained, "x y", steps)
        assert found is not None
        assert found.rewards == pytest.approx(expected, abs=1e-5)
        assert found.ends is None, "without the policy's tokenizer there is no place among its tokens"
        assert value == {"": pytest.approx(min(expected), abs=1e-5)}


def test_a_model_of_steps_as_they_stand_is_given_them_so(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny.configure(
        "process-reward",
        tiny_model,
        tiny_data,
        tmp_path / "run",
        train__steps=1,
        process_reward__separator="",
    )
    path = str(Path(find("process-reward").train(config).out) / "model")
    with pytest.raises(InputError, match=r"does not say what ends a step: give args\.separator"):
        build_process_reward_model({"path": path})
    scorer = build_process_reward_model({"path": path, "separator": "z"})
    group = Group(id="g", prompt="x y", responses=[Response(text="a b z c"), Response(text="")])
    scorer.score([group])
    found, empty = (scorer.steps_of(response) for response in group.responses)
    assert found is not None
    assert empty is not None
    assert len(empty.rewards) == 1
    # Each at its own last token: no separator is put behind the last step, as none was in training.
    expected = own_chances(Path(path), "x y", ["a b z", "c"], end="")
    assert found.rewards == pytest.approx(expected, abs=1e-5)
    assert abs(found.rewards[1] - own_chances(Path(path), "x y", ["a b", "c"])[1]) > 1e-5


def test_layout_and_batching_change_nothing(trained: Path) -> None:
    groups = [
        Group(
            id=f"g{i}",
            prompt="x y"[: 1 + 2 * (i % 2)],
            responses=[Response(text=t) for t in ("a z b", "c d e")],
        )
        for i in range(3)
    ]
    whole = build_process_reward_model({"path": str(trained)}).score(groups)
    small = build_process_reward_model({"path": str(trained), "batch_tokens": 1}).score(groups)
    for row, other in zip(whole, small, strict=True):
        for a, b in zip(row, other, strict=True):
            assert a[""] == pytest.approx(b[""], abs=1e-6)  # type: ignore[index]


def test_a_long_prompt_is_cut_and_a_long_response_refused(trained: Path) -> None:
    scorer = build_process_reward_model({"path": str(trained)})
    prompt = " ".join("abcdefghijklmnopqrstuvwxy"[i % 25] for i in range(44))
    group = Group(id="g", prompt=prompt, responses=[Response(text="a"), Response(text="b c z d e f")])
    group.responses.append(Response(text=" ".join(["a"] * 60)))
    [row] = scorer.score([group])
    assert scorer.facts() == {"process_reward_truncated": 1.0}
    assert row[2] == "61 tokens do not fit into 48"
    kept = " ".join(prompt.split()[-(48 - 7) :])
    expected = own_chances(trained, kept, ["b c", "d e f"])
    found = scorer.steps_of(group.responses[1])
    assert found is not None
    assert found.rewards == pytest.approx(expected, abs=1e-5)


def test_it_fills_ends_in_the_policys_tokens(trained: Path, tiny_model: Path) -> None:
    lm = load_model(ModelConfig(path=str(tiny_model), dtype="float32"))
    tokenizer = lm.tokenizer
    tokens = [*tokenizer("a b z c")["input_ids"], tokenizer.eos_token_id]
    group = Group(id="g", prompt="x", responses=[Response(text="a b z c", tokens=tokens, finish="stop")])
    config = RewardConfig(terms=[RewardTermConfig(name="process_reward_model", args={"path": str(trained)})])
    build_mixture(config, lm).score([group])
    assert group.responses[0].step_ends == [2, 4]
    assert group.responses[0].step_rewards == pytest.approx(own_chances(trained, "x", ["a b", "c"]), abs=1e-5)


def test_grpo_learns_from_its_steps(configured: Make, trained: Path) -> None:
    terms = [{"name": "process_reward_model", "label": "steps", "args": {"path": str(trained)}}]
    config = configured(
        "grpo", reward__terms=terms, grpo__supervision="process", train__steps=2, sampling__max_new_tokens=8
    )
    _, metrics = tiny.train(config, "grpo")
    assert 0 < metrics[0]["reward_mean"] < 1
    assert metrics[0]["grad_norm"] > 0


def test_an_adapter_shares_the_policys_base(configured: Make, tiny_model: Path) -> None:
    lora = {"adapter__kind": "lora", "adapter__rank": 4}
    result, _ = tiny.train(configured("process-reward", out="prm", train__steps=2, **lora), "process-reward")
    path = str(result.out / "model")
    policy, _ = tiny.train(configured("sft", out="sft", train__steps=1, **lora), "sft")
    scorer = build_process_reward_model({"path": path, "separator": "z"}, policy.lm)
    alone = build_process_reward_model({"path": path, "separator": "z"})
    assert (scorer.models, alone.models) == (0, 1)
    assert any("is an adapter on the policy's base" in note for note in scorer.notes)
    group = Group(id="g", prompt="x y", responses=[Response(text="a z b c")])
    values = [float(s.score([group])[0][0][""]) for s in (scorer, alone)]  # type: ignore[index]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


# ---------------------------------------------------------------- bad input


def test_what_it_is_not_for(trained: Path, tmp_path: Path, tiny_model: Path) -> None:
    from trimtab.rewards.models import build_reward_model

    with pytest.raises(InputError, match=r'judges steps: use the term "process_reward_model"'):
        build_reward_model({"path": str(trained)})
    plain = tiny.save_reward_model(tmp_path / "plain")
    with pytest.raises(InputError, match=r"does not say what ends a step: give args\.separator"):
        build_process_reward_model({"path": str(plain)})
    assert build_process_reward_model({"path": str(plain), "separator": "\n"}).separator == "\n"
    (plain / "reward.json").write_text('{"kind": "comparisons"}')
    with pytest.raises(InputError, match=r'is no process reward model: use the term "reward_model"'):
        build_process_reward_model({"path": str(plain)})
    several = tiny.save_reward_model(tmp_path / "several", num_labels=2)
    with pytest.raises(InputError, match="gives 2 scores a step"):
        build_process_reward_model({"path": str(several), "separator": "\n"})
    with pytest.raises(InputError, match=r"^reward 'process_reward_model': args\.path: .* no reward head"):
        build_process_reward_model({"path": str(tiny_model), "separator": "\n"})
    with pytest.raises(InputError, match="path is required"):
        build_process_reward_model({})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "function is required"),
        ({"function": "nowhere.py:judge"}, "there is no file nowhere.py"),
        ({"function": "x:y", "separator": ""}, "separator is empty"),
        ({"function": "x:y", "outcome": "best"}, "outcome"),
    ],
)
def test_bad_arguments_of_a_function(args: dict[str, Any], message: str) -> None:
    config = RewardConfig(terms=[RewardTermConfig(name="steps", args=args)])
    with pytest.raises(InputError, match=message):
        build_mixture(config)
